"""The discrete Gaussian: the Gaussian density on the integers, normalised there.

Canonne, Kamath, Steinke, "The discrete Gaussian for differential privacy", arXiv 2004.00010,
Definition 1. It is not the *rounded* Gaussian, and must not be priced as one: at sensitivity 1 and
squared scale 1 its delta at epsilon 2 is 2.48e-2, the continuous one's 2.09e-2.

>>> from dpfl_flower.rng import secure
>>> noise = DiscreteGaussian(4)
>>> noise.sample(3, secure()).dtype
dtype('int64')
>>> round(noise.variance, 9)
4.0
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Final, final

import numpy as np
from numpy.typing import NDArray

from dpfl_flower import checks
from dpfl_flower.noise import fixed_point
from dpfl_flower.noise.distribution import NoiseDistribution
from dpfl_flower.noise.table import PROBABILITY_BITS, TableSampler
from dpfl_flower.rng import RandomSource

__all__ = ["MAX_SQUARED_SCALE", "DiscreteGaussian"]

MAX_SQUARED_SCALE: Final = 1 << 36
_TAIL: Final = 13  # scales in the table: at most 1.3e-38 = 2^-126 lies beyond
_BITS: Final = 192  # binary places of the arithmetic


@final
@dataclass(frozen=True)
class DiscreteGaussian(NoiseDistribution):
    """``P(k)`` proportional to ``exp(-k^2 / (2 squared_scale))`` on the integers.

    Sums of independent discrete Gaussians are nearly, not exactly, discrete Gaussian: what that
    costs is part of the event that prices them (``DistributedDiscreteGaussian``).

    Parameters
    ----------
    squared_scale : int
        The parameter called sigma^2, in squared grid units: 1 to 2^36. The variance is equal to it
        up to 2 % at 1, to 1e-9 from 2 on. The first draw of a scale builds its table, once per
        process (about 0.3 CPU-s for 2^28, a standard deviation of 2^14).

    Raises
    ------
    ValueError
        If ``squared_scale`` is not an integer from 1 to 2^36.
    """

    squared_scale: int

    def __post_init__(self) -> None:
        checks.positive_int(squared_scale=self.squared_scale)
        checks.at_most(MAX_SQUARED_SCALE, squared_scale=self.squared_scale)
        object.__setattr__(self, "squared_scale", int(self.squared_scale))

    def sample(self, n: int, rng: RandomSource) -> NDArray[np.int64]:
        """Return ``n`` independent draws in grid units; one 64-bit word of ``rng`` each."""
        return _table(self.squared_scale).sample(n, rng)

    @property
    def variance(self) -> float:
        """``v (1 + 2 sum_m (1 - 4 pi^2 m^2 v) e_m) / (1 + 2 sum_m e_m)``, just below ``v``.

        With ``e_m = exp(-2 pi^2 m^2 v)``: Poisson's summation formula, on both sums of the
        variance (arXiv 2004.00010, Fact 18).
        """
        square = float(self.squared_scale)
        above = below = 1.0
        for m in (1, 2):
            term = 2 * math.exp(-2 * (math.pi * m) ** 2 * square)
            below += term
            above += term * (1 - (2 * math.pi * m) ** 2 * square)
        return square * above / below

    @property
    def total_variation(self) -> float:
        """A bound on the distance of one draw from the exact law: about 2^-108 at 2^28.

        The table is the law given ``|k| <= K``, which is as far from the law as the mass beyond K,
        at most that of the real Gaussian (arXiv 2004.00010, Proposition 25:
        ``P[k >= K + 1] <= P[N(0, v) >= K]``). Each of its ``2 K + 1`` probabilities is within 3/4
        of 2^-127 (rounding 1/2, arithmetic below 1/4), and k = 0 takes what the others miss of 1.
        """
        reach = _reach(self.squared_scale)
        beyond = math.erfc(reach / math.sqrt(2 * self.squared_scale))
        return (2 * reach + 1) * 0.75 * 2.0**-PROBABILITY_BITS + beyond


def _reach(squared_scale: int) -> int:
    return math.isqrt(_TAIL * _TAIL * squared_scale) + 1


@lru_cache(maxsize=4)
def _table(squared_scale: int) -> TableSampler:
    half = probabilities(squared_scale)
    return TableSampler(half[:0:-1] + half, first=1 - len(half))


def probabilities(squared_scale: int) -> list[int]:
    """Return P(0), ..., P(K) of the discrete Gaussian given ``|k| <= K``, in units of 2^-127.

    ``exp(-(k+1)^2 / 2v) = exp(-k^2 / 2v) r_k`` with ``r_(k+1) = r_k exp(-1 / v)``, in integers of
    192 binary places; P(0) takes what the others leave of 1.

    Errors, before the last rounding, below 2^-129: all factors are at most 1, so the recurrence
    has drifted at most ``(k + 2)^2 / 2`` units of 2^-192 at ``k < 2^22``, less than 2^-149; the
    ``2 K + 1`` weights, at most so far off each, have a sum above ``K / 8`` that divides.
    """
    weight = 1 << _BITS
    ratio = fixed_point.exp_minus(Fraction(1, 2 * squared_scale), bits=_BITS)
    ratio_step = fixed_point.exp_minus(Fraction(1, squared_scale), bits=_BITS)
    weights = []
    for _ in range(_reach(squared_scale) + 1):
        weights.append(weight)
        weight = weight * ratio >> _BITS
        ratio = ratio * ratio_step >> _BITS
    return fixed_point.normalised(weights, bits=PROBABILITY_BITS)
