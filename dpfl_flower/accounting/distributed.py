"""Rényi divergences of noise that several nodes add together, in integer units.

Rényi differential privacy of a sum of discrete Gaussians (Kairouz, Liu, Steinke, arXiv 2102.06387)
and of Skellam draws (Agarwal, Kairouz, Liu, arXiv 2110.04995), after which a vector of integers
with L2 norm at most D2 and L1 norm at most D1 was added or left out.

>>> f"{tau(4, shares=100):.3g}", f"{tau(0.25, shares=100):.3g}"  # the second says nothing
('7.16e-17', '9.7')
>>> round(discrete_gaussian_rdp(2.0, 4, shares=4, l2=1, l1=1, dimension=1), 6)
0.0625
"""

import math

import numpy as np

__all__ = ["discrete_gaussian_rdp", "skellam_rdp", "tau"]

_TERMS = 10_000
_UP = 1 + 2.0**-45
"""Above what rounding in float64 takes from any of the results."""


def tau(squared_scale: float, *, shares: int) -> float:
    """Return how far a sum of discrete Gaussians is from one discrete Gaussian, at most.

    ``10 sum_(k < n) exp(-2 pi^2 v k / (k + 1))``, ``v`` the squared scale of one of the ``n``
    shares: twice what bounds the log-ratio of the two laws' probabilities (arXiv 2102.06387,
    Theorem 1 and Section 3, for ``v >= 1/4``).
    """
    k = np.arange(1, min(shares, _TERMS) + 1, dtype=np.float64)
    terms = np.exp(-2 * math.pi**2 * squared_scale * (k / (k + 1)))
    # The terms fall with k: each of those that are left out is at most the first of them.
    left_out = max(0, shares - 1 - (len(k) - 1)) * float(terms[-1])
    return 10 * (float(terms[:-1].sum()) + left_out) * _UP


def discrete_gaussian_rdp(
    order: float, squared_scale: int, *, shares: int, l2: float, l1: float, dimension: int
) -> float:
    """Return the Rényi divergence of order ``order`` for a sum of discrete Gaussian shares.

    arXiv 2102.06387, Theorem 1 and its proof in Section 3, with D2 and D1 divided by the standard
    deviation ``sqrt(shares * squared_scale)`` of the sum::

        min{ a D2^2 / 2 + tau d,  a/2 (D2^2 + 2 D1 tau + tau^2 d),  a/2 (D2 + sqrt(d) tau)^2 }

    In each coordinate the log-ratio of the laws is that of a Gaussian up to ``tau``. First term:
    the moments of that Gaussian part under the sum, which is subgaussian with variance
    ``shares * squared_scale``, for every order. Others: the triangle inequality for concentrated
    divergences (Bun and Steinke, arXiv 1605.02065, Proposition 27) along sum, discrete Gaussian,
    shifted discrete Gaussian, shifted sum. One share: no tau, the central discrete Gaussian.

    Parameters
    ----------
    order : float
        > 1.
    squared_scale : int
        Of one share; at least 1.
    shares : int
        How many independent shares are certain to be in the sum; further ones are post-processing.
    l2, l1 : float
        Bounds on what neighbours differ by, in grid units.
    dimension : int
        Coordinates that noise was added to.
    """
    stddev = math.sqrt(shares * squared_scale)
    d2, d1, off = l2 / stddev, l1 / stddev, tau(squared_scale, shares=shares)
    return _UP * min(
        order * d2 * d2 / 2 + off * dimension,
        order / 2 * (d2 * d2 + 2 * d1 * off + off * off * dimension),
        order / 2 * (d2 + math.sqrt(dimension) * off) ** 2,
    )


def skellam_rdp(order: float, variance: float, *, l2: float, l1: float) -> float:
    """Return the Rényi divergence of order ``order`` for Skellam noise of this total variance.

    arXiv 2110.04995, Section 3 and Corollary 4.1 (there with the scale written out), for integer
    orders::

        a D2^2 / (2 mu) + min( ((2a - 1) D2^2 + 6 D1) / (4 mu^2),  3 D1 / (2 mu) )

    No more than integers is relied on; between two of them ``(a - 1) D_a`` is convex in a (van
    Erven and Harremoës, arXiv 1206.2459, Corollary 2), so that the chord through them is a bound.

    Parameters
    ----------
    order : float
        > 1.
    variance : float
        mu, of the shares that are certain to be in the sum, together: a sum of Skellams is Skellam.
    l2, l1 : float
        Bounds on what neighbours differ by, in grid units.
    """

    def at(integer: int) -> float:
        least = min(((2 * integer - 1) * l2 * l2 + 6 * l1) / (4 * variance**2), 1.5 * l1 / variance)
        return integer * l2 * l2 / (2 * variance) + least

    below = math.floor(order)
    if below == order:
        return _UP * at(below)
    share = order - below
    # At order 1 the product (a - 1) D_a is 0.
    product = share * below * at(below + 1) + (1 - share) * (below - 1) * at(max(2, below))
    return _UP * product / (order - 1)
