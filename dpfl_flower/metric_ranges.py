"""Bounded metrics: which there are, the range of each, and where in it a value lies.

A metric that is to be noised has to be bounded, by public constants. Every unit's value becomes its
place in the range, -1 at the low end and 1 at the high end, so that all metrics weigh the same.

>>> ranges = MetricRanges.of({"accuracy": (0.0, 1.0), "loss": (0.0, 5.0)})
>>> ranges.places({"accuracy": 0.75, "loss": 9.0})  # the loss is clipped
(0.5, 1.0)
>>> ranges.values((0.5, -1.25))  # noise may carry a mean out of its range; it is clipped too
{'accuracy': 0.75, 'loss': 0.0}
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Self, final

from dpfl_flower import checks, records

__all__ = ["NO_METRICS", "MetricRanges"]


@final
@dataclass(frozen=True)
class MetricRanges:
    """Names and ranges of metrics, in the order in which a vector holds them; maybe none.

    Attributes
    ----------
    names : tuple of str
        Each once.
    lows, highs : tuples of float
        The range of each, in the metric's own units.

    Raises
    ------
    ValueError
        Naming the metric, where a range is not finite or has no width.
    """

    names: tuple[str, ...] = ()
    lows: tuple[float, ...] = ()
    highs: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not len(self.names) == len(self.lows) == len(self.highs):
            raise ValueError(
                f"names={self.names!r}, lows={self.lows!r} and highs={self.highs!r} must be of "
                "one length"
            )
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"names={self.names!r} must name no metric twice")
        for name, low, high in zip(self.names, self.lows, self.highs, strict=True):
            checks.name(metric=name)
            if name == records.NUM_EXAMPLES:
                raise ValueError(
                    f"metric {name!r} must be another: it is how much a node weighs, and no metric"
                )
            if not 0 < _width(low, high) < math.inf:
                raise ValueError(
                    f"range={(low, high)!r} of the metric {name!r} must be (low, high) with low < "
                    "high, both finite numbers"
                )

    @classmethod
    def of(cls, bounds: Mapping[str, tuple[float, float]]) -> Self:
        """Return the ranges of ``{name: (low, high)}``, in its order."""
        checks.instance(Mapping, bounds=bounds)
        for name, pair in bounds.items():
            if not (isinstance(pair, Sequence) and len(pair) == 2):
                raise ValueError(f"range={pair!r} of the metric {name!r} must be (low, high)")
        lows, highs = (tuple(pair[end] for pair in bounds.values()) for end in (0, 1))
        ranges = cls(tuple(bounds), lows, highs)
        return cls(ranges.names, tuple(map(float, lows)), tuple(map(float, highs)))

    def __len__(self) -> int:
        """How many metrics there are."""
        return len(self.names)

    def places(self, metrics: Mapping[str, object]) -> tuple[float, ...]:
        """Return where in its range each metric lies, in [-1, 1]: one unit's own numbers.

        NaN stands for a metric that is missing or is no finite number.
        """
        return tuple(
            _place(_finite(metrics.get(name)), low, high)
            for name, low, high in zip(self.names, self.lows, self.highs, strict=True)
        )

    def missing(self, places: Sequence[float]) -> tuple[str, ...]:
        """Return the names of the metrics whose place is NaN."""
        return tuple(n for n, place in zip(self.names, places, strict=True) if math.isnan(place))

    def values(self, places: Sequence[float]) -> dict[str, float]:
        """Return the metrics of these places by name, clipped to their ranges."""
        return {
            name: min(max(low + (place + 1) / 2 * (high - low), low), high)
            for name, low, high, place in zip(
                self.names, self.lows, self.highs, places, strict=True
            )
        }

    def spread(self, stddev: float) -> dict[str, float]:
        """Return by name what a standard deviation in places is in the metric's own units."""
        return {
            name: stddev * (high - low) / 2
            for name, low, high in zip(self.names, self.lows, self.highs, strict=True)
        }


NO_METRICS: Final = MetricRanges()


def _place(value: float, low: float, high: float) -> float:
    if math.isnan(value):
        return value
    return (min(max(value, low), high) - low) / (high - low) * 2 - 1


def _width(low: object, high: object) -> float:
    return _finite(high) - _finite(low)


def _finite(value: object) -> float:
    """Return a number as a float; NaN for what is none, or is not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        number = float(value)
    except OverflowError:  # an integer that no float holds
        return math.nan
    return number if math.isfinite(number) else math.nan
