"""A Flower strategy whose private pipeline cannot be overridden by accident.

Per round: draw a cohort with secret coins, ask it once, bound each answer, sum in integers, charge
the ledger, add the noise, and hand the noisy mean to the server optimizer (DP-FedAvg, McMahan et
al., arXiv 1710.06963). Clip norm and divisor are public constants or released values.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Final, final

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from dpfl_flower import checks
from dpfl_flower.accounting import PrivacyBudget, PrivacyStatement, PrivacyUnit, Relation, Sampling
from dpfl_flower.clipping import ClippingPolicy
from dpfl_flower.federated_dropout import FederatedDropout
from dpfl_flower.quantize import Rounding
from dpfl_flower.rng import SeededRandom, secure
from dpfl_flower.secagg import SecureAggregation
from dpfl_strategies.client_metrics import AggregateMetrics, ClientMetrics, MetricsGate
from dpfl_strategies.messages import to_messages, to_record
from dpfl_strategies.noised_metrics import NoisedMetrics
from dpfl_strategies.overrides import refuse_overrides
from dpfl_strategies.privacy_request import PrivacyRequest
from dpfl_strategies.private_arguments import check_arguments, gathering_for, model_of, rounding_for
from dpfl_strategies.private_rounds import PrivateRounds
from dpfl_strategies.private_run import PrivatePlan
from dpfl_strategies.result import PrivateResult, Stopped
from dpfl_strategies.round_loop import EvaluateFn, LoopHooks, completed, hand_over, run_rounds
from dpfl_strategies.run_files import RunFiles
from dpfl_strategies.server_optimizers import FedAvg, ServerOptimizer, State
from dpfl_strategies.weighting import UniformWeighting, Weighting

log = logging.getLogger("flwr.dpfl")


class PrivateStrategy(Strategy, ABC):
    """The private pipeline; subclasses say how to weigh and how to apply a noisy mean.

    Subclass :meth:`weigh` and :meth:`apply_noisy_mean` (or :class:`DPFedAvg`, which has both);
    what must survive a round goes into the mapping ``optimizer_state``, which checkpoints keep.
    How to sample is a :class:`~dpfl_flower.accounting.Sampling`, which knows what it costs.
    Methods of the pipeline itself are final: a subclass that defines one is refused with TypeError.

    Parameters
    ----------
    sampling:
        How a cohort is drawn from the population, and so what a round costs.
    clipping:
        The bound on one unit's weighted update, fixed or adaptive.
    budget:
        The most the data set may spend. The noise follows from it.
    noise_multiplier:
        Standard deviation of the noise on the sum in clip norms, instead of (or under) a budget.
    delta, unit, relation:
        Without a budget: what epsilon is reported for. Default ``min(1e-5, 0.1 / population)``,
        node, add-or-remove-one.
    server_optimizer:
        What becomes of the noisy mean: plain averaging by default.
    weighting:
        Uniform by default; ``NumExamplesWeighting(w_max)`` for ``min(n / w_max, 1)``.
    ledger:
        File that records what the data set has spent, over all runs and models. Without one (and
        without ``checkpoint_dir``) the statement covers this run only, and says so.
    dataset:
        Name of the data set, as in the ledger's header.
    checkpoint_dir:
        Where the released model is kept after each round; ``start`` resumes from it.
    metrics:
        ``"none"`` drops client metrics; ``"not_private"`` lets them through, marked;
        :class:`~dpfl_strategies.NoisedMetrics` releases the means of bounded ones with noise that
        epsilon covers. Only for nodes that are units.
    train_metrics_aggr_fn, evaluate_metrics_aggr_fn:
        How metrics are combined, as in Flower; only with ``metrics="not_private"``.
    fraction_evaluate:
        Share of the population asked to evaluate; only with ``metrics="not_private"``.
    wait_seconds:
        How long to wait for the population before the first round.
    give_up_after:
        Consecutive rounds in which everybody who was asked failed before the run is an error;
        None never gives up.
    rounding:
        Nearest, or with a public dither; by default dithered for cohorts above 256.
    max_inflation:
        By how much rounding may enlarge the clip bound (and so the noise), 1.01 by default.
    noise_seed:
        Makes noise and coins reproducible, for tests. Such noise protects nobody: no epsilon is
        reported, and neither a ledger nor a checkpoint is allowed.
    num_nodes:
        Where each node holds many units (users, records): how many nodes there are. All of them
        are asked in every round, draw their own units by secret coins, and answer one integer sum
        (see :class:`~dpfl_flower.client.UserCohort`); ``sampling`` counts units. None (the
        default): every node is one unit.
    federated_dropout:
        Sends each node a smaller model of its own, with a random part of the hidden units; nodes
        must build their model by the shapes they are sent. Only where every node is one unit. What
        a round costs stays the same; the noise on an entry grows as fewer nodes train it.
    secure_aggregation:
        ``SecAggPlus()``: nodes bound their own vectors and mask them, so that the server learns
        nothing but the exact sum, to which it adds the noise. Apps put
        :func:`~dpfl_flower.client.secure_aggregation_mod` around their train function. A round
        with too few survivors is abandoned: nothing is released or charged. With nodes as units
        the relation must be zero-out or replace-one, because whether a round is abandoned shows
        whether a node is there. ``CKKS(...)``, with :func:`~dpfl_flower.client.ckks_mod`, is a
        weaker protocol. None (the default): the server sees each answer.

    Raises
    ------
    ValueError
        For an argument out of range, naming it, its value and the bound.
    """

    weighs_by_weighting: ClassVar[bool] = False
    """Whether `weigh` is that of ``weighting``, so that nodes can be told how to weigh."""

    _PIPELINE: Final = (
        "prepare",
        "configure_train",
        "continue_train",
        "aggregate_train",
        "configure_evaluate",
        "aggregate_evaluate",
        "start",
        "close",
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        refuse_overrides(
            cls,
            PrivateStrategy,
            PrivateStrategy._PIPELINE,
            "subclass weigh or apply_noisy_mean, or hand in a Sampling",
        )
        if "weigh" in vars(cls) and "weighs_by_weighting" not in vars(cls):
            cls.weighs_by_weighting = False

    def __init__(
        self,
        *,
        sampling: Sampling,
        clipping: ClippingPolicy,
        budget: PrivacyBudget | None = None,
        noise_multiplier: float | None = None,
        delta: float | None = None,
        unit: PrivacyUnit | str | None = None,
        relation: Relation | str | None = None,
        server_optimizer: ServerOptimizer | None = None,
        weighting: Weighting | None = None,
        ledger: str | Path | None = None,
        dataset: str = "default",
        checkpoint_dir: str | Path | None = None,
        metrics: ClientMetrics | NoisedMetrics | str = ClientMetrics.DROPPED,
        train_metrics_aggr_fn: AggregateMetrics | None = None,
        evaluate_metrics_aggr_fn: AggregateMetrics | None = None,
        fraction_evaluate: float = 1.0,
        wait_seconds: float = 600.0,
        give_up_after: int | None = 3,
        rounding: Rounding | str | None = None,
        max_inflation: float = 1.01,
        noise_seed: int | None = None,
        num_nodes: int | None = None,
        federated_dropout: FederatedDropout | None = None,
        secure_aggregation: SecureAggregation | None = None,
    ) -> None:
        request = PrivacyRequest.parse(
            sampling=sampling,
            budget=budget,
            noise_multiplier=noise_multiplier,
            delta=delta,
            unit=unit,
            relation=relation,
        )
        check_arguments(
            clipping=clipping,
            server_optimizer=server_optimizer,
            weighting=weighting,
            ledger=ledger,
            dataset=dataset,
            checkpoint_dir=checkpoint_dir,
            give_up_after=give_up_after,
            noise_seed=noise_seed,
            secure_aggregation=secure_aggregation,
        )
        noised = metrics if isinstance(metrics, NoisedMetrics) else None
        self._gate = MetricsGate(
            metrics,
            fraction_evaluate=fraction_evaluate,
            train_metrics_aggr_fn=train_metrics_aggr_fn,
            evaluate_metrics_aggr_fn=evaluate_metrics_aggr_fn,
        )
        self.weighting = weighting or UniformWeighting()
        self.server_optimizer = server_optimizer or FedAvg()
        self.optimizer_state: State = {}
        checks.at_least(1, max_inflation=max_inflation)
        rng = secure() if noise_seed is None else SeededRandom(noise_seed)
        self._federated_dropout = federated_dropout
        self._gathering = gathering_for(
            request,
            rng=rng,
            weigh=self.weigh,
            weighting=self.weighting,
            weighs_by_weighting=self.weighs_by_weighting,
            num_nodes=num_nodes,
            federated_dropout=federated_dropout,
            secure_aggregation=secure_aggregation,
            noised_metrics=noised,
        )
        self._plan = PrivatePlan(
            files=RunFiles.of(
                request, dataset=dataset, ledger=ledger, checkpoint_dir=checkpoint_dir
            ),
            clipping=clipping,
            rounding=rounding_for(rounding, sampling),
            max_inflation=max_inflation,
            mean_weight=self.weighting.mean_weight,
            rng=rng,
            choose_grid=self._gathering.choose_grid,
            noised_metrics=noised,
        )
        self._rounds = PrivateRounds(
            self._plan, self._gathering, wait_seconds=wait_seconds, give_up_after=give_up_after
        )
        self._evaluating: frozenset[int] = frozenset()

    # --- named points to subclass ---------------------------------------------------------------

    @abstractmethod
    def weigh(self, num_examples: float) -> float:
        """Return the weight, in [0, 1], of a unit that reports ``num_examples`` (NaN if none).

        The weight is applied before clipping, so any value in range keeps the sensitivity, as long
        as it is made of this unit's number and public constants: remember nothing between units.
        A value out of range, or an exception, costs the unit the round.
        """

    @abstractmethod
    def apply_noisy_mean(
        self, model: NDArray[np.float64], mean_update: NDArray[np.float64], server_round: int
    ) -> NDArray[np.float64]:
        """Return the next model, shape ``(d,)``, from the current one and the released noisy mean.

        All released arrays are concatenated in the order of the model's names.
        """

    def settings(self) -> dict[str, str]:
        """Return what may not change between the parts of a resumed run, as text by name."""
        return {
            "strategy": type(self).__name__,
            "sampling": repr(self._plan.request.sampling),
            "clipping": repr(self._plan.clipping),
            "weighting": repr(self.weighting),
            "server_optimizer": repr(self.server_optimizer),
            "rounding": str(self._plan.rounding),
            "max_inflation": repr(self._plan.max_inflation),
            "nodes": self._gathering.name,
            "federated_dropout": repr(self._federated_dropout),
            "noised_metrics": repr(self._plan.noised_metrics),
            "unit": str(self._plan.request.unit),
            "relation": str(self._plan.request.relation),
        }

    # --- the private pipeline: final ------------------------------------------------------------

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
        """Run ``num_rounds`` private rounds, going on from the checkpoint where there is one.

        Parameters and records are Flower's. A budget that runs out ends the run with the last
        released model; ``result.stopped`` says so.

        Raises
        ------
        AllClientsFailed
            If everybody who was asked failed, ``give_up_after`` rounds in a row or always. Its
            ``result`` holds the last released model.
        PopulationNotReached
            If too few nodes connected.
        LedgerError, CheckpointError
            If the files are damaged, in use, or belong to another run.
        """
        checks.positive_int(num_rounds=num_rounds)
        self._gathering.stage_seconds = timeout
        arrays = self.prepare(initial_arrays, num_rounds)
        run, report = self._rounds.running(), self._rounds.report
        result = PrivateResult(signal_to_noise=report.signal_to_noise)
        try:
            self.summary()
            with completed(result, lambda: self._complete(result, grid)):
                run_rounds(
                    self,
                    LoopHooks(
                        failures=self._rounds.failures,
                        stop_reason=lambda: None if run.affordable else Stopped.BUDGET_SPENT,
                        progress=lambda done: report.progress(run, done, num_rounds),
                        proceed=self.continue_train,
                    ),
                    result,
                    grid=grid,
                    arrays=arrays,
                    first_round=run.state.server_round + 1,
                    num_rounds=num_rounds,
                    timeout=timeout,
                    train_config=train_config,
                    evaluate_config=evaluate_config,
                    evaluate_fn=evaluate_fn,
                )
            return result
        finally:
            self.close()

    @final
    def prepare(self, initial_arrays: ArrayRecord, num_rounds: int) -> ArrayRecord:
        """Open ledger and checkpoint and fix the plan; return the arrays to begin with.

        ``start`` calls it. Call it yourself only for a loop of your own, and ``close`` after.
        """
        self._try_weigh()
        run = self._rounds.begin(
            lambda: model_of(initial_arrays, self._federated_dropout), num_rounds, self.settings
        )
        self.optimizer_state = dict(run.state.optimizer_state)
        return to_record(run.state.model)

    @final
    def close(self) -> None:
        """Let go of the ledger; a strategy may be started again afterwards."""
        self._rounds.close()

    @final
    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Draw a fresh cohort and return one message for each of its nodes (maybe none)."""
        return self._rounds.ask(server_round, arrays, config, grid)

    @final
    def continue_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> Iterable[Message] | None:
        """Return the messages that follow from these replies, None where they are the last ones.

        Only secure aggregation takes more than one exchange. ``start`` calls it; in a loop of your
        own, send what it returns and call it again with the replies, until it returns None; then
        hand the last replies to ``aggregate_train``.
        """
        return self._rounds.proceed(server_round, replies)

    @final
    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Bound, sum, charge, add noise, step, save; return the released model and metrics.

        None for the model where secure aggregation had to abandon the round: nothing is charged.

        Raises
        ------
        RuntimeError
            If the round was not configured, or was aggregated already.
        BudgetExhausted
            If the budget does not allow the release; nothing is charged or released.
        """
        released = self._rounds.aggregate(server_round, replies, self._step)
        if released is None:
            return None, None
        metrics = self._gate.of_training(released.contents)
        if released.metrics:
            metrics = MetricRecord(dict(released.metrics))
        return to_record(released.arrays), metrics

    @final
    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask nodes to evaluate, only where their metrics are let through as not private."""
        nodes = self._gate.evaluators(self._rounds.registry.node_ids(grid))
        self._evaluating = frozenset(nodes)
        return to_messages(
            nodes, MessageType.EVALUATE, server_round=server_round, arrays=arrays, config=config
        )

    @final
    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return the nodes' metrics, marked, None where they are dropped."""
        return self._gate.of_evaluation(replies, asked=self._evaluating, group=str(server_round))

    # --- what the user sees ---------------------------------------------------------------------

    @property
    def clip_norm(self) -> float:
        """The clip norm of the next round, a released value."""
        run = self._rounds.run
        return self._plan.clipping.initial_clip_norm if run is None else run.clip_norm

    @property
    def noise_multiplier(self) -> float | None:
        """The noise multiplier that the ledger charges, None until the plan is fixed."""
        run = self._rounds.run
        return None if run is None else run.noise_multiplier

    def privacy_spent(self) -> PrivacyStatement | None:
        """Return what the data set has spent; None where the noise was seeded.

        Only while the strategy runs; afterwards it is ``result.privacy``.
        """
        return self._rounds.running().ledger.spent() if self._plan.rng.protects else None

    def summary(self) -> None:
        """Log what will be done, before the first round."""
        self._rounds.report.summary(self._rounds.run, self._gathering, metrics=self._gate.open)

    # --- inside ---------------------------------------------------------------------------------

    def _step(
        self, model: NDArray[np.float64], mean_update: NDArray[np.float64], server_round: int
    ) -> tuple[NDArray[np.float64], State]:
        stepped = self.apply_noisy_mean(model, mean_update, server_round)
        found = getattr(stepped, "shape", None)
        if found != model.shape:
            what = type(stepped).__name__ if found is None else f"shape {found}"
            raise TypeError(
                f"{type(self).__name__}.apply_noisy_mean returned {what}, must be a float64 array "
                f"of shape {model.shape}, the next model"
            )
        if not np.all(np.isfinite(stepped)):
            log.warning("The model of round %d is not finite: training has failed", server_round)
        return stepped, self.optimizer_state

    def _try_weigh(self) -> None:
        """Let a mistake in `weigh` end the run before anything is charged, not every unit's round.

        Raises
        ------
        ValueError
            For a weight out of range; or whatever `weigh` raises.
        """
        weight = self.weigh(1.0)
        if not 0 <= weight <= 1:
            raise ValueError(
                f"{type(self).__name__}.weigh(1.0)={weight!r} must be in [0, 1]: scale by a public "
                "constant, as NumExamplesWeighting(w_max) does"
            )

    def _complete(self, result: PrivateResult, grid: Grid) -> None:
        """Say what it cost, and leave the last released model where the run's files go."""
        if result.stopped is Stopped.ALL_CLIENTS_FAILED:
            # The round in which the run gave up was charged and released like any other.
            state = self._rounds.running().state
            result.arrays, result.rounds = to_record(state.model), state.server_round
        result.privacy = self.privacy_spent()
        result.metrics_not_covered = self._gate.open
        result.metric_noise = self._rounds.running().metric_noise
        hand_over(result, grid)
