"""The rounds of a private run: asked for, summed, charged, noised and saved, each once."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from dpfl_strategies.gathering import Asked, Gathering
from dpfl_strategies.messages import Arrays, from_record
from dpfl_strategies.private_run import PrivatePlan, PrivateRun
from dpfl_strategies.registry import Registry
from dpfl_strategies.round_loop import FailureWatch
from dpfl_strategies.run_report import RunReport
from dpfl_strategies.server_optimizers import State

__all__ = ["PrivateRounds", "ReleasedRound"]

Step = Callable[[NDArray[np.float64], NDArray[np.float64], int], tuple[NDArray[np.float64], State]]
"""Given the model, the released noisy mean and the round: the next model, and what to keep."""


@dataclass(frozen=True)
class ReleasedRound:
    """What became of a round.

    Attributes
    ----------
    arrays : mapping of str to array
        The released model.
    metrics : mapping of str to float
        The mean of each noised metric, clipped to its range; empty without such.
    contents : sequence of RecordDict
        The metrics of the replies themselves: not private.
    """

    arrays: Mapping[str, NDArray[Any]]
    metrics: Mapping[str, float]
    contents: Sequence[RecordDict]


@final
class PrivateRounds:
    """What is open between two calls of a strategy: the run, and the round that waits for replies.

    Parameters
    ----------
    plan : PrivatePlan
    gathering : Gathering
    wait_seconds : float
        How long to wait for the population before the first round.
    give_up_after : int or None
        Consecutive rounds in which everybody failed before the run is an error.

    Attributes
    ----------
    run : PrivateRun or None
        None before a run has begun, and after it was closed.
    asked : Asked or None
        The round that waits for replies.
    failures : FailureWatch
    registry : Registry
    report : RunReport
    """

    def __init__(
        self,
        plan: PrivatePlan,
        gathering: Gathering,
        *,
        wait_seconds: float,
        give_up_after: int | None,
    ) -> None:
        self._plan = plan
        self._gathering = gathering
        self._wait_seconds = wait_seconds
        self._give_up_after = give_up_after
        self.run: PrivateRun | None = None
        self.asked: Asked | None = None
        self.report = RunReport(plan)
        self._begin_anew()

    def _begin_anew(self) -> None:
        self.failures = FailureWatch(self._give_up_after)
        self.registry = Registry(self._gathering.num_nodes, wait_seconds=self._wait_seconds)

    def begin(
        self,
        model: Callable[[], Arrays],
        num_rounds: int,
        settings: Callable[[], Mapping[str, str]],
    ) -> PrivateRun:
        """Open ledger and checkpoint, fix the plan, and return the run."""
        if self.run is not None:
            raise RuntimeError("this strategy is already running; close() it first")
        self._begin_anew()
        run = self.run = self._plan.open(model(), num_rounds, settings=settings())
        self.report = RunReport(self._plan)
        try:
            self._gathering.prepare(run)
        except BaseException:
            self.close()
            raise
        return run

    def close(self) -> None:
        """Let go of the ledger; another run may begin afterwards."""
        if self.run is not None:
            self.run.close()
        self.run = self.asked = None

    def running(self) -> PrivateRun:
        """Return the run; RuntimeError where none has begun."""
        if self.run is None:
            raise RuntimeError("the strategy has no plan yet: call start(), or prepare() first")
        return self.run

    def ask(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Draw a fresh cohort and return one message for each of its nodes (maybe none)."""
        run = self.running()
        if self.asked is not None:
            raise RuntimeError(
                f"round {self.asked.server_round} waits for its replies: its cohort is not drawn "
                "again; aggregate what came, which may be nothing"
            )
        reference = from_record(arrays)
        run.layout.check(reference)
        registry = self.registry.node_ids(grid)
        self.asked = self._gathering.ask(run, server_round, registry, reference)
        return self._gathering.messages(self.asked, arrays=arrays, config=config, grid=grid)

    def proceed(self, server_round: int, replies: Iterable[Message]) -> Iterable[Message] | None:
        """Return the messages that follow from these replies, None where they are the last ones."""
        return self._gathering.proceed(self._open(server_round), replies)

    def aggregate(
        self, server_round: int, replies: Iterable[Message], step: Step
    ) -> ReleasedRound | None:
        """Bound, sum, charge, add noise, step, save; return what is released.

        None where secure aggregation had to abandon the round: nothing is charged.

        Raises
        ------
        RuntimeError
            If the round was not configured, or was aggregated already.
        BudgetExhausted
            If the budget does not allow the release; nothing is charged or released.
        """
        run, asked = self.running(), self._open(server_round)
        self.asked = None
        gathered = self._gathering.gather(run, asked, replies)
        if gathered is None:
            self.failures.record(asked=max(1, len(asked.nodes)), answered=0)
            return None
        noisy = run.charge_and_release(gathered.total, server_round)
        self.report.signal_to_noise[server_round] = noisy.signal_to_noise
        self.report.metrics[server_round] = run.ranges.values(noisy.metric_places.tolist())
        model, optimizer_state = step(
            run.layout.flatten(asked.reference),
            self._gathering.unbiased(noisy.update, run.layout),
            server_round,
        )
        released = run.commit(
            server_round,
            noisy,
            model=model,
            template=asked.reference,
            optimizer_state=optimizer_state,
        )
        # After the charge, so that giving up is no release that the ledger does not know of.
        self.failures.record(asked=len(asked.nodes), answered=gathered.answered)
        return ReleasedRound(released, self.report.metrics[server_round], gathered.contents)

    def _open(self, server_round: int) -> Asked:
        asked = self.asked
        if asked is None or asked.server_round != server_round:
            raise RuntimeError(
                f"round {server_round} has no open cohort: each round is configured, then "
                "aggregated, once"
            )
        return asked
