"""What the model sees of a patient: numbers made of that patient's row and public constants.

No mean, range or vocabulary is taken from a hospital's patients. With those, one patient would move
every other patient's features, and the clipping of one patient's gradient would bound nothing.

>>> len(FEATURES)
15
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from .patients import ChestPain, Patient, RestingEcg

_LIMIT: Final = 3.0
"""Scaled measurements are cut off here, so that no outlier rules its gradient's direction."""

_SCALES: Final = {
    "age": (54.0, 9.0),
    "resting_pressure": (130.0, 18.0),
    "cholesterol": (230.0, 50.0),
    "max_heart_rate": (140.0, 25.0),
    "st_depression": (1.0, 1.0),
}
"""Centre and width of each measurement: round clinical figures, the same in every hospital."""

_HIGH_BLOOD_SUGAR: Final = {True: 1.0, False: 0.0, None: 0.0}
_EXERCISE_ANGINA: Final = {True: 0.6, False: -0.4, None: 0.0}

FEATURES: Final = (
    *_SCALES,
    "male",
    "high_blood_sugar",
    "exercise_angina",
    *(f"chest pain: {kind}" for kind in ChestPain),
    *(f"resting ECG: {kind}" for kind in RestingEcg),
)
"""The names of the features, in order."""


def features(patient: Patient) -> list[float]:
    """Return the patient's features; what was not measured is 0, the middle of its scale."""
    return [
        *(_scaled(getattr(patient, name), *scale) for name, scale in _SCALES.items()),
        float(patient.male) - 0.5,
        _HIGH_BLOOD_SUGAR[patient.high_blood_sugar],
        _EXERCISE_ANGINA[patient.exercise_angina],
        *(float(patient.chest_pain is kind) for kind in ChestPain),
        *(float(patient.resting_ecg is kind) for kind in RestingEcg),
    ]


def design(patients: tuple[Patient, ...]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the features, shape ``(n, 15)``, and the labels, shape ``(n,)``, in the same order."""
    x = np.array([features(patient) for patient in patients], dtype=np.float32)
    y = np.array([patient.diseased for patient in patients], dtype=np.float32)
    return x.reshape(len(patients), len(FEATURES)), y


def _scaled(value: float | None, centre: float, width: float) -> float:
    if value is None:
        return 0.0
    return min(_LIMIT, max(-_LIMIT, (value - centre) / width))
