"""Reads hourly counts of pedestrians from a CSV file with the columns of the Auckland data.

The file's days run from 06:00 to 05:59: its hours 0 to 5 carry the date of the day before, and
belong to the next. An hour that is not in the file is missing, and so is one that is in it twice,
because nobody knows which is true. Nothing is filled in: a mean over other days or other sensors
would carry one unit's counts into another's.

A file that cannot be read as it should raises a ValueError that names the column and the line. The
message may quote the cell: it is for the node's own log and must not leave the node.
"""

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

FILE: Final = "hourly_counts.csv"
FIRST_HOUR_OF_DAY: Final = 6
"""Where the file's days are cut, and therefore where units must be."""

_NOT_SENSORS: Final = ("date", "hour", "year")
_EPOCH: Final = date(1970, 1, 1)
_YEARS: Final = (1990, 2100)
_LARGEST_COUNT: Final = 1_000_000.0


def hour_of(year: int, month: int, day: int, hour: int) -> int:
    """Return the number of a local hour, counted from 1970-01-01 00:00.

    >>> hour_of(1970, 1, 2, 6)
    30
    """
    return (date(year, month, day) - _EPOCH).days * 24 + hour


@dataclass(frozen=True)
class HourlyCounts:
    """Counts of some sensors over consecutive hours.

    Attributes
    ----------
    first_hour
        The number of the first hour, as of `hour_of`.
    sensors
        Their names, in the order of the file's columns.
    counts
        People counted, shape ``(hours, sensors)``; NaN where missing.
    """

    first_hour: int
    sensors: tuple[str, ...]
    counts: NDArray[np.float64]

    def between(self, start: int, end: int) -> NDArray[np.float64]:
        """Return the counts from hour ``start`` to before ``end``; NaN outside the file."""
        window = np.full((end - start, len(self.sensors)), np.nan)
        low = max(start, self.first_hour)
        high = min(end, self.first_hour + len(self.counts))
        if low < high:
            window[low - start : high - start] = self.counts[
                low - self.first_hour : high - self.first_hour
            ]
        return window


def read_counts(path: Path) -> HourlyCounts:
    """Return the counts of a CSV file.

    Raises
    ------
    ValueError
        Naming the column and the line (the header is line 1): a column is missing or comes twice, a
        cell is no date, hour or count, a line has too few or too many cells, the file is empty or
        not UTF-8.
    OSError
        The file cannot be opened.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = _decoded(path, csv.reader(file, strict=True))
        header = [name.strip() for name in next(lines, [])]
        for name in ("date", "hour", *header):
            if (times := header.count(name)) != 1:
                fault = "is missing" if times == 0 else f"comes {times} times"
                raise ValueError(f"{path}: column {name!r}, line 1: {fault}")
        sensors = tuple(name for name in header if name not in _NOT_SENSORS)
        if not sensors:
            raise ValueError(f"{path}: line 1 names no sensor")
        columns = [header.index(name) for name in sensors]
        date_at, hour_at = header.index("date"), header.index("hour")
        hours, rows = [], []
        for number, cells in enumerate(lines, start=2):
            if not cells:
                continue  # a blank line
            where = _Line(path, number)
            if len(cells) != len(header):
                raise ValueError(
                    f"{path}: line {number}: {len(cells)} cells, "
                    f"but line 1 names {len(header)} columns"
                )
            hours.append(where.hour(cells[date_at], cells[hour_at]))
            rows.append([where.count(header[at], cells[at]) for at in columns])
    if not rows:
        raise ValueError(f"{path}: no hours")
    return _in_order(sensors, np.array(hours), np.array(rows))


def _in_order(
    sensors: tuple[str, ...], hours: NDArray[np.int64], rows: NDArray[np.float64]
) -> HourlyCounts:
    first = int(hours.min())
    places = hours - first
    counts = np.full((int(places.max()) + 1, len(sensors)), np.nan)
    counts[places] = rows
    counts[np.bincount(places) > 1] = np.nan
    return HourlyCounts(first, sensors, counts)


@dataclass(frozen=True)
class _Line:
    """Reads cells of one line, and says where what is wrong with them."""

    path: Path
    number: int

    def wrong(self, column: str, why: str) -> ValueError:
        return ValueError(f"{self.path}: column {column!r}, line {self.number}: {why}")

    def hour(self, day_cell: str, hour_cell: str) -> int:
        try:
            day = date.fromisoformat(day_cell.strip())
        except ValueError:
            raise self.wrong("date", f"{day_cell!r} is not a date like 2023-12-31") from None
        if not _YEARS[0] <= day.year <= _YEARS[1]:
            raise self.wrong("date", f"{day_cell!r} must be from {_YEARS[0]} to {_YEARS[1]}")
        text = hour_cell.partition(":")[0].strip()
        if not (text.isascii() and text.isdigit() and int(text) < 24):
            raise self.wrong("hour", f"{hour_cell!r} is not an hour like 6:00-6:59")
        hour = int(text)
        following = 24 if hour < FIRST_HOUR_OF_DAY else 0
        return hour_of(day.year, day.month, day.day, hour) + following

    def count(self, column: str, cell: str) -> float:
        if not cell.strip():
            return math.nan
        try:
            value = float(cell)
        except ValueError:
            raise self.wrong(column, f"{cell!r} is not a count") from None
        if not 0 <= value <= _LARGEST_COUNT:
            raise self.wrong(column, f"{cell!r} must lie between 0 and {_LARGEST_COUNT:g}")
        return value


def _decoded(path: Path, lines: Iterator[list[str]]) -> Iterator[list[str]]:
    """Yield ``lines``; say which file it was where they cannot be decoded."""
    try:
        yield from lines
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a UTF-8 CSV file ({error})") from error
