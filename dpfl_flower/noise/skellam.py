"""The Skellam distribution: the difference of two independent Poisson draws of the same mean.

Agarwal, Kairouz, Liu, "The Skellam mechanism for differentially private federated learning",
arXiv 2110.04995, Section 3.1. Sums of independent Skellam draws are Skellam, exactly.

>>> from dpfl_flower.rng import secure
>>> noise = Skellam(9)
>>> noise.sample(3, secure()).dtype
dtype('int64')
>>> noise.stddev
3.0
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, final

import numpy as np
from numpy.typing import NDArray

from dpfl_flower import checks
from dpfl_flower.noise import fixed_point
from dpfl_flower.noise.distribution import NoiseDistribution
from dpfl_flower.noise.table import PROBABILITY_BITS, TableSampler
from dpfl_flower.rng import RandomSource

__all__ = ["MAX_SQUARED_SCALE", "Skellam"]

MAX_SQUARED_SCALE: Final = 1 << 36
_LOG_BEYOND: Final = (PROBABILITY_BITS + 1) * math.log(2)
_START_BITS: Final = 176


@final
@dataclass(frozen=True)
class Skellam(NoiseDistribution):
    """``P(k) = exp(-mu) I_k(mu)`` on the integers, ``mu = squared_scale`` its variance.

    The difference of two Poisson draws of mean ``mu / 2`` each; I_k is the modified Bessel function
    of the first kind.

    Parameters
    ----------
    squared_scale : int
        The variance, in squared grid units: 1 to 2^36. The first draw of a scale builds its table,
        once per process.

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
        """``mu``, exactly."""
        return float(self.squared_scale)

    @property
    def total_variation(self) -> float:
        """A bound on the distance of one draw from the exact law: about 2^-108 at mu = 2^28.

        As for the discrete Gaussian: the mass beyond the table, by Chernoff's bound at most 2^-127
        for both sides together, and 3/4 of 2^-127 for each of the ``2 K + 1`` probabilities.
        """
        reach = _reach(self.squared_scale)
        beyond = 2 * math.exp(log_tail_bound(self.squared_scale, reach + 1))
        return (2 * reach + 1) * 0.75 * 2.0**-PROBABILITY_BITS + beyond


def log_tail_bound(mean_square: float, k: float) -> float:
    """Return a bound on ``log P[X >= k]`` for a Skellam draw of variance ``mean_square``, k >= 0.

    Chernoff: ``log E exp(t X) = mu (cosh t - 1)``, least at ``sinh t = k / mu``, which gives
    ``sqrt(mu^2 + k^2) - mu - k asinh(k / mu)``; the difference is written so that it does not
    cancel.
    """
    slope = k / mean_square
    return k * (slope / (math.sqrt(1 + slope * slope) + 1) - math.asinh(slope))


def _reach(squared_scale: int) -> int:
    """Return the least K with at most 2^-128 of the mass above it, by Chernoff's bound."""
    low, high = 0, 1
    while log_tail_bound(squared_scale, high + 1) > -_LOG_BEYOND:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if log_tail_bound(squared_scale, middle + 1) > -_LOG_BEYOND:
            low = middle
        else:
            high = middle
    return high


@lru_cache(maxsize=4)
def _table(squared_scale: int) -> TableSampler:
    half = probabilities(squared_scale)
    return TableSampler(half[:0:-1] + half, first=1 - len(half))


def probabilities(squared_scale: int) -> list[int]:
    """Return P(0), ..., P(K) of the Skellam law, in units of 2^-127; P(0) takes the rest of 1.

    Miller's algorithm: ``I_(k-1) = I_(k+1) + (2 k / mu) I_k`` (Abramowitz and Stegun, 9.6.26),
    begun beyond K with 0 and 1, is all additions, so that nothing cancels; the sum over all k,
    which is 1, gives the factor (Olver and Sookne, Math. Comp. 26, 1972).

    Errors, before the last rounding, below 2^-129. The recurrence is begun at a quarter more than
    K, where less than 2^-190 of the mass lies beyond: what the start adds is that solution which
    decays towards 0 and is, at every k, at most the law's own mass at the start. A floor in step j
    costs at most one unit of the value at j, relatively, in all that follows (a solution begun at
    j alone grows no faster): fewer than 2^23 steps times 2^-176.
    """
    reach = _reach(squared_scale)
    above, here = 0, 1 << _START_BITS
    weights = []
    for k in range(reach + reach // 4 + 16, -1, -1):
        if k <= reach:
            weights.append(here)
        above, here = here, above + 2 * k * here // squared_scale
    weights.reverse()
    return fixed_point.normalised(weights, bits=PROBABILITY_BITS)
