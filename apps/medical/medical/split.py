"""Which patients are held out of training to measure the model: a public rule, patient by patient.

Whether a patient is held out depends on the patient's id and a public seed, on nobody else and on
no diagnosis: adding or removing one patient leaves all the others where they were.
"""

import hashlib
from dataclasses import dataclass
from typing import Final

from .patients import Patient

HELD_OUT: Final = 0.2
"""The share of patients that is held out, on average."""


@dataclass(frozen=True)
class Split:
    """A hospital's patients, those to train on and those held out."""

    training: tuple[Patient, ...]
    held_out: tuple[Patient, ...]

    @classmethod
    def of(cls, patients: tuple[Patient, ...], *, seed: int) -> "Split":
        """Split ``patients`` by the public ``seed``."""
        chosen = [is_held_out(patient.id, seed=seed) for patient in patients]
        pairs = list(zip(patients, chosen, strict=True))
        return cls(
            training=tuple(patient for patient, out in pairs if not out),
            held_out=tuple(patient for patient, out in pairs if out),
        )


def is_held_out(patient_id: str, *, seed: int) -> bool:
    """Return whether the patient is held out.

    >>> [is_held_out(str(number), seed=1) for number in range(1, 6)]
    [False, False, False, False, False]
    """
    digest = hashlib.sha256(f"{seed}:{patient_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT * 2**64
