"""The Gaussian mechanism exactly: Balle & Wang, arXiv 1805.06530, Theorem 8.

``mu`` is sensitivity / standard deviation; mechanisms compose as mu^2 = sum of mu_i^2.

>>> round(1 / gaussian_mu(1.0, 1e-5), 4)
3.7306
>>> round(gaussian_epsilon(2.0, 1e-5), 3)
9.997
"""

import math

from dpfl_flower.lazily import lazily

special = lazily("scipy.special")

_BISECTIONS = 120


def gaussian_delta(mu: float, epsilon: float) -> float:
    """Return the hockey-stick divergence of N(mu, 1) and N(0, 1) at ``epsilon``.

    Phi(mu/2 - epsilon/mu) - e^epsilon Phi(-mu/2 - epsilon/mu), computed in logarithms.
    """
    if mu == 0:
        return 0.0
    if math.isinf(mu):
        return 1.0
    log_first = float(special.log_ndtr(mu / 2 - epsilon / mu))
    log_second = epsilon + float(special.log_ndtr(-mu / 2 - epsilon / mu))
    if log_second >= log_first:  # equal but for rounding: the divergence is below what doubles tell
        return 0.0
    return math.exp(log_first) * -math.expm1(log_second - log_first)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return the smallest epsilon with `gaussian_delta` <= delta, rounded up."""
    if gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    # Mironov, arXiv 1702.07476, Proposition 3 at the best order: an upper bound.
    high = mu * mu / 2 + mu * math.sqrt(2 * math.log(1 / delta))
    if not math.isfinite(high):
        return math.inf
    low = 0.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        if gaussian_delta(mu, middle) <= delta:
            high = middle
        else:
            low = middle
    return high


def gaussian_mu(epsilon: float, delta: float) -> float:
    """Return the largest mu with `gaussian_epsilon` <= epsilon, rounded down."""
    low, high = 0.0, 1.0
    while gaussian_delta(high, epsilon) <= delta:
        low, high = high, 2 * high
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        if gaussian_delta(middle, epsilon) <= delta:
            low = middle
        else:
            high = middle
    return low
