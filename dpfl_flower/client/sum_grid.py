"""Integers for a sum of reals that is rounded as a whole, where no unit can be checked by itself.

DP-SGD sums clipped gradients in floating point; only the sum meets a grid. Rounding it with a fresh
uniform dither keeps what one unit moves close to what it moved before, with a probability that is
stated and charged.

>>> grid = SumGrid.for_noise_multiplier(1.0, 1_000_000)
>>> grid.noise_units, round(grid.clip_units, 1)
(16384, 16370.3)
"""

import math
from dataclasses import dataclass
from typing import Final, Self, final

from dpfl_flower import checks
from dpfl_flower.noise import RoundedGaussian

__all__ = ["SumGrid", "most_total_variation"]

_SMALLEST_NOISE_UNITS: Final = 1 << 14
_LARGEST_NOISE_UNITS: Final = 1 << 18
_LEAST_NOISE_MULTIPLIER: Final = 2.0**-20
"""Below it the sum of many units would leave the integers that float64 holds."""

_FAILURE: Final = 2.0**-100
"""How often one rounding may move a unit further than what is charged for."""

_DITHER_STEP: Final = 2.0**-32


@final
@dataclass(frozen=True)
class SumGrid:
    """The grid of one step.

    Attributes
    ----------
    dimension : int
        Entries of the sum.
    noise_units : int
        The scale of the `RoundedGaussian` that is added, in grid units.
    clip_units : float
        The clip norm in grid units: a grid unit is ``clip_norm / clip_units``.
    """

    dimension: int
    noise_units: int
    clip_units: float

    @classmethod
    def for_noise_multiplier(
        cls, noise_multiplier: float, dimension: int, *, max_inflation: float = 1.01
    ) -> Self:
        """Return a grid on which the rounded sum has at least this noise multiplier.

        With x + v and x the sums of neighbours in grid units, ``|v| <= S``, and u the dither, entry
        i moves by ``floor(x_i + v_i + u_i) - floor(x_i + u_i)``, which is v_i plus an independent
        error e_i of mean 0 within an interval of length 1. Then ``|v + e|^2 = |v|^2 + 2 <v, e> +
        |e|^2``, where by Hoeffding's inequality (J. Amer. Statist. Assoc. 58, 1963, Theorem 2),
        each but for a probability b/2 ::

            <v, e> <= S sqrt(ln(2/b) / 2)        |e|^2 <= d/4 + sqrt(d ln(2/b) / 2)

        S is chosen so that the sum of the three is at most ``(noise_units / noise_multiplier)^2``.
        Where that fails, it fails with probability b = 2^-100: part of `total_variation`.

        Parameters
        ----------
        noise_multiplier : float
            At least 2^-20.
        dimension : int
        max_inflation : float
            How much longer than S the bound on the rounded sum may be where a finer grid is left:
            by as much the noise is larger than it would have to be.

        Raises
        ------
        ValueError
            Naming the argument; when even on the finest grid rounding would double the noise.
        """
        checks.positive(noise_multiplier=noise_multiplier)
        checks.positive_int(dimension=dimension)
        if noise_multiplier < _LEAST_NOISE_MULTIPLIER:
            raise ValueError(
                f"noise_multiplier={noise_multiplier!r} must be 0 or >= {_LEAST_NOISE_MULTIPLIER!r}"
            )
        noise_units = _SMALLEST_NOISE_UNITS
        while noise_units <= _LARGEST_NOISE_UNITS:
            bound = noise_units / noise_multiplier
            clip_units = _before_rounding(bound, dimension)
            finest = noise_units == _LARGEST_NOISE_UNITS
            if bound <= (2 if finest else max_inflation) * clip_units:
                return cls(dimension, noise_units, clip_units)
            noise_units *= 2
        raise ValueError(
            f"noise_multiplier={noise_multiplier!r} with dimension={dimension} needs a finer grid "
            f"than {_LARGEST_NOISE_UNITS} units of noise: train fewer parameters or with less noise"
        )

    @property
    def noise(self) -> RoundedGaussian:
        """The noise, in grid units."""
        return RoundedGaussian(self.noise_units)

    @property
    def total_variation(self) -> float:
        """A bound on the distance of one noisy sum from a Gaussian mechanism's."""
        return _FAILURE + self.dimension * self.noise.total_variation


def most_total_variation(dimension: int) -> float:
    """Return a bound for any grid with ``dimension`` entries, and for one of a single count."""
    return 2 * _FAILURE + (dimension + 1) * RoundedGaussian(_LARGEST_NOISE_UNITS).total_variation


def _before_rounding(bound: float, dimension: int) -> float:
    """Return the largest norm S that rounding carries over ``bound`` with probability 2^-100."""
    spread = math.log(2 / _FAILURE) / 2
    # The dither has steps of 2^-32, so that an error's mean is 0 but for as much.
    off = 2 * (math.sqrt(spread) + math.sqrt(dimension) * _DITHER_STEP)
    errors = dimension * (0.25 + _DITHER_STEP) + math.sqrt(dimension * spread)
    # S^2 + off S + errors = bound^2; rounded down by far more than the arithmetic's own error.
    rest = off * off / 4 + bound * bound - errors
    return (math.sqrt(rest) - off / 2) * (1 - 2.0**-40) if rest > off * off / 4 else 0.0
