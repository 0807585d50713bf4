"""A patient's features and part in the split come from that patient's row and public constants."""

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest

from apps.medical.medical.features import FEATURES, design, features
from apps.medical.medical.patients import HOSPITALS, read_patients, sample_path, sample_patients
from apps.medical.medical.split import Split

HOSTILE = {
    "age": "120",
    "sex": "Female",
    "cp": "",
    "trestbps": "300",
    "chol": "1000",
    "fbs": "",
    "restecg": "",
    "thalch": "300",
    "exang": "",
    "oldpeak": "-10",
    "num": "4",
}


def rows() -> list[dict[str, str]]:
    with sample_path().open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, patients: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(patients[0]))
        writer.writeheader()
        writer.writerows(patients)
    return path


@pytest.mark.parametrize("victim", [0, 303, 919])
def test_changing_one_patients_row_moves_that_patients_features_only(
    tmp_path: Path, victim: int
) -> None:
    before, after = rows(), rows()
    after[victim] |= HOSTILE
    x, y = design(read_patients(write(tmp_path / "before.csv", before)))
    moved_x, moved_y = design(read_patients(write(tmp_path / "after.csv", after)))
    others = np.arange(len(x)) != victim
    np.testing.assert_array_equal(moved_x[others], x[others])
    np.testing.assert_array_equal(moved_y[others], y[others])
    assert not np.array_equal(moved_x[victim], x[victim])


@pytest.mark.parametrize("victim", [0, 303, 919])
def test_removing_one_patient_moves_no_other_patient(tmp_path: Path, victim: int) -> None:
    everybody = rows()
    whole = Split.of(read_patients(write(tmp_path / "whole.csv", everybody)), seed=1)
    (gone,) = [everybody.pop(victim)["id"]]
    rest = Split.of(read_patients(write(tmp_path / "rest.csv", everybody)), seed=1)
    for part in ("training", "held_out"):
        expected = [patient for patient in getattr(whole, part) if patient.id != gone]
        assert list(getattr(rest, part)) == expected


def test_the_diagnosis_does_not_decide_who_is_held_out() -> None:
    patients = sample_patients("Cleveland")
    flipped = tuple(dataclasses.replace(p, diseased=not p.diseased) for p in patients)
    held_out = [patient.id for patient in Split.of(patients, seed=1).held_out]
    assert [patient.id for patient in Split.of(flipped, seed=1).held_out] == held_out


def test_the_split_parts_everybody_and_follows_its_seed() -> None:
    patients = sample_patients("Hungary")
    first, second = Split.of(patients, seed=1), Split.of(patients, seed=2)
    assert {*first.training, *first.held_out} == set(patients)
    assert not {*first.training} & {*first.held_out}
    assert first.held_out != second.held_out


def test_about_a_fifth_is_held_out() -> None:
    share = np.mean(
        [
            len(Split.of(sample_patients(hospital), seed=seed).held_out)
            / len(sample_patients(hospital))
            for hospital in HOSPITALS
            for seed in range(50)
        ]
    )
    assert 0.19 < share < 0.21


def test_features_are_bounded_and_named() -> None:
    x, y = design(tuple(p for hospital in HOSPITALS for p in sample_patients(hospital)))
    assert x.shape == (920, len(FEATURES))
    assert np.isfinite(x).all()
    assert np.abs(x).max() <= 3
    assert set(y) == {0, 1}


def test_what_was_not_measured_sits_in_the_middle() -> None:
    patient = dataclasses.replace(
        sample_patients("Cleveland")[0],
        chest_pain=None,
        resting_pressure=None,
        cholesterol=None,
        high_blood_sugar=None,
        resting_ecg=None,
        max_heart_rate=None,
        exercise_angina=None,
        st_depression=None,
    )
    values = dict(zip(FEATURES, features(patient), strict=True))
    assert {name for name, value in values.items() if value != 0} == {"age", "male"}


def test_a_hospital_without_patients_has_features_of_the_same_width() -> None:
    x, y = design(())
    assert x.shape == (0, len(FEATURES))
    assert y.shape == (0,)
