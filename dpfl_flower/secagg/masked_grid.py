"""The integer grid of a sum that travels under masks: half as fine where that saves bytes.

A sum of n vectors with entries within S takes ``log2(2 n S)`` bits an entry, and a word holds two
or three of these: for some n one bit less makes the difference. Half the units cost next to
nothing: the noise has 8,192 of them instead of 16,384, and rounding errs by half of one. That
lengthens vectors, by more the longer they are; past some millions of entries the usual grid stays.

>>> def grid(least):
...     return IntegerGrid.for_noise_multiplier(1.0, 1_000_000, least_noise_units=least)
>>> [masked_grid(grid, parties=n).noise_units for n in (20, 63, 64, 100, 127, 500)]
[16384, 16384, 8192, 8192, 8192, 16384]
"""

from collections.abc import Callable
from typing import Final

from dpfl_flower.quantize import USUAL_NOISE_UNITS, IntegerGrid, Rounding
from dpfl_flower.secagg.lanes import encoding_without_wrap

__all__ = ["IntegerGrid", "masked_grid"]

_MOST_INFLATION: Final = 1.002
"""How much longer than the clip norm the bound may be for a coarser grid's sake."""

_MOST_UNITS_TO_NEAREST: Final = 128


def masked_grid(
    at_least: Callable[[int], IntegerGrid], *, parties: int, units: int = 1
) -> IntegerGrid:
    """Return the usual grid, or one half as fine where a masked vector then takes fewer bytes.

    Parameters
    ----------
    at_least : callable
        Returns the grid, given the least standard deviation of the noise in grid units: a finer one
        where rounding would otherwise lengthen vectors by too much.
    parties : int
        The most vectors in a sum.
    units : int
        The most units in a vector.

    Raises
    ------
    ValueError
        If such a sum could wrap around mod 2^64.
    """
    usual, half = at_least(USUAL_NOISE_UNITS), at_least(USUAL_NOISE_UNITS // 2)

    def packed_bytes(grid: IntegerGrid) -> int:
        encoding = encoding_without_wrap(grid.largest_entry * units, parties, grid.width)
        return encoding.packed_bytes(grid.width)

    costs_little = half.sensitivity_units <= _MOST_INFLATION * half.clip_units
    if half.rounding is Rounding.NEAREST and parties * units > _MOST_UNITS_TO_NEAREST:
        return usual  # what all units lose to rounding alike would come to 0.8 % of the noise
    return half if costs_little and packed_bytes(half) < packed_bytes(usual) else usual
