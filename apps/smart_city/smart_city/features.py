"""What the model sees of an hour: the counts before it, the clock and the calendar.

Everything is made of one sensor's counts in one window and of public constants. Rows of a window
never reach outside it: whoever cuts the window decides what a row can depend on.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

LAGS: Final = (1, 2, 3, 23, 24, 25, 48, 144, 167, 168, 169)
"""How many hours back the counts lie that a forecast is made of."""

HISTORY: Final = max(LAGS)
"""The hours at the start of a window that serve as history only."""

_CARRIED_OVER: Final = 2 / 3
_CENTRE: Final = 4.5
_WIDTH: Final = 2.0
_DAYS_FROM_MONDAY: Final = 3  # 1970-01-01 was a Thursday
_HARMONICS: Final = {24: (1, 2, 3), 168: (1, 2)}

FEATURES: Final = (
    "naive forecast",
    *(f"count {lag} h before, to the naive forecast" for lag in LAGS[1:]),
    *(
        f"{wave} of {number} turns in {period} h"
        for period, numbers in _HARMONICS.items()
        for number in numbers
        for wave in ("sine", "cosine")
    ),
    "weekend",
)
"""The names of the features, in order."""


@dataclass(frozen=True)
class Rows:
    """Hours to forecast, with what is known before each.

    Attributes
    ----------
    features
        Shape ``(n, 22)``.
    naive
        The naive forecast of the logarithm, shape ``(n,)``.
    counts
        What was counted, shape ``(n,)``.
    hours
        The number of each hour, shape ``(n,)``.
    """

    features: NDArray[np.float32]
    naive: NDArray[np.float64]
    counts: NDArray[np.float64]
    hours: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.hours)


def rows_of(counts: NDArray[np.float64], first_hour: int) -> Rows:
    """Return the hours of one sensor's window whose count and history are all there.

    Parameters
    ----------
    counts
        Consecutive hours from ``first_hour`` on, NaN where missing, shape ``(hours,)``.
    first_hour
        The number of the first hour since 1970-01-01 00:00.
    """
    logs = np.log1p(counts)
    at = np.arange(HISTORY, max(HISTORY, len(logs)))
    lagged = {lag: logs[at - lag] for lag in LAGS}
    there = np.isfinite(logs[at]) & np.isfinite(list(lagged.values())).all(axis=0)
    at = at[there]
    lagged = {lag: values[there] for lag, values in lagged.items()}
    naive = naive_forecast(lagged)
    hours = first_hour + at
    table = np.column_stack(
        [
            (naive - _CENTRE) / _WIDTH,
            *(lagged[lag] - naive for lag in LAGS[1:]),
            _calendar(hours),
        ]
    )
    return Rows(features=table.astype(np.float32), naive=naive, counts=counts[at], hours=hours)


def naive_forecast(lagged: dict[int, NDArray[np.float64]]) -> NDArray[np.float64]:
    """Return a forecast that needs no training, from logarithms of counts by lag.

    The same hour of yesterday and of last week, each with two thirds of the surprise that the last
    hour was against it, averaged.
    """
    yesterday = lagged[24] + _CARRIED_OVER * (lagged[1] - lagged[25])
    last_week = lagged[168] + _CARRIED_OVER * (lagged[1] - lagged[169])
    return (yesterday + last_week) / 2


def _calendar(hours: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return where each hour stands in the day and the week, shape ``(n, 11)``."""
    days = (hours // 24 + _DAYS_FROM_MONDAY) % 7
    in_week = days * 24 + hours % 24
    waves = [
        wave(2 * np.pi * number * in_week / period)
        for period, numbers in _HARMONICS.items()
        for number in numbers
        for wave in (np.sin, np.cos)
    ]
    return np.column_stack([*waves, days >= 5])
