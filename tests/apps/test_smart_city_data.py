"""Reading counts, and cutting them so that one raw day is in one unit's rows only."""

from collections.abc import Callable, Mapping, Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apps.smart_city.smart_city.counts import FILE, HourlyCounts, hour_of, read_counts
from apps.smart_city.smart_city.data import (
    CHOICE,
    FORTNIGHTS,
    HOURS,
    ROWS,
    TEST,
    TRAINING_START,
    SensorFortnight,
    held_out_rows,
    of_node,
    units_of,
)
from apps.smart_city.smart_city.features import FEATURES, HISTORY, rows_of
from dpfl_flower.datasets import fetch

Days = dict[date, list[list[str]]]
SENSORS = ("Quay", "Hill")
FIRST_DAY = date(2023, 1, 2)
DAYS = 6 * 7  # three fortnights
FILE_HOURS = (*range(6, 24), *range(6))


@pytest.fixture(scope="module")
def auckland() -> HourlyCounts:
    return read_counts(fetch("akl-pedestrians") / FILE)


@pytest.fixture(scope="module")
def units(auckland: HourlyCounts) -> tuple[SensorFortnight, ...]:
    return units_of(auckland)


def invented() -> Days:
    """Two sensors over three fortnights, as the file has them: lines by the date they carry."""
    random = np.random.default_rng(7)
    return {
        day: [
            [
                day.isoformat(),
                f"{hour}:00-{hour}:59",
                str(day.year),
                *random.poisson(90, 2).astype(str),
            ]
            for hour in FILE_HOURS
        ]
        for day in (FIRST_DAY + timedelta(days=number) for number in range(DAYS))
    }


Write = Callable[[Days], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(days: Days, sensors: Sequence[str] = SENSORS) -> Path:
        lines = [
            ["date", "hour", "year", *sensors],
            *(row for rows in days.values() for row in rows),
        ]
        path = tmp_path / "counts.csv"
        path.write_text("\n".join(",".join(line) for line in lines) + "\n")
        return path

    return write


def contents(units: Sequence[SensorFortnight]) -> Mapping[str, tuple[bytes, ...]]:
    """Everything that training sees of each unit."""
    return {
        unit.key: tuple(
            getattr(unit.rows, name).tobytes() for name in ("features", "naive", "counts", "hours")
        )
        for unit in units
    }


def moved(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    assert before.keys() == after.keys()
    return [key for key in before if before[key] != after[key]]


def test_auckland_counts_21_sensors_over_seven_years(auckland: HourlyCounts) -> None:
    assert len(auckland.sensors) == 21
    assert auckland.counts.shape == (61_368, 21)
    assert auckland.first_hour == hour_of(2019, 1, 1, 6)
    assert np.nanmin(auckland.counts) == 0


def test_hours_that_are_missing_or_in_the_file_twice_are_missing(auckland: HourlyCounts) -> None:
    missing = [(2024, 9, 29, 2), (2024, 9, 29, 6), (2025, 1, 6, 6)]
    missing += [(2025, 1, 2, hour) for hour in (3, 4, 5, 6)]
    twice = [(2024, 9, 28, 6), (2025, 1, 3, 3), (2025, 1, 4, 4), (2025, 1, 5, 5), (2025, 1, 5, 6)]
    since_2024 = hour_of(2024, 1, 1, 0) - auckland.first_hour
    nowhere = np.isnan(auckland.counts[since_2024:]).all(axis=1)
    found = set(np.flatnonzero(nowhere) + since_2024 + auckland.first_hour)
    expected = {hour_of(*when) for when in missing + twice}
    assert expected <= found
    # One more hour of 2025 is in the file, with empty cells.
    assert len(found - expected) == 1


def test_the_two_sensors_at_188_quay_street_start_during_2022(auckland: HourlyCounts) -> None:
    start_of_2022 = hour_of(2022, 1, 1, 0) - auckland.first_hour
    end_of_2022 = hour_of(2023, 1, 1, 0) - auckland.first_hour
    for sensor in ("188 Quay Street Lower Albert (EW)", "188 Quay Street Lower Albert (NS)"):
        there = np.isfinite(auckland.counts[:, auckland.sensors.index(sensor)])
        assert not there[:start_of_2022].any()
        assert there[end_of_2022 : end_of_2022 + 8000].mean() > 0.99


def test_hours_0_to_5_belong_to_the_day_after_their_date(write: Write) -> None:
    days = invented()
    counts = read_counts(write(days))
    assert counts.first_hour == hour_of(2023, 1, 2, 6)
    assert len(counts.counts) == DAYS * 24
    expected = [[float(cell) for cell in row[3:]] for rows in days.values() for row in rows]
    np.testing.assert_array_equal(counts.counts, expected)  # the file's own order is that of time
    assert hour_of(2023, 1, 3, 0) - counts.first_hour == FILE_HOURS.index(0)


def test_the_year_has_546_units_and_90910_rows(units: tuple[SensorFortnight, ...]) -> None:
    assert len(units) == 21 * FORTNIGHTS == 546
    assert len({unit.key for unit in units}) == 546
    assert sum(len(unit.rows) for unit in units) == 90_910
    assert max(len(unit.rows) for unit in units) == ROWS == 167
    # A sensor that counted nothing is a unit all the same: how many there are is public.
    assert [unit.key for unit in units if not len(unit.rows)] == ["150 K Road/21"]


def test_units_are_cut_on_mondays_at_six_and_end_before_the_test(
    units: tuple[SensorFortnight, ...],
) -> None:
    assert hour_of(2023, 1, 2, 6) == TRAINING_START
    assert date(2023, 1, 2).weekday() == 0
    assert TRAINING_START + FORTNIGHTS * HOURS == TEST.start == hour_of(2024, 1, 1, 6)
    assert TEST.end == CHOICE.start
    for unit in units:
        start = TRAINING_START + unit.number * HOURS
        assert ((start + HISTORY <= unit.rows.hours) & (unit.rows.hours < start + HOURS)).all()


@pytest.mark.parametrize("column", [0, 1])
def test_changing_one_raw_day_moves_the_rows_of_one_unit_only(write: Write, column: int) -> None:
    before = contents(units_of(read_counts(write(invented()))))
    for number in range(DAYS):
        days = invented()
        for row in days[FIRST_DAY + timedelta(days=number)]:
            row[3 + column] = str(int(row[3 + column]) + 1000)
        after = contents(units_of(read_counts(write(days))))
        assert moved(before, after) == [f"{SENSORS[column]}/{number // 14}"], number


def test_removing_one_raw_day_moves_the_rows_of_its_fortnight_only(write: Write) -> None:
    before = contents(units_of(read_counts(write(invented()))))
    for number in range(0, DAYS, 5):
        days = invented()
        del days[FIRST_DAY + timedelta(days=number)]
        after = contents(units_of(read_counts(write(days))))
        assert moved(before, after) == [f"{sensor}/{number // 14}" for sensor in SENSORS], number


def test_changing_one_raw_day_of_auckland_moves_the_rows_of_one_unit_only(
    auckland: HourlyCounts, units: tuple[SensorFortnight, ...]
) -> None:
    before = contents(units)
    for day, fortnight in ((date(2023, 5, 21), 9), (date(2023, 5, 22), 10)):
        start = hour_of(day.year, day.month, day.day, 6) - auckland.first_hour
        counts = auckland.counts.copy()
        counts[start : start + 24, 3] = 0
        changed = HourlyCounts(auckland.first_hour, auckland.sensors, counts)
        assert moved(before, contents(units_of(changed))) == [f"183 K Road/{fortnight}"]


def test_a_sensor_that_is_not_there_moves_no_other_sensors_rows(write: Write) -> None:
    both = contents(units_of(read_counts(write(invented()))))
    alone = {day: [row[:4] for row in rows] for day, rows in invented().items()}
    path = write(alone)
    path.write_text(path.read_text().replace(",Hill", "", 1))
    found = contents(units_of(read_counts(path)))
    assert found == {key: value for key, value in both.items() if key.startswith("Quay/")}


def test_a_row_is_made_of_its_lags_and_the_calendar() -> None:
    random = np.random.default_rng(1)
    counts = random.poisson(50, 400).astype(float)
    first = hour_of(2023, 3, 3, 6)  # a Friday
    rows = rows_of(counts, first)
    assert len(rows) == 400 - HISTORY
    row = 40
    hour = HISTORY + row
    back = {
        lag: np.log(1 + counts[hour - lag]) for lag in (1, 2, 3, 23, 24, 25, 48, 144, 167, 168, 169)
    }
    naive = 0.5 * (back[24] + 2 / 3 * (back[1] - back[25]))
    naive += 0.5 * (back[168] + 2 / 3 * (back[1] - back[169]))
    assert rows.naive[row] == pytest.approx(naive)
    assert rows.counts[row] == counts[hour]
    assert rows.hours[row] == first + hour
    values = dict(zip(FEATURES, rows.features[row], strict=True))
    assert len(values) == 22
    assert values["naive forecast"] == pytest.approx((naive - 4.5) / 2, abs=1e-6)
    assert values["count 48 h before, to the naive forecast"] == pytest.approx(
        back[48] - naive, abs=1e-6
    )
    since_monday = 4 * 24 + 6 + hour
    day, week = 2 * np.pi * since_monday / 24, 2 * np.pi * since_monday / 168
    assert values["sine of 3 turns in 24 h"] == pytest.approx(np.sin(3 * day), abs=1e-6)
    assert values["cosine of 2 turns in 168 h"] == pytest.approx(np.cos(2 * week), abs=1e-6)
    assert values["weekend"] == float(since_monday // 24 % 7 >= 5)


def test_what_is_missing_is_left_out_and_never_filled_in() -> None:
    counts = np.full(500, 10.0)
    counts[250] = np.nan
    rows = rows_of(counts, 0)
    lags = (0, 1, 2, 3, 23, 24, 25, 48, 144, 167, 168, 169)
    expected = set(range(HISTORY, 500)) - {250 + lag for lag in lags}
    assert set(rows.hours) == expected
    assert np.isfinite(rows.features).all()


@pytest.mark.parametrize("length", [0, 1, HISTORY, HISTORY + 1])
def test_a_window_without_enough_history_has_no_rows(length: int) -> None:
    rows = rows_of(np.full(length, 10.0), 0)
    assert len(rows) == max(0, length - HISTORY)
    assert rows.features.shape == (len(rows), 22)


def test_the_test_year_can_be_forecast_from_its_first_hour(auckland: HourlyCounts) -> None:
    parts = [held_out_rows(auckland, sensor) for sensor in auckland.sensors]
    assert sum(map(len, parts)) == 183_813
    assert min(int(part.hours[0]) for part in parts) == TEST.start
    assert max(int(part.hours[-1]) for part in parts) == TEST.end - 1


def test_outside_the_file_everything_is_missing(write: Write) -> None:
    counts = read_counts(write(invented()))
    window = counts.between(counts.first_hour - 2, counts.first_hour + 2)
    assert np.isnan(window[:2]).all()
    np.testing.assert_array_equal(window[2:], counts.counts[:2])
    assert np.isnan(counts.between(0, 24)).all()
    assert len(held_out_rows(counts, "Quay")) == 0


def test_an_unknown_sensor_is_refused(write: Write) -> None:
    with pytest.raises(ValueError, match="sensor='Vale' must be one of"):
        held_out_rows(read_counts(write(invented())), "Vale")


@pytest.mark.parametrize("num_partitions", [1, 3, 21, 30])
def test_every_sensor_is_on_one_node(auckland: HourlyCounts, num_partitions: int) -> None:
    nodes = [
        of_node(auckland.sensors, partition=partition, num_partitions=num_partitions)
        for partition in range(num_partitions)
    ]
    assert sorted(sensor for node in nodes for sensor in node) == sorted(auckland.sensors)
    assert max(map(len, nodes)) - min(map(len, nodes)) <= 1


@pytest.mark.parametrize(("partition", "num_partitions"), [(2, 2), (-1, 2), (0, 0)])
def test_a_node_that_there_is_not_is_refused(partition: int, num_partitions: int) -> None:
    with pytest.raises(ValueError, match="partition"):
        of_node(SENSORS, partition=partition, num_partitions=num_partitions)


@pytest.mark.parametrize(
    ("line", "column", "why"),
    [
        ("2023-02-30,6:00-6:59,2023,1,2", "date", "'2023-02-30' is not a date"),
        ("1023-02-20,6:00-6:59,2023,1,2", "date", "must be from 1990 to 2100"),
        ("2023-02-20,24:00-24:59,2023,1,2", "hour", "is not an hour"),
        ("2023-02-20,,2023,1,2", "hour", "'' is not an hour"),
        ("2023-02-20,6:00-6:59,2023,many,2", "Quay", "'many' is not a count"),
        ("2023-02-20,6:00-6:59,2023,1,-2", "Hill", "'-2' must lie between 0 and"),
        ("2023-02-20,6:00-6:59,2023,1,inf", "Hill", "'inf' must lie between 0 and"),
        ("2023-02-20,6:00-6:59,2023,1,nan", "Hill", "'nan' must lie between 0 and"),
    ],
)
def test_a_bad_cell_is_named_by_column_and_line(
    tmp_path: Path, line: str, column: str, why: str
) -> None:
    path = tmp_path / "counts.csv"
    path.write_text(f"date,hour,year,Quay,Hill\n2023-02-19,6:00-6:59,2023,1,\n{line}\n")
    with pytest.raises(ValueError, match=rf"counts\.csv: column '{column}', line 3: .*{why}"):
        read_counts(path)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "column 'date', line 1: is missing"),
        ("date,year,Quay\n", "column 'hour', line 1: is missing"),
        ("date,hour,Quay,Quay\n", "column 'Quay', line 1: comes 2 times"),
        ("date,hour,year\n", "line 1 names no sensor"),
        ("date,hour,Quay\n", "no hours"),
        ("date,hour,Quay\n2023-01-01,6:00-6:59\n", "line 2: 2 cells, but line 1 names 3 columns"),
    ],
)
def test_a_file_that_is_none_is_named(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "counts.csv").write_text(text)
    with pytest.raises(ValueError, match=rf"counts\.csv: {why}"):
        read_counts(tmp_path / "counts.csv")


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "counts.csv").write_bytes(b"date,hour,Quay\n\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"counts\.csv: not a UTF-8 CSV file"):
        read_counts(tmp_path / "counts.csv")


def test_an_empty_cell_and_a_blank_line_are_no_error(tmp_path: Path) -> None:
    path = tmp_path / "counts.csv"
    path.write_text("date,hour,Quay\n2023-01-01,6:00-6:59,\n\n2023-01-01,7:00-7:59,5.0\n")
    counts = read_counts(path)
    assert np.isnan(counts.counts[0, 0])
    assert counts.counts[1, 0] == 5
