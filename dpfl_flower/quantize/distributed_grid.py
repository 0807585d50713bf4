"""The integers of distributed noise: how finely a unit is rounded, and what is enforced of it.

A unit clipped to the clip norm has S units before rounding. Stochastic rounding of the rotated
vector lengthens it; the nodes draw again until it is within S_int, the integer that they check and
the accounting charges. Sums travel modulo 2^bits.

>>> round(rounded_norm_bound(100.0, 2**20), 2)
522.26
>>> grid = DistributedGrid.within(1000, dimension=60, bits=16)
>>> grid.padded, grid.sensitivity_units, round(grid.clip_units, 1)
(64, 1000, 999.5)
"""

import math
from dataclasses import dataclass
from typing import Final

from dpfl_flower import checks
from dpfl_flower.quantize.grid import LARGEST_SENSITIVITY_UNITS
from dpfl_flower.quantize.modular import MOST_BITS
from dpfl_flower.quantize.rotation import padded_length

__all__ = ["DistributedGrid", "rounded_norm_bound"]

BETA: Final = math.exp(-0.5)
"""How often, at most, a rounded vector is drawn again (arXiv 2102.06387, Theorem 1)."""

_FEWEST_BITS: Final = 8
_LONGEST: Final = 1 << 32


def rounded_norm_bound(clip_units: float, padded: int, *, beta: float = BETA) -> float:
    """Return the norm within which conditional stochastic rounding keeps a vector of S units.

    ``min(S + sqrt d, sqrt(S^2 + d/4 + sqrt(2 ln(1/beta)) (S + sqrt(d)/2)))``: Kairouz, Liu,
    Steinke, arXiv 2102.06387, Theorem 1. Rounding moves every coordinate by less than 1, which
    is the first; the second holds with probability ``1 - beta`` at least, by Hoeffding's inequality
    for the squared errors, of mean at most 1/4 each, and for their product with the vector.
    """
    checks.positive(clip_units=clip_units)
    spread, root = _spread(beta), math.sqrt(padded)
    likely = clip_units**2 + padded / 4 + spread * (clip_units + root / 2)
    return min(clip_units + root, math.sqrt(likely))


def _spread(beta: float) -> float:
    checks.probability(beta=beta)
    return math.sqrt(2 * math.log(1 / beta))


@dataclass(frozen=True, kw_only=True)
class DistributedGrid:
    """Grid units of the clip norm and of the bound, and the modulus.

    Attributes
    ----------
    dimension : int
        Length d of one unit's vector before padding.
    clip_units : float
        S: what the clip norm measures in grid units.
    sensitivity_units : int
        S_int, at most 2^26: the L2 norm of every unit's rounded, rotated vector q, checked in
        integers.
    bits : int
        Sums travel modulo 2^bits: 8 to 62.

    Raises
    ------
    ValueError
        Naming the field, its value and its bound.
    """

    dimension: int
    clip_units: float
    sensitivity_units: int
    bits: int

    def __post_init__(self) -> None:
        checks.positive_int(
            dimension=self.dimension, sensitivity_units=self.sensitivity_units, bits=self.bits
        )
        checks.positive(clip_units=self.clip_units)
        checks.at_most(LARGEST_SENSITIVITY_UNITS, sensitivity_units=self.sensitivity_units)
        checks.at_most(self.sensitivity_units, clip_units=self.clip_units)
        checks.at_most(_LONGEST, dimension=self.dimension)
        checks.at_most(MOST_BITS, bits=self.bits)
        if self.bits < _FEWEST_BITS:
            raise ValueError(f"bits={self.bits!r} must be >= {_FEWEST_BITS}")

    @property
    def padded(self) -> int:
        """Length of what travels: the least power of two that holds the dimension."""
        return padded_length(self.dimension)

    @property
    def l1_units(self) -> int:
        """What the L2 bound says of the L1 norm: ``min(S_int sqrt(d), S_int^2)``, rounded down.

        By Cauchy and Schwarz, and because an integer is at most its square. No check of its own is
        needed: integers that keep to the L2 bound keep to this.
        """
        square = self.sensitivity_units**2
        return min(math.isqrt(self.padded * square), square)

    def unit_size(self, clip_norm: float) -> float:
        """Return the real size of one grid unit when this is the clip norm."""
        checks.positive(clip_norm=clip_norm)
        return clip_norm / self.clip_units

    @classmethod
    def within(
        cls, sensitivity_units: int, *, dimension: int, bits: int, beta: float = BETA
    ) -> "DistributedGrid":
        """Return the grid with the largest S whose rounded norm is within the bound.

        Raises
        ------
        ValueError
            Naming the argument; also where rounding alone takes all of the bound.
        """
        checks.positive_int(sensitivity_units=sensitivity_units)
        padded = padded_length(dimension)
        spread, root = _spread(beta), math.sqrt(padded)
        rest = sensitivity_units**2 - padded / 4 - spread * root / 2 + spread * spread / 4
        likely = math.sqrt(rest) - spread / 2 if rest > 0 else 0.0
        # The inverse of the bound; room for the rounding of the rotation in float64.
        clip_units = max(likely, sensitivity_units - root) * (1 - 2.0**-30)
        if clip_units <= 0:
            raise ValueError(
                f"sensitivity_units={sensitivity_units!r} must be > {root / 2:.1f}, what rounding "
                f"alone makes of {padded} coordinates: allow more bits or fewer parameters"
            )
        return cls(
            dimension=dimension,
            clip_units=clip_units,
            sensitivity_units=sensitivity_units,
            bits=bits,
        )
