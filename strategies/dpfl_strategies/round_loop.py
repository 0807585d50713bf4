"""The round loop that all strategies here share: ask, aggregate, evaluate, until told to stop."""

import io
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from dpfl_flower.final_model import run_directory, save_model
from dpfl_strategies.result import PrivateResult, Stopped

log = logging.getLogger("flwr.dpfl")

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


Proceed = Callable[[int, Iterable[Message]], Iterable[Message] | None]


def one_exchange(server_round: int, replies: Iterable[Message]) -> None:
    """Ask nothing further: the replies to the first messages are what the round is made of."""


class AllClientsFailed(RuntimeError):
    """Everybody who was asked failed, round after round: the run is broken, not unlucky.

    Attributes
    ----------
    result:
        What the run had until then: the last released model, and what was spent for it.
    """

    result: PrivateResult | None = None


@dataclass
class FailureWatch:
    """Counts consecutive rounds in which somebody was asked and nobody gave a valid answer.

    Flower ends such a run "successfully"; here it is an error. The count depends on which nodes
    answer, not on what they hold; it is shown to the operator only and never stored.
    """

    give_up_after: int | None
    failed_rounds: int = field(default=0, init=False)
    ever_answered: bool = field(default=False, init=False)

    def record(self, *, asked: int, answered: int) -> None:
        """Count one round; raise AllClientsFailed when there were too many in a row."""
        if answered:
            self.ever_answered = True
            self.failed_rounds = 0
        elif asked:
            self.failed_rounds += 1
        if self.give_up_after is not None and self.failed_rounds >= self.give_up_after:
            raise AllClientsFailed(
                f"in {self.failed_rounds} rounds in a row every node that was asked failed, gave "
                "no answer in time, or answered something malformed; look at the nodes' own logs"
            )

    def finish(self) -> None:
        """Raise AllClientsFailed where somebody was asked in this run and nobody ever answered."""
        if self.failed_rounds and not self.ever_answered and self.give_up_after is not None:
            raise AllClientsFailed(
                "every node that was asked in this run failed; look at the nodes' own logs"
            )


@dataclass(frozen=True)
class LoopHooks:
    """What the loop needs beside Flower's own Strategy methods.

    Attributes
    ----------
    failures:
        The watch over rounds in which everybody failed.
    stop_reason:
        Returns why no further round may be asked for, None where one may.
    progress:
        Given the round, returns a few words on what has been spent so far and what came of it.
    proceed:
        Given the round and the replies to its last messages, returns the messages to send next,
        None where those replies are the ones to aggregate.
    """

    failures: FailureWatch
    stop_reason: Callable[[], Stopped | None]
    progress: Callable[[int], str]
    proceed: Proceed = one_exchange


def run_rounds(
    strategy: Strategy,
    hooks: LoopHooks,
    result: PrivateResult,
    *,
    grid: Grid,
    arrays: ArrayRecord,
    first_round: int,
    num_rounds: int,
    timeout: float,
    train_config: ConfigRecord | None,
    evaluate_config: ConfigRecord | None,
    evaluate_fn: EvaluateFn | None,
) -> PrivateResult:
    """Run rounds ``first_round`` to ``num_rounds`` and fill ``result``.

    A round is one exchange of messages, or as many as ``hooks.proceed`` asks for. Replies that come
    ``timeout`` seconds after their messages are never looked at, and nobody is asked in place of a
    node that did not answer.
    """
    result.arrays, result.rounds = arrays, first_round - 1
    ends: list[float] = []
    if evaluate_fn is not None:
        _keep(
            result.evaluate_metrics_serverapp, first_round - 1, evaluate_fn(first_round - 1, arrays)
        )
    for server_round in range(first_round, num_rounds + 1):
        reason = hooks.stop_reason()
        if reason is not None:
            result.stopped = reason
            if ends:
                log.warning("Stopping before round %d of %d: %s", server_round, num_rounds, reason)
            else:
                log.error(
                    "NO ROUND WAS RUN, the model is the one this run began with: %s (round %d of "
                    "%d)",
                    reason,
                    server_round,
                    num_rounds,
                )
            break
        messages = strategy.configure_train(
            server_round, arrays, ConfigRecord(dict(train_config or {})), grid
        )
        replies = grid.send_and_receive(messages, timeout=timeout)
        while (further := hooks.proceed(server_round, replies)) is not None:
            replies = grid.send_and_receive(further, timeout=timeout)
        released, train_metrics = strategy.aggregate_train(server_round, replies)
        arrays = arrays if released is None else released
        result.arrays, result.rounds = arrays, server_round
        _keep(result.train_metrics_clientapp, server_round, train_metrics)
        evaluations = list(
            strategy.configure_evaluate(
                server_round, arrays, ConfigRecord(dict(evaluate_config or {})), grid
            )
        )
        if evaluations:
            metrics = strategy.aggregate_evaluate(
                server_round, grid.send_and_receive(evaluations, timeout=timeout)
            )
            _keep(result.evaluate_metrics_clientapp, server_round, metrics)
        if evaluate_fn is not None:
            _keep(
                result.evaluate_metrics_serverapp, server_round, evaluate_fn(server_round, arrays)
            )
        ends.append(time.monotonic())
        progress = hooks.progress(server_round)
        left = _time_left(ends, num_rounds - server_round)
        log.info("[ROUND %d/%d] %s%s", server_round, num_rounds, progress, left)
    hooks.failures.finish()
    return result


def _time_left(ends: Sequence[float], rounds: int) -> str:
    """Return the words for how long ``rounds`` more take, given when each round so far ended.

    Empty after the first of several: it holds what only starts up, on every node, and says nothing
    about the others.
    """
    if rounds and len(ends) < 2:
        return ""
    each = (ends[-1] - ends[0]) / max(1, len(ends) - 1)
    return f", about {each * rounds:.0f} s left"


def _keep(kept: dict[int, MetricRecord], server_round: int, metrics: MetricRecord | None) -> None:
    if metrics is not None:
        kept[server_round] = metrics


@contextmanager
def completed(result: PrivateResult, complete: Callable[[], None]) -> Iterator[None]:
    """Complete and log the result of the run inside, also of one in which everybody failed.

    ``complete`` is called when ``result.stopped`` is known; AllClientsFailed carries the result.
    """
    try:
        yield
    except AllClientsFailed as failed:
        result.stopped = Stopped.ALL_CLIENTS_FAILED
        failed.result = result
        complete()
        raise
    complete()
    log_result(result)


def hand_over(result: PrivateResult, grid: Grid) -> None:
    """Write the result's model where the run's files go, if the run was given a place for them."""
    folder = run_directory(grid)
    if folder is not None and result.arrays is not None:
        privacy = result.privacy or result.node_privacy
        notes = {"rounds": str(result.rounds), "stopped": str(result.stopped)}
        try:
            save_model(result.arrays, folder, notes=notes | {"privacy": str(privacy)})
        except OSError as error:  # the caller still gets a result that was paid for
            log.error("The final model is not in %s: %s", folder, error)


def log_result(result: PrivateResult) -> None:
    """Log the result line by line, as Flower does."""
    for line in io.StringIO(repr(result)):
        log.info("\t%s", line.rstrip("\n"))
