"""DP-FedAvg that trusts nobody but each node with its own data: nodes add all of the noise.

What a node answers is private already, so that averaging, momentum and checkpoints are
post-processing. The server names the noise; each node obeys as far as its own policy allows,
charges its own ledger and says what it has spent.
"""

import logging
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any, final

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from dpfl_flower import checks
from dpfl_flower.accounting import PrivacyBudget, PrivacyUnit, Relation, Sampling
from dpfl_flower.client.local_noise import LocalLaw, LocalNoise
from dpfl_flower.clipping import FixedClipping
from dpfl_flower.layout import ArrayLayout
from dpfl_flower.quantize import to_float
from dpfl_flower.secagg import SecureAggregation
from dpfl_strategies.checkpoint import CheckpointDirectory, RunState
from dpfl_strategies.claim_book import ClaimBook
from dpfl_strategies.claimed_sums import ClaimedSums
from dpfl_strategies.local_plan import LocalPlan, noise_of_run, noise_settings
from dpfl_strategies.local_report import LocalReport
from dpfl_strategies.local_round import OpenRound, masked_round
from dpfl_strategies.messages import Arrays, from_record, to_record
from dpfl_strategies.nobody_evaluates import NobodyEvaluates
from dpfl_strategies.node_privacy import NodePrivacyReport
from dpfl_strategies.overrides import NOISE_BY_NODES, refuse_overrides
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
from dpfl_strategies.server_optimizers import FedAvg, ServerOptimizer, State
from dpfl_strategies.shuffled_reports import ShuffledReports

log = logging.getLogger("flwr.dpfl")


@final
class LocalDPFedAvg(NobodyEvaluates):
    """DP-FedAvg with all of the noise added by each node itself (trust model ``local``).

    All nodes are asked in every round, and answer their bounded update, or the sum of their units'
    bounded updates, in integers with noise: apps put ``mods=[local_noise_mod(dataset=...)]`` around
    their train function or their :func:`~dpfl_flower.client.users.user_cohort_app`. The guarantee
    is each node's own, against everybody who sees its answer, the server included.

    The noisy sum is divided by a public number, that of the nodes or of the units that are expected
    to take part; a node that does not answer makes the step shorter. Dividing by the number of
    answers would cost no privacy (it is post-processing, and the server sees who answers), and
    changes nothing but the length of the step. The fixed number is the better length: the noise of
    the mean is then never more than planned, and over rounds each counts in proportion to its
    answers, which is how means of so many noisy answers are best combined.

    Parameters
    ----------
    clipping:
        The bound on one unit's update: L2 for Gaussian noise, L1 for Laplace noise.
    num_nodes:
        How many nodes there are.
    budget:
        The most that the data set *of each node* may spend. The noise follows from it, and nodes'
        ledgers hold to it.
    noise_multiplier:
        Noise over clip norm instead of a budget: standard deviation, or scale of Laplace noise.
    delta, unit, relation:
        Without a budget: what epsilon is reported for. A node as the unit needs replace-one, which
        is its default.
    sampling:
        Of users or examples inside nodes, over all of them: ``EveryoneSampling`` or
        ``PoissonSampling``, whose secret coins each node draws for its own units. Those amplify,
        also against the server, as far as it sees noisy sums only: how long a node takes tells of
        the size of its sample, which nothing here hides. None where the node is the unit.
    noise:
        ``"gaussian"`` or ``"laplace"``.
    max_inflation:
        How much longer than the clip norm the enforced bound may be.
    shuffled_reports:
        Only where somebody who does not work with the server mixes the reports of each round, and
        strips them of their senders and claims, before whoever is to be protected from sees them:
        how many are certain to be mixed. What that adds is reported as ``result.shuffled``, beside
        epsilon, which stays what each node claims. Flower alone shows the server every sender, and
        secure aggregation is no shuffler: leave it out there.
    server_optimizer:
        What becomes of the noisy mean: plain averaging by default.
    checkpoint_dir:
        Where the model is kept after each round; ``start`` resumes from it. What a node charged for
        a round that the server forgot in a crash stays charged; one without a ledger file forgets
        it with the run, and then no claim has it.
    wait_seconds, give_up_after:
        As in :class:`~dpfl_strategies.private_strategy.PrivateStrategy`.
    secure_aggregation:
        ``SecAggPlus()``: nodes mask their noisy integers, so that the server sees the noisy sum and
        what each node claims. Apps put ``mods=[secure_aggregation_mod, local_noise_mod(...)]``
        around their train function. Epsilon stays what each node claims, against everybody who sees
        its answer. A round with too few survivors is abandoned and stays charged.

    Raises
    ------
    ValueError
        For an argument out of range, naming it, its value and the bound.

    Examples
    --------
    >>> strategy = LocalDPFedAvg(
    ...     budget=PrivacyBudget(8.0, delta=1e-5, unit="node", relation="replace-one"),
    ...     clipping=FixedClipping(0.5),
    ...     num_nodes=1000,
    ... )
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        refuse_overrides(
            cls,
            LocalDPFedAvg,
            NOISE_BY_NODES,
            "server_optimizer= is what becomes of the noisy mean",
        )

    def __init__(
        self,
        *,
        clipping: FixedClipping,
        num_nodes: int,
        budget: PrivacyBudget | None = None,
        noise_multiplier: float | None = None,
        delta: float | None = None,
        unit: PrivacyUnit | str | None = None,
        relation: Relation | str | None = None,
        sampling: Sampling | None = None,
        noise: LocalLaw | str = LocalLaw.GAUSSIAN,
        max_inflation: float = 1.01,
        shuffled_reports: int | None = None,
        server_optimizer: ServerOptimizer | None = None,
        checkpoint_dir: str | Path | None = None,
        wait_seconds: float = 600.0,
        give_up_after: int | None = 3,
        secure_aggregation: SecureAggregation | None = None,
    ) -> None:
        checks.instance(ServerOptimizer, type(None), server_optimizer=server_optimizer)
        checks.instance(str, Path, type(None), checkpoint_dir=checkpoint_dir)
        if give_up_after is not None:
            checks.positive_int(give_up_after=give_up_after)
        self._plan = LocalPlan.parse(
            sampling=sampling,
            clipping=clipping,
            num_nodes=num_nodes,
            budget=budget,
            noise_multiplier=noise_multiplier,
            delta=delta,
            unit=unit,
            relation=relation,
            law=noise,
            max_inflation=max_inflation,
        )
        self._secure = None
        if secure_aggregation is not None:
            self._secure = ClaimedSums(secure_aggregation, population=num_nodes)
        self._stated = ShuffledReports.parse(
            shuffled_reports,
            num_nodes=num_nodes,
            unit=self._plan.request.unit,
            masked=self._secure is not None,
        )
        self._shuffled = self._stated
        self._stage_seconds = 3600.0
        self.server_optimizer = server_optimizer or FedAvg()
        self._checkpoints = None if checkpoint_dir is None else CheckpointDirectory(checkpoint_dir)
        self._wait_seconds, self._give_up_after = wait_seconds, give_up_after
        self._failures = FailureWatch(give_up_after)
        self._registry = Registry(num_nodes, wait_seconds=wait_seconds)
        self._claims = ClaimBook()
        self._optimizer_state: State = {}
        self._report = LocalReport(self._plan, self.server_optimizer)
        self._noise: LocalNoise | None = None
        self._affordable = 0
        self._settings: dict[str, str] = {}
        self._run_name = ""
        self._done = 0
        self._open: OpenRound | None = None

    @property
    def noise(self) -> LocalNoise | None:
        """What nodes are asked for, with its multiplier; None until a run has begun."""
        return self._noise

    @property
    def clip_norm(self) -> float:
        """The clip norm of every round."""
        return self._plan.clipping.clip_norm

    @property
    def noise_multiplier(self) -> float | None:
        """The noise of each node over the clip norm, None until a run has begun."""
        return None if self._noise is None else self._noise.noise_multiplier

    @property
    def node_privacy(self) -> NodePrivacyReport:
        """The newest claim of each node."""
        return self._claims.report

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

        Parameters and records are Flower's; ``timeout`` holds for each exchange of a round, of
        which secure aggregation takes several. A budget that does not pay for all rounds with the
        noise multiplier given ends the run with the last model.

        Raises
        ------
        AllClientsFailed, PopulationNotReached, CheckpointError
            As for :class:`~dpfl_strategies.private_strategy.PrivateStrategy`.
        ValueError
            If there is no noise within the budget, or no grid fine enough for it.
        """
        checks.positive_int(num_rounds=num_rounds)
        self._failures = FailureWatch(self._give_up_after)
        self._registry = Registry(self._plan.num_nodes, wait_seconds=self._wait_seconds)
        self._report = LocalReport(self._plan, self.server_optimizer)
        self._open, self._stage_seconds = None, timeout
        arrays = self._resume(initial_arrays, num_rounds)
        self.summary()
        result = PrivateResult(signal_to_noise=self._report.signal_to_noise)
        with completed(result, lambda: self._complete(result, grid)):
            run_rounds(
                self,
                LoopHooks(
                    self._failures,
                    stop_reason=self._stop_reason,
                    progress=self._progress,
                    proceed=self.continue_train,
                ),
                result,
                grid=grid,
                arrays=arrays,
                first_round=self._done + 1,
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
        """Ask every node for its noisy answer."""
        if self._noise is None:
            raise RuntimeError("the strategy is not running: call start()")
        nodes = self._registry.node_ids(grid)
        if len(nodes) > self._plan.num_nodes:
            raise ValueError(
                f"num_nodes={self._plan.num_nodes} must be >= {len(nodes)}, the nodes that are "
                "registered: the sum is divided by that number"
            )
        reference = from_record(arrays)
        request = self._plan.ask(
            self._noise, dimension=ArrayLayout.of(reference).dimension, server_round=server_round
        )
        if self._stated.stated is not None:
            # What is mixed from here on is seen, also where a crash keeps this round from ending.
            self._save(reference, self._shuffled.lost())
        masked = None
        if self._secure is not None:
            masked = masked_round(
                self._secure,
                self._plan,
                request,
                nodes,
                arrays=arrays,
                config=config,
                grid=grid,
                stage_seconds=self._stage_seconds,
                claims=self._claims,
            )
        self._open = OpenRound(request, frozenset(nodes), reference, masked)
        return self._open.messages(nodes, arrays=arrays, config=config)

    def continue_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> Iterable[Message] | None:
        """Return the messages of the next exchange, None once the round can be aggregated."""
        return self._opened(server_round).proceed(replies)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Add up, step, save; return the next model, None where nobody answered.

        And None where secure aggregation had to abandon the round.

        Raises
        ------
        RuntimeError
            If the round was not configured, is not finished, or was aggregated already.
        """
        opened = self._opened(server_round)
        summed, request = opened.gathered(replies, self._plan, self._claims), opened.request
        self._open = None
        self._done = server_round
        self._shuffled = self._shuffled.after(came=summed.came, valid=summed.valid)
        if not summed.valid:
            self._save(opened.reference, self._shuffled)
            self._failures.record(asked=len(opened.nodes), answered=0)
            return None, None
        mean = to_float(
            summed.total,
            request.grid.unit_size(request.noise.clip_norm),
            self._plan.expected_units,
        )
        self._report.averaged(mean, request, answers=summed.valid)
        layout = ArrayLayout.of(opened.reference)
        vector, self._optimizer_state = self.server_optimizer.step(
            layout.flatten(opened.reference), mean, self._optimizer_state
        )
        model = layout.restore(vector, opened.reference)
        self._save(model, self._shuffled)
        self._failures.record(asked=len(opened.nodes), answered=summed.valid)
        return to_record(model), None

    def summary(self) -> None:
        """Log what will be done, before the first round."""
        self._report.summary(self._noise, secure=self._secure)

    def _opened(self, server_round: int) -> OpenRound:
        if self._open is None or self._open.request.server_round != server_round:
            raise RuntimeError(f"round {server_round} was not configured, or is aggregated already")
        return self._open

    def _complete(self, result: PrivateResult, grid: Grid) -> None:
        assert self._noise is not None and result.arrays is not None
        result.node_privacy = self.node_privacy
        result.shuffled = self._shuffled.statement(
            self._noise,
            rounds=self._done,
            dimension=ArrayLayout.of(from_record(result.arrays)).dimension,
        )
        hand_over(result, grid)

    def _stop_reason(self) -> Stopped | None:
        return Stopped.BUDGET_SPENT if self._done >= self._affordable else None

    def _progress(self, server_round: int) -> str:
        return self._report.progress(server_round, largest=self._claims.largest)

    def _save(self, model: Arrays, shuffled: ShuffledReports) -> None:
        if self._checkpoints is not None:
            self._checkpoints.save(
                RunState(
                    run=self._run_name,
                    server_round=self._done,
                    model=model,
                    optimizer_state=self._optimizer_state,
                    settings={**self._settings, **shuffled.to_settings()},
                    claims=self._claims.to_json(),
                )
            )

    def _resume(self, initial_arrays: ArrayRecord, num_rounds: int) -> ArrayRecord:
        """Prepare the run, from its checkpoint where there is one, and return the first model."""
        layout = ArrayLayout.of(from_record(initial_arrays))
        fixed = {
            "strategy": type(self).__name__,
            "server_optimizer": repr(self.server_optimizer),
            "shuffled_reports": repr(self._stated.stated),
            "secure_aggregation": repr(self._secure),
            **self._plan.fixed(num_rounds),
        }
        state = None if self._checkpoints is None else self._checkpoints.load()
        planned = self._plan.noise(num_rounds)
        if state is None:
            self._noise = planned.resolved()
            self._run_name, self._done = uuid.uuid4().hex, 0
            self._claims, self._optimizer_state = ClaimBook(), {}
            self._shuffled = self._stated
        else:
            layout.check(state.model)
            self._noise = noise_of_run(planned, state, fixed)
            self._run_name, self._done = state.run, state.server_round
            self._claims = ClaimBook(state.claims)
            self._shuffled = self._stated.resumed(dict(state.settings))
            self._optimizer_state = dict(state.optimizer_state)
            log.info("Resuming run %s after round %d", state.run, state.server_round)
        self._plan.check_dimension(self._noise, layout.dimension)  # before anybody waits for a node
        self._affordable = self._plan.affordable(self._noise)
        self._settings = {**fixed, **noise_settings(self._noise)}
        return initial_arrays if state is None else to_record(state.model)
