"""Federated averaging of nodes that train with DP-SGD: every node adds its own noise.

What a node answers is private already, so nothing here costs privacy: averaging, momentum and
checkpoints are post-processing. The server collects what each node claims to have spent. With
secure aggregation it sees the sum of a round and no single answer.
"""

import logging
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from dpfl_flower import checks, records
from dpfl_flower.layout import ArrayLayout
from dpfl_flower.secagg import SecureAggregation
from dpfl_strategies.checkpoint import CheckpointDirectory, CheckpointError, RunState
from dpfl_strategies.claim_book import ClaimBook
from dpfl_strategies.client_metrics import (
    AggregateMetrics,
    ClientMetrics,
    MetricsGate,
    without_noise,
)
from dpfl_strategies.messages import Arrays, from_record, to_messages, to_record
from dpfl_strategies.node_privacy import NodePrivacyReport
from dpfl_strategies.registry import Registry
from dpfl_strategies.replies import accepted, parse_train
from dpfl_strategies.result import PrivateResult
from dpfl_strategies.round_loop import (
    EvaluateFn,
    FailureWatch,
    LoopHooks,
    completed,
    hand_over,
    run_rounds,
)
from dpfl_strategies.sample_level_report import SampleLevelReport
from dpfl_strategies.secure_average import OpenAverage, SecureAverage
from dpfl_strategies.secure_round import unfinished
from dpfl_strategies.server_optimizers import FedAvg, ServerOptimizer, State

log = logging.getLogger("flwr.dpfl")


@dataclass(frozen=True)
class _OpenRound:
    """The round that waits for replies; ``masked`` is None where each answer is seen."""

    server_round: int
    nodes: frozenset[int]
    reference: Arrays
    masked: OpenAverage | None


class SampleLevelFedAvg(Strategy):
    """Averages what DP-SGD nodes return, by public weights, and reports what each has spent.

    Every node of the population is asked in every round. A reply without a readable privacy claim
    (see :class:`~dpfl_flower.client.DPSGDClient`) counts as a dropout, so that no model trained
    without one enters the average. The report is what nodes claimed in the replies that arrived;
    a node's own ledger is what counts.

    Parameters
    ----------
    population:
        Number of nodes.
    server_optimizer:
        Plain averaging by default.
    weigh_by_num_examples:
        Weigh replies by their ``num-examples``. Only where those are public constants, as with
        ``DPSGDClient(weight=...)``; by default every node counts the same.
    checkpoint_dir:
        Where the model is kept after each round; ``start`` resumes from it. A node without a ledger
        file forgets, with the run, what it spent in a round that a crash kept from being saved.
    metrics, train_metrics_aggr_fn, evaluate_metrics_aggr_fn, fraction_evaluate:
        As in :class:`~dpfl_strategies.private_strategy.PrivateStrategy`.
    wait_seconds, give_up_after:
        Likewise.
    secure_aggregation:
        ``SecAggPlus()``: nodes mask their updates in fixed point and their weight, so that the
        server sees the sum of a round, who is in it and what each node claims to have spent, and
        no single answer. Apps put :func:`~dpfl_flower.client.secure_aggregation_mod` around their
        train function. A round with too few survivors is abandoned: the model and the optimizer's
        state stay as they were, and so does what nodes have charged. No noise is added here: what
        protects people is the nodes' own, and their epsilon is the same with and without. Metrics
        of training stay on the nodes.
    max_update_norm:
        Only with ``secure_aggregation``, and needed there: the L2 bound on what a node's training
        changes, times its weight over the largest. A longer update is shortened by its node. It
        keeps sums from wrapping around and no privacy depends on it. It sets the resolution too:
        nodes round each entry to a multiple of ``max_update_norm / 2**24``, and the mean is exact
        to that, times the largest weight over the mean weight. Take about ten times the norm of a
        node's update: a node's own log tells it where the bound is too small or too large for it.
    max_num_examples:
        Only with ``secure_aggregation`` and ``weigh_by_num_examples``: the largest weight that a
        node may have; a larger one counts as this.

    Raises
    ------
    ValueError
        For an argument out of range, naming it, its value and the bound.
    """

    def __init__(
        self,
        *,
        population: int,
        server_optimizer: ServerOptimizer | None = None,
        weigh_by_num_examples: bool = False,
        checkpoint_dir: str | Path | None = None,
        metrics: ClientMetrics | str = ClientMetrics.DROPPED,
        train_metrics_aggr_fn: AggregateMetrics | None = None,
        evaluate_metrics_aggr_fn: AggregateMetrics | None = None,
        fraction_evaluate: float = 1.0,
        wait_seconds: float = 600.0,
        give_up_after: int | None = 3,
        secure_aggregation: SecureAggregation | None = None,
        max_update_norm: float | None = None,
        max_num_examples: int | None = None,
    ) -> None:
        checks.instance(ServerOptimizer, type(None), server_optimizer=server_optimizer)
        checks.instance(str, Path, type(None), checkpoint_dir=checkpoint_dir)
        if give_up_after is not None:
            checks.positive_int(give_up_after=give_up_after)
        self._population, self._wait_seconds = population, wait_seconds
        self._registry = Registry(population, wait_seconds=wait_seconds)
        self._weigh_by_num_examples = weigh_by_num_examples
        self._secure = SecureAverage.of(
            secure_aggregation,
            population=population,
            max_update_norm=max_update_norm,
            max_num_examples=max_num_examples,
            weigh_by_num_examples=weigh_by_num_examples,
        )
        self._stage_seconds = 3600.0
        self._gate = MetricsGate(
            without_noise(metrics),
            fraction_evaluate=fraction_evaluate,
            train_metrics_aggr_fn=train_metrics_aggr_fn,
            evaluate_metrics_aggr_fn=evaluate_metrics_aggr_fn,
        )
        self.server_optimizer = server_optimizer or FedAvg()
        self._checkpoints = None if checkpoint_dir is None else CheckpointDirectory(checkpoint_dir)
        self._give_up_after = give_up_after
        self._failures = FailureWatch(give_up_after)
        self._claims, self._report = ClaimBook(), SampleLevelReport(population)
        self._optimizer_state: State = {}
        self._open: _OpenRound | None = None
        self._evaluating: frozenset[int] = frozenset()
        self._run_name = ""

    @property
    def node_privacy(self) -> NodePrivacyReport:
        """The newest claim of each node."""
        return self._claims.report

    @final
    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> PrivateResult:
        """Run ``num_rounds`` rounds, going on from the checkpoint where there is one.

        Parameters and records are Flower's; ``timeout`` holds for each exchange of messages, of
        which secure aggregation takes several in a round.

        Raises
        ------
        AllClientsFailed, PopulationNotReached, CheckpointError
            As for :class:`~dpfl_strategies.private_strategy.PrivateStrategy`.
        """
        checks.positive_int(num_rounds=num_rounds)
        self._failures = FailureWatch(self._give_up_after)
        self._registry = Registry(self._population, wait_seconds=self._wait_seconds)
        self._claims, self._optimizer_state = ClaimBook(), {}
        self._report = SampleLevelReport(self._population)
        self._open, self._stage_seconds = None, timeout
        arrays, first_round = self._resume(initial_arrays)
        self.summary()
        result = PrivateResult()
        with completed(result, lambda: self._complete(result, grid)):
            run_rounds(
                self,
                LoopHooks(
                    self._failures,
                    stop_reason=lambda: None,
                    progress=self._progress,
                    proceed=self.continue_train,
                ),
                result,
                grid=grid,
                arrays=arrays,
                first_round=first_round,
                num_rounds=num_rounds,
                timeout=timeout,
                train_config=train_config,
                evaluate_config=evaluate_config,
                evaluate_fn=evaluate_fn,
            )
        return result

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask every node of the population."""
        nodes, reference, masked = self._registry.node_ids(grid), from_record(arrays), None
        if self._secure is not None:
            masked = self._secure.begin(
                nodes,
                arrays=arrays,
                config=config,
                dimension=ArrayLayout.of(reference).dimension,
                server_round=server_round,
                grid=grid,
                stage_seconds=self._stage_seconds,
                admit=lambda reply: self._claims.read(reply) is not None,
            )
        self._open = _OpenRound(server_round, frozenset(nodes), reference, masked)
        if masked is not None:
            return masked.exchange.messages()
        return to_messages(
            nodes, MessageType.TRAIN, server_round=server_round, arrays=arrays, config=config
        )

    def continue_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> Iterable[Message] | None:
        """Return the messages that follow from these replies, None where they are the last ones.

        Only secure aggregation takes more than one exchange. ``start`` calls it; in a loop of your
        own, send what it returns and call it again with the replies, until it returns None; then
        hand the last replies to ``aggregate_train``.
        """
        masked = self._opened(server_round).masked
        return None if masked is None else masked.exchange.proceed(replies)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the next model; the model stays as it is where nobody answered.

        None for the model where secure aggregation had to abandon the round.

        Raises
        ------
        RuntimeError
            If the round was not configured, is not finished, or was aggregated already.
        """
        opened = self._opened(server_round)
        if opened.masked is not None and not opened.masked.exchange.finished:
            raise unfinished(server_round)
        self._open = None
        layout = ArrayLayout.of(opened.reference)
        current = layout.flatten(opened.reference)
        contents: list[RecordDict] = []
        if opened.masked is None:
            mean, contents = self._averaged(opened, layout, current, replies)
            answers = len(contents)
        elif (found := opened.masked.mean) is None:
            self._save(server_round, opened.reference)
            self._failures.record(asked=len(opened.nodes), answered=0)
            return None, None
        else:
            mean, answers = found, opened.masked.survivors
        self._report.averaged(server_round, answers=answers)
        self._failures.record(asked=len(opened.nodes), answered=answers)
        vector, self._optimizer_state = self.server_optimizer.step(
            current, mean, self._optimizer_state
        )
        model = layout.restore(vector, opened.reference)
        self._save(server_round, model)
        return to_record(model), self._gate.of_training(contents)

    def _averaged(
        self,
        opened: _OpenRound,
        layout: ArrayLayout,
        current: NDArray[np.float64],
        replies: Iterable[Message],
    ) -> tuple[NDArray[np.float64], list[RecordDict]]:
        """Return the mean of the answers in clear, zeros where there is none, and their metrics."""
        total, weights, answered = np.zeros_like(current), 0.0, []
        for message in accepted(replies, asked=opened.nodes, group=str(opened.server_round)):
            claimed = self._claims.read(message)  # what was spent counts, whatever else is wrong
            reply = parse_train(message, layout)
            if reply is None or claimed is None:
                continue
            vector = layout.flatten(reply.arrays)
            weight = max(reply.num_examples, 0.0) if self._weigh_by_num_examples else 1.0
            if not (np.isfinite(vector).all() and np.isfinite(weight)):
                log.warning("Node %d answered numbers that are not finite", reply.node_id)
                continue
            total += weight * (vector - current)
            weights += weight
            answered.append(RecordDict({records.METRICS: reply.metrics}))
        return total / weights if weights else total, answered

    def _opened(self, server_round: int) -> _OpenRound:
        if self._open is None or self._open.server_round != server_round:
            raise RuntimeError(f"round {server_round} was not configured, or is aggregated already")
        return self._open

    def _save(self, server_round: int, model: Arrays) -> None:
        if self._checkpoints is not None:
            self._checkpoints.save(
                RunState(
                    run=self._run_name,
                    server_round=server_round,
                    model=model,
                    optimizer_state=self._optimizer_state,
                    settings=self._settings(),
                    claims=self._claims.to_json(),
                )
            )

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask nodes to evaluate, only where their metrics are let through as not private."""
        nodes = self._gate.evaluators(self._registry.node_ids(grid))
        self._evaluating = frozenset(nodes)
        return to_messages(
            nodes, MessageType.EVALUATE, server_round=server_round, arrays=arrays, config=config
        )

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return the nodes' metrics, marked, None where they are dropped."""
        return self._gate.of_evaluation(replies, asked=self._evaluating, group=str(server_round))

    def summary(self) -> None:
        """Log what will be done, before the first round."""
        self._report.summary(self._secure, self.server_optimizer, metrics=self._gate.open)

    def _complete(self, result: PrivateResult, grid: Grid) -> None:
        result.node_privacy = self.node_privacy
        hand_over(result, grid)

    def _progress(self, server_round: int) -> str:
        claims = self._claims
        return self._report.progress(
            server_round, largest=claims.largest, cryptographic=claims.cryptographic
        )

    def _settings(self) -> dict[str, Any]:
        return {
            "strategy": type(self).__name__,
            "server_optimizer": repr(self.server_optimizer),
            "weigh_by_num_examples": self._weigh_by_num_examples,
            **({} if self._secure is None else self._secure.settings()),
        }

    def _resume(self, initial_arrays: ArrayRecord) -> tuple[ArrayRecord, int]:
        self._run_name = uuid.uuid4().hex
        state = None if self._checkpoints is None else self._checkpoints.load()
        if state is None:
            return initial_arrays, 1
        ArrayLayout.of(state.model).check(from_record(initial_arrays))
        if dict(state.settings) != self._settings():
            raise CheckpointError(
                f"settings={self._settings()} must be {dict(state.settings)}, as when the run in "
                "the checkpoint began; give another checkpoint_dir to begin a new run"
            )
        self._run_name, self._optimizer_state = state.run, dict(state.optimizer_state)
        self._claims = ClaimBook(state.claims)
        return to_record(state.model), state.server_round + 1
