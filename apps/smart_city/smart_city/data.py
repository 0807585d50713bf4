"""Cuts counts into privacy units, says which node holds which sensor, and what is held out.

A forecast looks 169 hours back, so that one day's counts are in rows of the next week: a sensor-day
is no unit. Here a unit is a sensor's fortnight, cut where the file's days are cut, and all that a
row looks back at lies inside its own fortnight. The first week serves as history only.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from dpfl_flower import checks

from .counts import FIRST_HOUR_OF_DAY, HourlyCounts, hour_of
from .features import HISTORY, Rows, rows_of

HOURS: Final = 14 * 24
"""The length of a unit."""

ROWS: Final = HOURS - HISTORY
"""The most training rows a unit can have."""

FORTNIGHTS: Final = 26
"""Of a sensor, in the year to train on."""

TRAINING_START: Final = hour_of(2023, 1, 2, FIRST_HOUR_OF_DAY)
"""A Monday; the fortnights end on 2024-01-01 at 06:00."""


@dataclass(frozen=True)
class Period:
    """Hours from ``start`` to before ``end``."""

    start: int
    end: int


TEST: Final = Period(hour_of(2024, 1, 1, FIRST_HOUR_OF_DAY), hour_of(2025, 1, 1, FIRST_HOUR_OF_DAY))
"""The year to measure with."""

CHOICE: Final = Period(TEST.end, hour_of(2026, 1, 1, FIRST_HOUR_OF_DAY))
"""The year the recipe was chosen with, so that the test had no part in it."""


@dataclass(frozen=True)
class SensorFortnight:
    """The privacy unit: what one sensor counted in one fortnight, as training rows.

    Attributes
    ----------
    sensor
        Its name.
    number
        Which fortnight, from 0.
    rows
        At most `ROWS`; none where the sensor did not count.
    """

    sensor: str
    number: int
    rows: Rows

    @property
    def key(self) -> str:
        """What the unit is called in a registry."""
        return f"{self.sensor}/{self.number}"


def units_of(counts: HourlyCounts) -> tuple[SensorFortnight, ...]:
    """Return every fortnight of every sensor, those without rows included.

    How many units there are is public: it follows from the sensors and the calendar, not from what
    was counted.
    """
    units = []
    for number in range(FORTNIGHTS):
        start = TRAINING_START + number * HOURS
        window = counts.between(start, start + HOURS)
        for column, sensor in enumerate(counts.sensors):
            units.append(SensorFortnight(sensor, number, rows_of(window[:, column], start)))
    return tuple(units)


def held_out_rows(counts: HourlyCounts, sensor: str, *, period: Period = TEST) -> Rows:
    """Return the hours of a period that one sensor can forecast.

    They look back at whatever the sensor counted before: a forecaster at work would too.
    """
    if sensor not in counts.sensors:
        raise ValueError(f"sensor={sensor!r} must be one of {list(counts.sensors)}")
    start = period.start - HISTORY
    window = counts.between(start, period.end)
    return rows_of(window[:, counts.sensors.index(sensor)], start)


def of_node(sensors: Iterable[str], *, partition: int, num_partitions: int) -> tuple[str, ...]:
    """Return the sensors that one of ``num_partitions`` nodes holds, with all their fortnights.

    Raises
    ------
    ValueError
        Unless ``0 <= partition < num_partitions``.
    """
    checks.positive_int(num_partitions=num_partitions)
    checks.non_negative_int(partition=partition)
    checks.at_most(num_partitions - 1, partition=partition)
    return tuple(sensors)[partition::num_partitions]
