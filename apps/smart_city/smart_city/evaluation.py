"""What a node says of its held-out hours. NOT PRIVATE: errors and counts leave as they are."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray

from dpfl_flower.wire import read_array

from .task import AbsoluteErrors

HELD_OUT: Final = "held_out"
"""The query that asks a node for its `HeldOutAnswer`."""

SENSOR_WEEK: Final = "sensor_week"
"""Asks a node for the week to draw."""

_TOTAL: Final = "not-private.absolute-errors"
_COUNT: Final = "not-private.held-out-hours"
_PACKAGED: Final = "packaged"
_HOURS: Final = "hours"
_COUNTED: Final = "not-private.counts"
_EXPECTED: Final = "expected"


@dataclass(frozen=True)
class HeldOutAnswer:
    """One node's answer. NOT PRIVATE.

    Attributes
    ----------
    errors
        On the held-out hours of its sensors.
    packaged
        Whether they are of the packaged data set.

    Examples
    --------
    >>> answer = HeldOutAnswer(AbsoluteErrors(2.0, 8), packaged=True)
    >>> HeldOutAnswer.from_metrics(answer.to_metrics()) == answer
    True
    """

    errors: AbsoluteErrors
    packaged: bool

    def to_metrics(self) -> dict[str, int | float]:
        """Return the answer as it travels."""
        return {
            _TOTAL: self.errors.total,
            _COUNT: self.errors.count,
            _PACKAGED: int(self.packaged),
        }

    @classmethod
    def from_metrics(cls, metrics: Mapping[str, object]) -> "HeldOutAnswer":
        """Read what `to_metrics` wrote; raise ValueError if it is something else."""
        total, count = metrics.get(_TOTAL), metrics.get(_COUNT)
        if not isinstance(total, float) or not math.isfinite(total) or total < 0:
            raise ValueError(f"{_TOTAL}={total!r} must be a finite number >= 0")
        if type(count) is not int or count < 0:
            raise ValueError(f"{_COUNT}={count!r} must be a count")
        return cls(AbsoluteErrors(total, count), packaged=metrics.get(_PACKAGED) == 1)


@dataclass(frozen=True)
class SensorWeek:
    """Hours of one sensor, counted and forecast, to be drawn. NOT PRIVATE.

    Attributes
    ----------
    hours, counts, expected
        Shape ``(n,)`` each.
    """

    hours: NDArray[np.int64]
    counts: NDArray[np.float64]
    expected: NDArray[np.float64]

    def to_record(self) -> ArrayRecord:
        """Return the week as it travels."""
        parts = {_HOURS: self.hours, _COUNTED: self.counts, _EXPECTED: self.expected}
        return ArrayRecord({name: Array(values) for name, values in parts.items()})

    @classmethod
    def from_record(cls, record: ArrayRecord) -> "SensorWeek":
        """Read what `to_record` wrote; raise ValueError or KeyError if it is something else."""
        hours, counts, expected = (
            read_array(record[name]) for name in (_HOURS, _COUNTED, _EXPECTED)
        )
        if hours.dtype != np.int64 or {counts.dtype, expected.dtype} != {np.dtype(np.float64)}:
            raise ValueError("a week must be whole hours and floating counts")
        return cls(hours.astype(np.int64), counts.astype(np.float64), expected.astype(np.float64))
