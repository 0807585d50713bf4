"""DP-FedAvg without a server to trust: every node adds a share of the noise before it masks.

Kairouz, Liu, Steinke, arXiv 2102.06387 (discrete Gaussian); Agarwal, Kairouz, Liu, arXiv 2110.04995
(Skellam). What the server learns of a round is the noisy sum, by secure aggregation.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from dpfl_flower import checks, records
from dpfl_flower.accounting import (
    PrivacyBudget,
    PrivacyStatement,
    PrivacyUnit,
    Relation,
    Sampling,
)
from dpfl_flower.client.distributed_request import DistributedRequest
from dpfl_flower.clipping import FixedClipping
from dpfl_flower.distributed import DistributedPlan, ShareNoise
from dpfl_flower.secagg import SecureAggregation, Session, SumRequest, terms_of
from dpfl_strategies.distributed_design import DistributedDesign, unit_sampling_rate
from dpfl_strategies.distributed_report import DistributedReport
from dpfl_strategies.distributed_run import DistributedRun, DistributedSettings
from dpfl_strategies.messages import Arrays, from_record, to_record
from dpfl_strategies.nobody_evaluates import NobodyEvaluates
from dpfl_strategies.overrides import NOISE_BY_NODES, refuse_overrides
from dpfl_strategies.privacy_request import PrivacyRequest
from dpfl_strategies.registry import Registry
from dpfl_strategies.result import PrivateResult, Stopped
from dpfl_strategies.round_loop import (
    EvaluateFn,
    FailureWatch,
    LoopHooks,
    completed,
    hand_over,
    run_rounds,
)
from dpfl_strategies.run_files import RunFiles
from dpfl_strategies.secure_round import SecureRound, round_seconds, unfinished
from dpfl_strategies.server_optimizers import FedAvg, ServerOptimizer, State


@dataclass(frozen=True)
class _OpenRound:
    """The round that waits for replies."""

    request: DistributedRequest
    reference: Arrays
    exchange: SecureRound
    asked: int


@final
class DistributedDPFedAvg(NobodyEvaluates):
    """DP-FedAvg with noise that the nodes add (trust model ``distributed``).

    All nodes are asked in every round, and answer masked vectors that hold their bounded sum and a
    share of the noise. Shares are calibrated to ``min_cohort - colluders`` of
    ``secure_aggregation``: with fewer survivors a round is abandoned, and colluders could subtract
    their own shares. The guarantee holds against the server too, as far as secure aggregation keeps
    what it promises (docs/threat-model.md). No sampling amplifies it.

    Apps put ``mods=[secure_aggregation_mod, noise_share_mod(...)]`` around their train function or
    their :func:`~dpfl_flower.client.users.user_cohort_app`; nodes charge their own ledgers.

    Parameters
    ----------
    sampling:
        ``EveryoneSampling`` of the units; with units inside nodes also ``PoissonSampling``, whose
        coins the nodes draw, and which saves work, not epsilon.
    clipping:
        The bound on one unit's update.
    num_nodes:
        How many nodes there are; as many as the population where every node is one unit.
    secure_aggregation:
        ``SecAggPlus(min_cohort=t, colluders=c)``.
    budget:
        The most the data set may spend. The noise follows from it.
    noise_multiplier:
        The certain noise over the bound on one unit, instead of a budget.
    delta, unit, relation:
        Without a budget: what epsilon is reported for. A node as the unit needs zero-out or
        replace-one: a removed node would take its share along.
    noise:
        ``"discrete-gaussian"`` or ``"skellam"``.
    bits:
        Sums travel modulo 2^bits.
    max_inflation:
        How much longer than the clip norm the enforced bound may be.
    server_optimizer:
        What becomes of the noisy mean: plain averaging by default.
    ledger, dataset, checkpoint_dir, wait_seconds, give_up_after:
        As in :class:`~dpfl_strategies.private_strategy.PrivateStrategy`.

    Raises
    ------
    ValueError
        For an argument out of range, naming it, its value and the bound.

    Examples
    --------
    >>> from dpfl_flower.accounting import EveryoneSampling
    >>> from dpfl_flower.secagg import SecAggPlus
    >>> strategy = DistributedDPFedAvg(
    ...     budget=PrivacyBudget(epsilon=1.0, delta=1e-4, unit="example"),
    ...     sampling=EveryoneSampling(736),
    ...     clipping=FixedClipping(0.5),
    ...     num_nodes=4,
    ...     secure_aggregation=SecAggPlus(min_cohort=3),
    ... )
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        refuse_overrides(
            cls,
            DistributedDPFedAvg,
            NOISE_BY_NODES,
            "server_optimizer= is what becomes of the noisy mean",
        )

    def __init__(
        self,
        *,
        sampling: Sampling,
        clipping: FixedClipping,
        num_nodes: int,
        secure_aggregation: SecureAggregation,
        budget: PrivacyBudget | None = None,
        noise_multiplier: float | None = None,
        delta: float | None = None,
        unit: PrivacyUnit | str | None = None,
        relation: Relation | str | None = None,
        noise: ShareNoise | str = ShareNoise.DISCRETE_GAUSSIAN,
        bits: int = 32,
        max_inflation: float = 1.1,
        server_optimizer: ServerOptimizer | None = None,
        ledger: str | Path | None = None,
        dataset: str = "default",
        checkpoint_dir: str | Path | None = None,
        wait_seconds: float = 600.0,
        give_up_after: int | None = 3,
    ) -> None:
        checks.positive_int(num_nodes=num_nodes, bits=bits)
        if give_up_after is not None:
            checks.positive_int(give_up_after=give_up_after)
        if not isinstance(clipping, FixedClipping):
            raise ValueError(
                f"clipping={clipping!r} must be FixedClipping: an indicator of who was clipped is "
                "no part of what distributed noise is accounted for"
            )
        request = PrivacyRequest.parse(
            sampling=sampling,
            budget=budget,
            noise_multiplier=noise_multiplier,
            delta=delta,
            unit=unit,
            relation=relation,
        )
        checks.instance(SecureAggregation, secure_aggregation=secure_aggregation)
        if secure_aggregation.nodes_learn_sum:
            raise ValueError(
                f"secure_aggregation={secure_aggregation!r} must not show nodes the sum: what they "
                "see before it is reduced is not what distributed noise is accounted for"
            )
        sampling_rate = unit_sampling_rate(request, num_nodes)
        secure_aggregation.check_population(num_nodes)
        plan_for = DistributedDesign(
            request=request,
            clip_norm=clipping.clip_norm,
            num_nodes=num_nodes,
            secure_aggregation=secure_aggregation,
            noise=noise,
            bits=bits,
            max_inflation=max_inflation,
        )
        self.server_optimizer = server_optimizer or FedAvg()
        self._secure = secure_aggregation
        self._num_nodes = num_nodes
        self._settings = DistributedSettings(
            files=RunFiles.of(
                request, dataset=dataset, ledger=ledger, checkpoint_dir=checkpoint_dir
            ),
            design=plan_for,
            sampling_rate=sampling_rate,
        )
        self._clipping = clipping
        self._wait_seconds = wait_seconds
        self._give_up_after = give_up_after
        self._failures = FailureWatch(give_up_after)
        self._registry = Registry(num_nodes, wait_seconds=wait_seconds)
        self._optimizer_state: State = {}
        self._stage_seconds = 3600.0
        self._run: DistributedRun | None = None
        self._report = self._new_report()
        self._open: _OpenRound | None = None

    @property
    def plan(self) -> DistributedPlan | None:
        """What every round is, None until the run has begun."""
        return None if self._run is None else self._run.plan

    @property
    def clip_norm(self) -> float:
        """The clip norm of every round."""
        return self._clipping.clip_norm

    @property
    def noise_multiplier(self) -> float | None:
        """The certain noise over the bound on one unit, None until the run has begun."""
        return None if self._run is None else self._run.plan.noise_multiplier

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
        """Run ``num_rounds`` private rounds, going on from the checkpoint where there is one.

        Parameters and records are Flower's; ``timeout`` holds for each of the five exchanges of a
        round. A budget that runs out ends the run with the last released model.

        Raises
        ------
        AllClientsFailed
            If rounds were abandoned, ``give_up_after`` in a row or always. Its ``result`` holds the
            last released model.
        PopulationNotReached
            If too few nodes connected.
        LedgerError, CheckpointError
            If the files are damaged, in use, or belong to another run.
        """
        checks.positive_int(num_rounds=num_rounds)
        if self._run is not None:
            raise RuntimeError("this strategy is already running")
        self._stage_seconds = timeout
        self._failures = FailureWatch(self._give_up_after)
        self._registry = Registry(self._num_nodes, wait_seconds=self._wait_seconds)
        run = self._run = self._settings.open(
            from_record(initial_arrays), num_rounds, settings=self._fixed()
        )
        report = self._report = self._new_report()
        try:
            self._optimizer_state = dict(run.state.optimizer_state)
            self.summary()
            result = PrivateResult(signal_to_noise=report.signal_to_noise)
            with completed(result, lambda: self._complete(result, grid)):
                run_rounds(
                    self,
                    LoopHooks(
                        failures=self._failures,
                        stop_reason=lambda: None if run.affordable else Stopped.BUDGET_SPENT,
                        progress=lambda done: report.progress(run, done, num_rounds),
                        proceed=self.continue_train,
                    ),
                    result,
                    grid=grid,
                    arrays=to_record(run.state.model),
                    first_round=run.state.server_round + 1,
                    num_rounds=num_rounds,
                    timeout=timeout,
                    train_config=train_config,
                    evaluate_config=evaluate_config,
                    evaluate_fn=evaluate_fn,
                )
            return result
        finally:
            run.close()
            self._run = self._open = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Begin the round with every node."""
        run = self._running()
        if self._open is not None:
            raise RuntimeError(f"round {self._open.request.server_round} waits for its replies")
        nodes = tuple(self._registry.node_ids(grid))
        if len(nodes) > self._num_nodes:
            raise ValueError(
                f"num_nodes={self._num_nodes} must be >= {len(nodes)}, the nodes that are "
                "registered: the modulus leaves room for so many shares"
            )
        request = run.request(server_round)
        reference = from_record(arrays)
        run.layout.check(reference)
        config[records.SERVER_ROUND] = server_round
        task = RecordDict(
            {
                records.ARRAYS: arrays,
                records.CONFIG: config,
                records.DISTRIBUTED: request.to_config(),
            }
        )
        wanted = SumRequest(
            session=Session(grid.run.run_id, server_round, terms_of(task)),
            nodes=nodes,
            width=run.plan.grid.padded,
            bits=run.plan.grid.bits,
            seconds=round_seconds(self._stage_seconds),
        )
        exchange = SecureRound(self._secure, wanted, task)
        self._open = _OpenRound(request, reference, exchange, len(nodes))
        return exchange.messages()

    def continue_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> Iterable[Message] | None:
        """Return the messages of the next exchange, None once the sum is there, or given up."""
        return self._opened(server_round).exchange.proceed(replies)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Charge, decode, step, save; return the released model, None for an abandoned round.

        Raises
        ------
        RuntimeError
            If the round was not configured, is not finished, or was aggregated already.
        BudgetExhausted
            If the budget does not allow the release; nothing is charged or released.
        """
        del replies  # continue_train has had them
        run, opened = self._running(), self._opened(server_round)
        if not opened.exchange.finished:
            raise unfinished(server_round)
        self._open = None
        summed = opened.exchange.total
        if summed is None or len(summed.survivors) < run.plan.min_survivors:
            self._failures.record(asked=opened.asked, answered=0)
            return None, None
        mean = run.charge_and_decode(summed.total, opened.request)
        self._report.released(server_round, mean, run.plan, shares=len(summed.survivors))
        model, self._optimizer_state = self.server_optimizer.step(
            run.layout.flatten(opened.reference), mean, self._optimizer_state
        )
        released = run.commit(
            server_round,
            model=model,
            template=opened.reference,
            optimizer_state=self._optimizer_state,
        )
        self._failures.record(asked=opened.asked, answered=len(summed.survivors))
        return to_record(released), None

    def privacy_spent(self) -> PrivacyStatement:
        """Return what the data set has spent; only while the strategy runs."""
        return self._running().ledger.spent()

    def summary(self) -> None:
        """Log what will be done, before the first round."""
        self._report.summary(self._run)

    def _new_report(self) -> DistributedReport:
        return DistributedReport(self._settings.request, self._clipping, self.server_optimizer)

    def _complete(self, result: PrivateResult, grid: Grid) -> None:
        """Say what it cost, and leave the last released model where the run's files go."""
        if result.stopped is Stopped.ALL_CLIENTS_FAILED:
            state = self._running().state
            result.arrays, result.rounds = to_record(state.model), state.server_round
        result.privacy = self.privacy_spent()
        hand_over(result, grid)

    def _fixed(self) -> dict[str, str]:
        """Return what may not change between the parts of a resumed run."""
        request = self._settings.request
        return {
            "strategy": type(self).__name__,
            "sampling": repr(request.sampling),
            "clipping": repr(self._clipping),
            "server_optimizer": repr(self.server_optimizer),
            "secure_aggregation": repr(self._secure),
            "num_nodes": str(self._num_nodes),
            "unit": str(request.unit),
            "relation": str(request.relation),
        }

    def _running(self) -> DistributedRun:
        if self._run is None:
            raise RuntimeError("the strategy is not running: call start()")
        return self._run

    def _opened(self, server_round: int) -> _OpenRound:
        if self._open is None or self._open.request.server_round != server_round:
            raise RuntimeError(f"round {server_round} is not open")
        return self._open
