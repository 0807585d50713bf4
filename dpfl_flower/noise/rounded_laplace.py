"""The rounded Laplace: a real Laplace draw, rounded to the nearest integer.

>>> from dpfl_flower.rng import secure
>>> noise = RoundedLaplace(2.5)
>>> noise.sample(3, secure()).dtype
dtype('int64')
>>> round(noise.variance, 2)  # about 2 scale^2 + 1/12
12.58
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

MAX_SCALE: Final = 1 << 18
_BITS: Final = 192  # binary places of the arithmetic; tables have fewer than 2^18 steps
_BLOCK_DRAWS: Final = 1 << 14  # stays in cache
_TAIL: Final = 88  # scales in the table: exp(-88) = 2^-126.9 lies beyond


@final
@dataclass(frozen=True)
class RoundedLaplace(NoiseDistribution):
    """``P(k) = (q^(|k| - 1/2) - q^(|k| + 1/2)) / 2``, ``q = exp(-1 / scale)``, and P(0) the rest.

    Added to an integer sum it equals rounding the answer of a real Laplace mechanism of this
    scale, so that mechanism's accounting holds by post-processing. It is not the *discrete*
    Laplace. The table ends where 2^-127 of the mass is left, so what is pure epsilon-DP for the
    real mechanism holds here with the delta of :attr:`total_variation`.

    Parameters
    ----------
    scale : float
        Scale ``b``, in grid units, of the density ``exp(-|x| / b) / 2b`` before rounding: 1 to
        2^18. Taken as the exact rational number that the float is.

    Raises
    ------
    ValueError
        If ``scale`` is not from 1 to 2^18.
    """

    scale: float

    def __post_init__(self) -> None:
        checks.at_most(MAX_SCALE, scale=self.scale)
        if self.scale < 1:
            raise ValueError(f"scale={self.scale!r} must be >= 1")

    def sample(self, n: int, rng: RandomSource) -> NDArray[np.int64]:
        """Return ``n`` independent draws in grid units; two 64-bit words of ``rng`` each."""
        checks.non_negative_int(n=n)
        stride, steps, places = _tables(Fraction(float(self.scale)))
        values = np.empty(n, dtype=np.int64)
        for start in range(0, n, _BLOCK_DRAWS):
            block = values[start : start + _BLOCK_DRAWS]
            # A sign and a geometric step: 0 is the value 0, +-(1 + i) begins at +-(1 + i stride).
            step = steps.sample(block.size, rng)
            np.abs(step, out=block)
            block -= 1
            block *= stride
            block += places.sample(block.size, rng)
            block *= np.sign(step)
        return values

    @property
    def variance(self) -> float:
        """``cosh(1/2b) / (2 sinh(1/2b)^2)``, which is ``2 b^2 + 1/12`` for large ``b``.

        Twice the sum of ``k^2 exp(-k/b) sinh(1/2b)`` over k >= 1, in closed form.
        """
        half = 1 / (2 * float(self.scale))
        return math.cosh(half) / (2 * math.sinh(half) ** 2)

    @property
    def total_variation(self) -> float:
        """A bound on the distance of one draw from the exact law: about 2^-115.

        The two tables are independent, so their distances add. In each of them the ``n``
        probabilities are within 3/4 of 2^-127 of the exact ones, cell 0 takes what they miss of
        1, at most the mass ``t`` beyond the table and their errors, and half the sum of the
        absolute differences is at most ``n 3/4 2^-127 + t``. Only the table of steps has a ``t``.
        """
        scale = Fraction(float(self.scale))
        stride = _stride(scale)
        reach = _reach(scale)
        beyond = math.exp(-(reach * stride + 0.5) / scale)
        return (2 * reach + 1 + stride) * 0.75 * 2.0**-PROBABILITY_BITS + beyond


def _stride(scale: Fraction) -> int:
    """Return the largest power of two that is at most a sixteenth of the scale, at least 1."""
    return 1 << max(0, math.floor(scale / 16).bit_length() - 1)


def _reach(scale: Fraction) -> int:
    return math.ceil(_TAIL * scale / _stride(scale))


@lru_cache(maxsize=8)
def _tables(scale: Fraction) -> tuple[int, TableSampler, TableSampler]:
    """Return the stride and the samplers of signed steps and of places in a stride.

    Given k != 0, ``|k| - 1`` is geometric with ratio q; its quotient and remainder by any stride
    ``S`` are independent, geometric with ratio ``q^S`` and truncated geometric with ratio ``q``.
    So neither table grows with the scale times the reach, and no accuracy is lost.
    """
    stride = _stride(scale)
    steps, places = step_probabilities(scale), place_probabilities(scale)
    return (
        stride,
        TableSampler(steps[:0:-1] + steps, first=1 - len(steps)),
        TableSampler(places, first=1),
    )


def step_probabilities(scale: Fraction) -> list[int]:
    """Return the probabilities of step 0 and of steps 1, 2, ... (of either sign), times 2^127.

    Step 0 has ``1 - q^(1/2)``, step ``+-(1 + i)`` has ``q^(1/2) (1 - q^S) q^(S i) / 2``.
    """
    one = 1 << _BITS
    ratio = fixed_point.exp_minus(_stride(scale) / scale, bits=_BITS)
    some = fixed_point.exp_minus(1 / (2 * scale), bits=_BITS)
    first = some * (one - ratio) >> (_BITS + 1)
    rest = _geometric(first, ratio, _reach(scale))
    return [(1 << PROBABILITY_BITS) - 2 * sum(rest), *rest]


def place_probabilities(scale: Fraction) -> list[int]:
    """Return the probabilities of the ``S`` places in a stride, times 2^127.

    Place i, from 0, has ``(1 - q) q^i / (1 - q^S)``.
    """
    one = 1 << _BITS
    stride = _stride(scale)
    ratio = fixed_point.exp_minus(1 / scale, bits=_BITS)
    whole = fixed_point.exp_minus(stride / scale, bits=_BITS)
    result = _geometric(((one - ratio) << _BITS) // (one - whole), ratio, stride)
    result[0] += (1 << PROBABILITY_BITS) - sum(result)
    return result


def _geometric(first: int, ratio: int, n: int) -> list[int]:
    result = []
    for _ in range(n):
        result.append(fixed_point.nearest_shift(first, _BITS - PROBABILITY_BITS))
        first = first * ratio >> _BITS
    return result
