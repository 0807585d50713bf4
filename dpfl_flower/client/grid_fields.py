"""An integer grid as fields of a record, and fields read without trusting who wrote them.

>>> grid = IntegerGrid.for_noise_multiplier(1.0, 1000)
>>> grid_from_fields(grid_to_fields(grid)) == grid
True
"""

from collections.abc import Mapping
from typing import Final

from dpfl_flower.clipping import Norm
from dpfl_flower.quantize import IntegerGrid, Rounding

__all__ = ["GRID_FIELDS", "grid_from_fields", "grid_to_fields", "integer", "number", "text"]

_DIMENSION: Final = "dimension"
_NOISE_UNITS: Final = "noise-units"
_CLIP_UNITS: Final = "clip-units"
_SENSITIVITY_UNITS: Final = "sensitivity-units"
_INDICATOR_UNITS: Final = "indicator-units"
_NORM: Final = "norm"
_ROUNDING: Final = "rounding"

GRID_FIELDS: Final = frozenset(
    {
        _DIMENSION,
        _NOISE_UNITS,
        _CLIP_UNITS,
        _SENSITIVITY_UNITS,
        _INDICATOR_UNITS,
        _NORM,
        _ROUNDING,
    }
)


def grid_to_fields(grid: IntegerGrid) -> dict[str, int | float | str]:
    """Return the grid as numbers and text."""
    return {
        _DIMENSION: grid.dimension,
        _NOISE_UNITS: grid.noise_units,
        _CLIP_UNITS: float(grid.clip_units),
        _SENSITIVITY_UNITS: grid.sensitivity_units,
        _INDICATOR_UNITS: grid.indicator_units,
        _NORM: str(grid.norm),
        _ROUNDING: str(grid.rounding),
    }


def grid_from_fields(record: Mapping[str, object]) -> IntegerGrid:
    """Read a grid among other fields and check all of it.

    Raises
    ------
    ValueError
        When a field is missing, of another type or out of range.
    """
    return IntegerGrid(
        dimension=integer(record, _DIMENSION),
        noise_units=integer(record, _NOISE_UNITS),
        clip_units=number(record, _CLIP_UNITS),
        sensitivity_units=integer(record, _SENSITIVITY_UNITS),
        indicator_units=integer(record, _INDICATOR_UNITS),
        norm=Norm(text(record, _NORM)),
        rounding=Rounding(text(record, _ROUNDING)),
    )


def integer(record: Mapping[str, object], key: str) -> int:
    """Return an integer field; ValueError if it is none."""
    value = record.get(key)
    if type(value) is not int:
        raise ValueError(f"{key}={value!r} must be an integer")
    return value


def number(record: Mapping[str, object], key: str) -> float:
    """Return a number; ValueError if it is none."""
    value = record.get(key)
    if type(value) is not float and type(value) is not int:
        raise ValueError(f"{key}={value!r} must be a number")
    return float(value)


def text(record: Mapping[str, object], key: str) -> str:
    """Return a text field; ValueError if it is none."""
    value = record.get(key)
    if type(value) is not str:
        raise ValueError(f"{key}={value!r} must be text")
    return value
