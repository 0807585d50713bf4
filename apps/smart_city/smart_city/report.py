"""The last word of a run: what the model is worth, and what every unit has paid for it."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from dpfl_flower.accounting.statement import rounded_up

from .reference import Reference

RESULT: Final = "result.json"
"""The file in the run directory that holds the report."""


@dataclass(frozen=True)
class Report:
    """The whole run.

    Attributes
    ----------
    rounds
        Rounds whose model was released.
    stopped
        Why the run ended.
    dataset, unit, relation, epsilon, delta
        What each unit has spent, as the ledger says.
    durable
        Whether that counts all runs in the ledger file, or this run only.
    nodes, expected_nodes
        Those that answered the evaluation, and those there are.
    not_private_mae
        On held-out hours, in people an hour; None where no node shared any.
    not_private_held_out
        How many hours that are.
    not_private_reference
        What can be had without privacy, and without training; None unless all nodes hold the
        packaged data set.
    not_private_figure
        Name of the file in the run directory that shows a sensor's week, None if there is none.
    """

    run_id: int
    rounds: int
    stopped: str
    init_seed: int
    dataset: str
    unit: str
    relation: str
    epsilon: float
    delta: float
    durable: bool
    nodes: int
    expected_nodes: int
    not_private_mae: float | None
    not_private_held_out: int
    not_private_reference: Reference | None
    not_private_figure: str | None

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
        found = fields["not_private_reference"]
        reference = None if found is None else Reference(**found)
        return cls(**{**fields, "not_private_reference": reference})

    def table(self) -> str:
        """Return the report as text."""
        epsilon = rounded_up(self.epsilon)
        rows = [("this run", epsilon, _people(self.not_private_mae))]
        if self.not_private_reference is not None:
            reference = self.not_private_reference
            rows += [
                ("the last hour again", "0", _people(reference.last_hour)),
                ("the same hour a week ago", "0", _people(reference.last_week)),
                ("the naive forecast, no training", "0", _people(reference.naive)),
                ("this model, all units together", "no privacy", _people(reference.pooled)),
            ]
        covers = "all runs in the ledger" if self.durable else "this run only"
        lines = [
            *_columns(("forecast", "epsilon", "MAE [1]"), rows),
            "",
            f"Privacy unit: one sensor's fortnight ({self.unit!r}), relation {self.relation}.",
            f"Each has spent at most epsilon {epsilon} at delta {self.delta:g} on data set "
            f'"{self.dataset}"; that covers {covers}.',
            f"{self.rounds} rounds, init seed {self.init_seed}: {self.stopped}.",
            f"[1] NOT PRIVATE: people an hour, over {self.not_private_held_out} held-out hours, "
            f"never trained on, of {self.nodes} of {self.expected_nodes} nodes.",
        ]
        if self.not_private_figure is not None:
            lines.append(f"Figure, NOT PRIVATE: {self.not_private_figure} in the run directory.")
        return "\n".join(lines)


def _people(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.1f}"


def _columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        return " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)).rstrip()

    return [line(header), "-+-".join("-" * width for width in widths), *map(line, rows)]
