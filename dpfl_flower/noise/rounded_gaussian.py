"""The rounded Gaussian: a real Gaussian draw, rounded to the nearest integer.

>>> from dpfl_flower.rng import secure
>>> noise = RoundedGaussian(2)
>>> noise.sample(3, secure()).dtype
dtype('int64')
>>> round(noise.variance, 9)  # scale^2 + 1/12
4.083333333
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import count
from typing import Final, final

import numpy as np
from numpy.typing import NDArray

from dpfl_flower import checks
from dpfl_flower.noise import fixed_point
from dpfl_flower.noise.distribution import NoiseDistribution
from dpfl_flower.noise.table import PROBABILITY_BITS, TableSampler
from dpfl_flower.rng import RandomSource

MAX_SCALE: Final = 1 << 18
_TAIL: Final = 13  # standard deviations in the table: 1.2e-38 = 2^-126 lies beyond


@final
@dataclass(frozen=True)
class RoundedGaussian(NoiseDistribution):
    """``P(k) = Phi((k + 1/2) / scale) - Phi((k - 1/2) / scale)`` on the integers.

    Added to an integer sum it equals rounding the answer of a real Gaussian mechanism of standard
    deviation ``scale``, so that mechanism's accounting holds by post-processing. It is not the
    *discrete* Gaussian.

    Parameters
    ----------
    scale : int
        Standard deviation, in grid units, of the Gaussian before rounding: 1 to 2^18. The first
        draw of a scale builds its table, once per process (about 0.4 CPU-s for 2^14).

    Raises
    ------
    ValueError
        If ``scale`` is not an integer from 1 to 2^18.
    """

    scale: int

    def __post_init__(self) -> None:
        checks.positive_int(scale=self.scale)
        checks.at_most(MAX_SCALE, scale=self.scale)

    def sample(self, n: int, rng: RandomSource) -> NDArray[np.int64]:
        """Return ``n`` independent draws in grid units; one 64-bit word of ``rng`` each."""
        return _table(int(self.scale)).sample(n, rng)

    @property
    def variance(self) -> float:
        r"""``scale^2 + 1/12``, corrected where the scale is near 1.

        With the sawtooth ``x - round(x) = sum_m (-1)^(m+1) sin(2 pi m x) / (pi m)``:
        ``s^2 + 1/12 + sum_m (-1)^m exp(-2 pi^2 m^2 s^2) (4 s^2 + 1 / (pi m)^2)``.
        """
        square = float(self.scale) ** 2
        corrections = (
            (-1) ** m
            * math.exp(-2 * (math.pi * m) ** 2 * square)
            * (4 * square + 1 / (math.pi * m) ** 2)
            for m in (1, 2)
        )
        return square + 1 / 12 + sum(corrections)

    @property
    def total_variation(self) -> float:
        """A bound on the distance of one draw from the exact law: about 2^-108 at scale 2^14.

        The ``2 K + 1`` probabilities in the table are each within 3/4 of 2^-127 of the exact ones
        (rounding 1/2, arithmetic below 1/4). What they miss of 1, at most the mass ``t`` beyond
        the table and their errors, goes to k = 0. So the absolute differences sum to at most
        ``2 ((2 K + 1) 3/4 2^-127 + t)``; half of that is the distance. The sampler adds nothing.
        """
        reach = _reach(self.scale)
        beyond = math.erfc((reach + 0.5) / (self.scale * math.sqrt(2)))
        return (2 * reach + 1) * 0.75 * 2.0**-PROBABILITY_BITS + beyond


def _reach(scale: int) -> int:
    return _TAIL * scale


@lru_cache(maxsize=4)
def _table(scale: int) -> TableSampler:
    half = probabilities(scale)
    return TableSampler(half[:0:-1] + half, first=1 - len(half))


def probabilities(scale: int) -> list[int]:
    """Return P(0), ..., P(13 scale) of the rounded Gaussian in units of 2^-127.

    With ``x = k / s`` and ``h = 1 / (2 s)`` the cell's mass is, by the generating function of the
    Hermite polynomials, ``phi(x) / s * sum_j h^(2j) He_2j(x) / (2j + 1)!``. Its density follows
    from ``exp(-(k+1)^2 / 2s^2) = exp(-k^2 / 2s^2) r_k`` with ``r_(k+1) = r_k exp(-1 / s^2)``.
    All in integers of ``bits`` binary places; P(0) takes what the others leave of 1.

    Errors, before the last rounding, below 2^-129: the series stops where Cramer's bound
    ``|He_n(x)| <= 1.09 sqrt(n!) exp(x^2 / 4)`` leaves 2^-140; the recurrence has drifted at most
    ``(k + 2)^2 / 2`` units of ``2^-bits`` at k, and Horner's rule by ``3 (J + 1) x^(2J)`` of them,
    times phi(x), at most ``(2J / e)^J``.

    Raises
    ------
    ArithmeticError
        If the sum of the probabilities is further from 1 than these errors allow.
    """
    coefficients = _series(scale)
    order = len(coefficients) - 1
    bits = 192 + order * (2 * order).bit_length()
    square = scale * scale
    horner = [fixed_point.nearest(c, bits=bits) for c in reversed(coefficients)]
    density = fixed_point.inverse_sqrt_two_pi(bits=bits) // scale
    ratio = fixed_point.exp_minus(Fraction(1, 2 * square), bits=bits)
    ratio_step = fixed_point.exp_minus(Fraction(1, square), bits=bits)
    last_shift = 2 * bits - PROBABILITY_BITS
    half_unit = 1 << (last_shift - 1)
    leading, rest = horner[0], horner[1:]
    result = []
    for k in range(_reach(scale) + 1):
        x_squared = (k * k << bits) // square
        series = leading
        for coefficient in rest:
            series = (series * x_squared >> bits) + coefficient
        result.append((density * series + half_unit) >> last_shift)
        density = density * ratio >> bits
        ratio = ratio * ratio_step >> bits
    missing = (1 << PROBABILITY_BITS) - (2 * sum(result) - result[0])
    if abs(missing) > 2 * len(result) + 4:
        raise ArithmeticError(f"probabilities at scale={scale!r} miss {missing} units of 1")
    result[0] += missing
    return result


def _series(scale: int) -> list[Fraction]:
    """Return the coefficients of ``sum_(j <= J) h^(2j) He_2j(x) / (2j + 1)!`` in powers of x^2.

    ``He_2j(x) = sum_i (-1)^(j-i) (2j)! / ((2i)! (j-i)! 2^(j-i)) x^(2i)``.
    """
    quarter = Fraction(1, 4 * scale * scale)  # h^2
    for order in count(0):
        n = order + 1
        left_out = float(quarter) ** n / ((2 * n + 1) * math.sqrt(math.factorial(2 * n)))
        if left_out < scale * 2.0**-141:  # the cell's mass carries 1 / scale
            break
    return [
        sum(
            (
                quarter**j
                * (-1) ** (j - i)
                / ((2 * j + 1) * math.factorial(2 * i) * math.factorial(j - i) * 2 ** (j - i))
                for j in range(i, order + 1)
            ),
            Fraction(0),
        )
        for i in range(order + 1)
    ]
