"""The files of a run: the ledger of its data set, its checkpoint, and how it goes on from them.

>>> from dpfl_flower.accounting import EveryoneSampling
>>> request = PrivacyRequest.parse(
...     sampling=EveryoneSampling(4), budget=None, noise_multiplier=1.0, delta=1e-5, unit=None,
...     relation=None,
... )
>>> files = RunFiles.of(request, dataset="heart", ledger=None, checkpoint_dir=None)
>>> files.opened(lambda ledger, saved: (ledger.dataset, ledger.durable, saved))
('heart', False, None)
"""

import dataclasses
import functools
import logging
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from dpfl_flower.accounting import Event, Ledger
from dpfl_strategies.checkpoint import CheckpointDirectory, CheckpointError, RunState
from dpfl_strategies.privacy_request import PrivacyRequest

__all__ = ["RunFiles", "let_go", "plan_part", "require_same_settings"]

log = logging.getLogger("flwr.dpfl")

Run = TypeVar("Run")


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """Where the ledger and the checkpoint are kept, or that they are not.

    Attributes
    ----------
    request : PrivacyRequest
        What the ledger is about.
    dataset : str
        The name of the data set, as in the ledger's header.
    ledger_path : path or None
        None: the ledger stays in memory, one for all runs that these files are opened for.
    checkpoints : CheckpointDirectory or None
    """

    request: PrivacyRequest
    dataset: str
    ledger_path: str | Path | None
    checkpoints: CheckpointDirectory | None

    @classmethod
    def of(
        cls,
        request: PrivacyRequest,
        *,
        dataset: str,
        ledger: str | Path | None,
        checkpoint_dir: str | Path | None,
    ) -> "RunFiles":
        """Return the files that a user named; without a ledger it lies beside the checkpoint."""
        if ledger is None and checkpoint_dir is not None:
            ledger = Path(checkpoint_dir) / "ledger.jsonl"
        return cls(
            request=request,
            dataset=dataset,
            ledger_path=ledger,
            checkpoints=None if checkpoint_dir is None else CheckpointDirectory(checkpoint_dir),
        )

    def opened(self, start: Callable[[Ledger, RunState | None], Run]) -> Run:
        """Open the ledger and return what ``start`` makes of it and the checkpoint, None if none.

        The ledger is let go of where ``start`` raises.

        Raises
        ------
        LedgerError, CheckpointError
            If a file is damaged, in use, or belongs to another run.
        """
        saved = None if self.checkpoints is None else self.checkpoints.load()
        ledger = self._open_ledger()
        try:
            return start(ledger, saved)
        except BaseException:
            let_go(ledger)
            raise

    def go_on(self, ledger: Ledger, saved: RunState) -> None:
        """Say that a run is resumed; LedgerTampered where the ledger is older than it."""
        if saved.ledger is not None:
            ledger.require_extends(saved.ledger)
        log.info("Resuming run %s after round %d", saved.run, saved.server_round)

    def begin(self, ledger: Ledger, state: RunState) -> RunState:
        """Save the state that a run begins with, and return it with the ledger's position."""
        state = dataclasses.replace(state, ledger=ledger.position)
        self.save(state)
        return state

    def save(self, state: RunState) -> None:
        """Save a state, where there is a place for it."""
        if self.checkpoints is not None:
            self.checkpoints.save(state)

    def _open_ledger(self) -> Ledger:
        if self.ledger_path is None:
            return self._remembered
        request = self.request
        return Ledger.open(
            self.ledger_path,
            dataset=self.dataset,
            delta=request.delta,
            unit=request.unit,
            relation=request.relation,
            budget=request.budget,
        )

    @functools.cached_property
    def _remembered(self) -> Ledger:
        """The ledger without a file: one for all runs of a strategy, which share its budget."""
        request = self.request
        return Ledger.in_memory(
            dataset=self.dataset,
            delta=request.delta,
            unit=request.unit,
            relation=request.relation,
            budget=request.budget,
        )


def plan_part(
    ledger: Ledger, state: RunState, event: Event, num_rounds: int, *, total_variation: float
) -> str:
    """Write down what this part of a run is going to release; return its name.

    Each part, from one start to the next crash, has a plan of its own with the run's event: rounds
    that a crash made the run charge twice do not use up what a later part needs.
    """
    part = f"{state.run}/{uuid.uuid4().hex[:8]}"
    left = max(1, num_rounds - state.server_round)
    ledger.plan(part, event, left, total_variation=total_variation)
    return part


def require_same_settings(saved: RunState, settings: Mapping[str, str]) -> None:
    """Raise CheckpointError, naming the first, where a setting is not what the run began with.

    A setting that the checkpoint does not know, since it is older, was None.
    """
    for name, value in settings.items():
        began = saved.settings.get(name, "None")
        if began != value:
            raise CheckpointError(
                f"{name}={value} must be {began}, as when the run in the checkpoint began; give "
                "another checkpoint_dir to begin a new run"
            )


def let_go(ledger: Ledger) -> None:
    """Close a ledger that has a file; the one in memory goes on counting."""
    if ledger.durable:
        ledger.close()
