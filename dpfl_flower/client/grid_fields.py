"""An integer grid, and what rides on it, as fields of a record; read without trusting anybody.

>>> grid = IntegerGrid.for_noise_multiplier(1.0, 1000)
>>> grid_from_fields(grid_to_fields(grid)) == grid
True
"""

from collections.abc import Mapping
from typing import Any, Final

from dpfl_flower.clipping import Norm
from dpfl_flower.metric_ranges import NO_METRICS, MetricRanges
from dpfl_flower.quantize import IntegerGrid, Rounding

__all__ = [
    "GRID_FIELDS",
    "METRIC_FIELDS",
    "grid_from_fields",
    "grid_to_fields",
    "integer",
    "number",
    "ranges_from_fields",
    "ranges_to_fields",
    "text",
]

_DIMENSION: Final = "dimension"
_NOISE_UNITS: Final = "noise-units"
_CLIP_UNITS: Final = "clip-units"
_SENSITIVITY_UNITS: Final = "sensitivity-units"
_INDICATOR_UNITS: Final = "indicator-units"
_NORM: Final = "norm"
_ROUNDING: Final = "rounding"
_NUM_METRICS: Final = "num-metrics"
_METRIC_UNITS: Final = "metric-units"
_METRIC_NAMES: Final = "metric-names"
_METRIC_LOWS: Final = "metric-lows"
_METRIC_HIGHS: Final = "metric-highs"

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

METRIC_FIELDS: Final = frozenset(
    {_NUM_METRICS, _METRIC_UNITS, _METRIC_NAMES, _METRIC_LOWS, _METRIC_HIGHS}
)
"""Fields that are there only where bounded metrics ride behind the update."""


def grid_to_fields(grid: IntegerGrid) -> dict[str, int | float | str]:
    """Return the grid as numbers and text."""
    metrics = {_NUM_METRICS: grid.num_metrics, _METRIC_UNITS: grid.metric_units}
    return {
        _DIMENSION: grid.dimension,
        _NOISE_UNITS: grid.noise_units,
        _CLIP_UNITS: float(grid.clip_units),
        _SENSITIVITY_UNITS: grid.sensitivity_units,
        _INDICATOR_UNITS: grid.indicator_units,
        _NORM: str(grid.norm),
        _ROUNDING: str(grid.rounding),
        **(metrics if grid.num_metrics else {}),
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
        num_metrics=integer(record, _NUM_METRICS) if _NUM_METRICS in record else 0,
        metric_units=integer(record, _METRIC_UNITS) if _METRIC_UNITS in record else 0,
    )


def ranges_to_fields(ranges: MetricRanges) -> dict[str, list[str] | list[float]]:
    """Return names and ranges as lists; nothing where there are none."""
    if not ranges:
        return {}
    return {
        _METRIC_NAMES: list(ranges.names),
        _METRIC_LOWS: list(ranges.lows),
        _METRIC_HIGHS: list(ranges.highs),
    }


def ranges_from_fields(record: Mapping[str, object]) -> MetricRanges:
    """Read names and ranges of metrics; none where all three fields are missing.

    Raises
    ------
    ValueError
        When a field is no list, or the ranges are none.
    """
    fields = (_METRIC_NAMES, _METRIC_LOWS, _METRIC_HIGHS)
    if not any(key in record for key in fields):
        return NO_METRICS
    return MetricRanges(*(tuple(_listed(record, key)) for key in fields))


def _listed(record: Mapping[str, object], key: str) -> list[Any]:
    value = record.get(key)
    if type(value) is not list:
        raise ValueError(f"{key}={value!r} must be a list")
    return value


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
