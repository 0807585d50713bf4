"""Draws a forecast against what was counted, for one sensor and one week. NOT PRIVATE."""

from pathlib import Path

import numpy as np
from matplotlib.dates import DateFormatter, DayLocator
from matplotlib.figure import Figure
from numpy.typing import NDArray

from .features import Rows


def draw_week(
    path: Path, rows: Rows, expected: NDArray[np.float64], *, sensor: str, start: int
) -> Path:
    """Write a PNG of the 168 hours from ``start`` on; hours without a count are gaps.

    Parameters
    ----------
    path
        Of the file, which is replaced.
    rows
        Hours of one sensor, with what was counted.
    expected
        The forecast of each, shape ``(n,)``.
    sensor
        For the title.
    start
        The number of the week's first hour.

    Raises
    ------
    ValueError
        If none of ``rows`` lies in the week.
    """
    if expected.shape != rows.hours.shape:
        raise ValueError(f"expected has shape {expected.shape}, must be {rows.hours.shape}")
    hours = np.arange(start, start + 7 * 24)
    shown = np.isin(rows.hours, hours)
    if not shown.any():
        raise ValueError(f"start={start!r}: no hour of {sensor} in the week from there on")
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots()
    for values, label, style in (
        (rows.counts, "counted (not private)", "-"),
        (expected, "forecast, one hour ahead", "--"),
    ):
        line = np.full(len(hours), np.nan)
        line[rows.hours[shown] - start] = values[shown]
        axes.plot(hours.astype("datetime64[h]"), line, style, label=label, linewidth=1.2)
    axes.set_title(sensor)
    axes.set_ylabel("people an hour")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(DayLocator())  # type: ignore[no-untyped-call]
    axes.xaxis.set_major_formatter(DateFormatter("%a %d %b %Y"))  # type: ignore[no-untyped-call]
    axes.tick_params(axis="x", labelrotation=30)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120, format="png")
    return path
