"""Draws a forecast against what was counted, for one sensor and one week. NOT PRIVATE."""

from pathlib import Path

import numpy as np
from matplotlib.dates import DateFormatter, DayLocator
from matplotlib.figure import Figure
from numpy.typing import NDArray


def draw_week(
    path: Path,
    hours: NDArray[np.int64],
    counts: NDArray[np.float64],
    expected: NDArray[np.float64],
    *,
    sensor: str,
    start: int,
) -> Path:
    """Write a PNG of the 168 hours from ``start`` on; hours without a count are gaps.

    Parameters
    ----------
    path
        Of the file, which is replaced.
    hours
        The numbers of some hours, shape ``(n,)``.
    counts, expected
        What the sensor counted in each, and what was forecast, shape ``(n,)``.
    sensor
        For the title.
    start
        The number of the week's first hour.

    Raises
    ------
    ValueError
        If shapes differ, or none of ``hours`` lies in the week.
    """
    for name, values in (("counts", counts), ("expected", expected)):
        if values.shape != hours.shape:
            raise ValueError(f"{name} has shape {values.shape}, must be {hours.shape}")
    week = np.arange(start, start + 7 * 24)
    shown = np.isin(hours, week)
    if not shown.any():
        raise ValueError(f"start={start!r}: no hour of {sensor} in the week from there on")
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots()
    for values, label, style in (
        (counts, "counted (not private)", "-"),
        (expected, "forecast, one hour ahead", "--"),
    ):
        line = np.full(len(week), np.nan)
        line[hours[shown] - start] = values[shown]
        axes.plot(week.astype("datetime64[h]"), line, style, label=label, linewidth=1.2)
    axes.set_title(sensor)
    axes.set_ylabel("people an hour")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(DayLocator())  # type: ignore[no-untyped-call]
    axes.xaxis.set_major_formatter(DateFormatter("%a %d %b %Y"))  # type: ignore[no-untyped-call]
    axes.tick_params(axis="x", labelrotation=30)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120, format="png")
    return path
