"""A week of one sensor, drawn."""

from pathlib import Path

import numpy as np
import pytest

from apps.smart_city.smart_city.counts import hour_of
from apps.smart_city.smart_city.features import Rows, rows_of

pytest.importorskip("matplotlib")

from apps.smart_city.smart_city.figure import draw_week

START = hour_of(2024, 3, 4, 6)


@pytest.fixture
def rows() -> Rows:
    counts = np.random.default_rng(1).poisson(300, 600).astype(float)
    counts[300] = np.nan
    return rows_of(counts, START - 169)


def test_a_week_is_drawn_as_a_png(tmp_path: Path, rows: Rows) -> None:
    path = draw_week(
        tmp_path / "week.png",
        rows.hours,
        rows.counts,
        rows.counts * 1.1,
        sensor="Quay",
        start=START,
    )
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_week_without_hours_is_refused(tmp_path: Path, rows: Rows) -> None:
    with pytest.raises(ValueError, match="no hour of Quay"):
        draw_week(
            tmp_path / "week.png",
            rows.hours,
            rows.counts,
            rows.counts,
            sensor="Quay",
            start=START + 9000,
        )


def test_a_forecast_of_other_hours_is_refused(tmp_path: Path, rows: Rows) -> None:
    with pytest.raises(ValueError, match="expected has shape"):
        draw_week(
            tmp_path / "week.png",
            rows.hours,
            rows.counts,
            rows.counts[:-1],
            sensor="Quay",
            start=START,
        )
