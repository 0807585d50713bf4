"""The last word of a run: what the model is worth, and what every patient has paid for it."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from dpfl_flower.accounting.statement import noise_caveat, rounded_up

RESULT: Final = "result.json"
"""The file in the run directory that holds the report."""

_NO_AUC: Final = "n/a"


@dataclass(frozen=True)
class HospitalReport:
    """One hospital's part.

    Attributes
    ----------
    dataset
        The name of its data set.
    epsilon
        What its patients have spent, at ``delta``, as the hospital claims.
    durable
        Whether that counts all runs in the hospital's ledger file, or this run only.
    not_private_auc, not_private_reference_auc
        On its held-out patients, by the private model and by one trained without
        privacy. None where the hospital did not answer or holds out one class only.
    cryptographic
        False where the hospital says that some of its noise was not.
    """

    dataset: str
    epsilon: float
    delta: float
    durable: bool
    not_private_auc: float | None
    not_private_reference_auc: float | None
    cryptographic: bool = True

    @property
    def covers(self) -> str:
        """What ``epsilon`` is of, and what is to be said beside it."""
        scope = "all runs in its ledger" if self.durable else "this run only"
        return f"{scope}{noise_caveat(cryptographic=self.cryptographic)}"


@dataclass(frozen=True)
class Report:
    """The whole run.

    Attributes
    ----------
    hospitals
        Those that trained, by name.
    expected_hospitals
        Those that were to train.
    worst_epsilon
        The largest of the hospitals' epsilons: for a patient seen in one of them.
    epsilon_everywhere
        The composition: for a patient seen in every one of them.
    not_private_auc, not_private_reference_auc
        On the held-out patients of all hospitals together.
    """

    run_id: int
    rounds: int
    split_seed: int
    unit: str
    relation: str
    delta: float
    worst_epsilon: float
    epsilon_everywhere: float
    hospitals: tuple[HospitalReport, ...]
    expected_hospitals: int
    not_private_auc: float | None
    not_private_reference_auc: float | None

    def save(self, run_dir: Path) -> Path:
        """Write ``run_dir/result.json``, all of it or nothing, and return its path."""
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / RESULT
        unfinished = run_dir / f".{RESULT}.{os.getpid()}"
        unfinished.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        unfinished.replace(path)
        return path

    @classmethod
    def load(cls, run_dir: Path) -> "Report":
        """Read what `save` wrote."""
        fields: Mapping[str, Any] = json.loads((run_dir / RESULT).read_text(encoding="utf-8"))
        hospitals = tuple(HospitalReport(**hospital) for hospital in fields["hospitals"])
        return cls(**{**fields, "hospitals": hospitals})

    def table(self) -> str:
        """Return the report as text."""
        rows: list[Sequence[str]] = [
            (
                hospital.dataset,
                rounded_up(hospital.epsilon),
                hospital.covers,
                _auc(hospital.not_private_auc),
                _auc(hospital.not_private_reference_auc),
            )
            for hospital in self.hospitals
        ]
        worst = rounded_up(self.worst_epsilon)
        rows.append(
            (
                "all, pooled",
                f"{worst} (worst)",
                "",
                _auc(self.not_private_auc),
                _auc(self.not_private_reference_auc),
            )
        )
        everywhere = rounded_up(self.epsilon_everywhere)
        caveat = noise_caveat(cryptographic=all(h.cryptographic for h in self.hospitals))
        trained = len(self.hospitals)
        return "\n".join(
            [
                *_columns(
                    ("hospital", "epsilon", "epsilon covers", "AUC [1]", "no privacy [1]"), rows
                ),
                "",
                f"Privacy unit: one patient (one row, {self.unit!r}), relation {self.relation}, "
                f"delta {self.delta:g}, as the hospitals claim.",
                f"A patient of one hospital has spent at most epsilon {worst} at delta "
                f"{self.delta:g},",
                f"a patient seen in all {trained} at most epsilon {everywhere} at delta "
                f"{self.delta:g}{caveat}.",
                f"{trained} of {self.expected_hospitals} hospitals trained, {self.rounds} rounds, "
                f"split seed {self.split_seed}.",
                "[1] NOT PRIVATE: measured on held-out patients, who were never trained on. "
                '"no privacy": the same model',
                "    and rounds without clipping and noise, on all hospitals' patients in one "
                "place.",
            ]
        )


def _auc(value: float | None) -> str:
    return _NO_AUC if value is None else f"{value:.3f}"


def _columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        return " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)).rstrip()

    rule = "-+-".join("-" * width for width in widths)
    return [line(header), rule, *map(line, rows[:-1]), rule, line(rows[-1])]
