"""A private run from its plan to its last round: ledger, checkpoint, integers, state."""

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpfl_flower.accounting import BudgetExhausted, Gaussian, Ledger, UnsupportedEvent
from dpfl_flower.client.contribution import SumBound, UpdateRequest
from dpfl_flower.client.users.request import CohortRequest
from dpfl_flower.clipping import AdaptiveClipping, ClippingPolicy
from dpfl_flower.layout import ArrayLayout
from dpfl_flower.metric_ranges import NO_METRICS, MetricRanges
from dpfl_flower.noise.rounded_gaussian import MAX_SCALE, RoundedGaussian
from dpfl_flower.quantize import BoundedSum, IntegerGrid, Rounding
from dpfl_flower.rng import RandomSource
from dpfl_strategies.central_release import CentralRelease, NoisyMean
from dpfl_strategies.checkpoint import RunState
from dpfl_strategies.messages import Arrays
from dpfl_strategies.noised_metrics import NoisedMetrics
from dpfl_strategies.privacy_request import PrivacyRequest
from dpfl_strategies.run_files import RunFiles, let_go, plan_part, require_same_settings
from dpfl_strategies.server_optimizers import State

_SEED_BYTES = 16
_WORTH_A_RUN = 0.01
"""A run that begins needs this share of the budget; one that resumes needs one more release."""

GridOf = Callable[[int], IntegerGrid]
"""Given the least standard deviation of the noise in grid units, the grid of a run."""


@dataclass(frozen=True)
class PrivatePlan:
    """Everything a run is made of that is known before its first round.

    ``settings`` names, as text, what may not change between the parts of a resumed run;
    ``choose_grid`` picks among the grids that differ in how coarse they may be.
    """

    files: RunFiles
    clipping: ClippingPolicy
    rounding: Rounding
    max_inflation: float
    mean_weight: float
    rng: RandomSource
    choose_grid: Callable[[GridOf], IntegerGrid]
    noised_metrics: NoisedMetrics | None = None

    @property
    def request(self) -> PrivacyRequest:
        """What the user asked for."""
        return self.files.request

    @property
    def ranges(self) -> MetricRanges:
        """The metrics that are released with each mean, maybe none."""
        return NO_METRICS if self.noised_metrics is None else self.noised_metrics.ranges

    def open(
        self, initial_model: Arrays, num_rounds: int, *, settings: Mapping[str, str]
    ) -> "PrivateRun":
        """Open the ledger, go on from the checkpoint or begin a new run.

        Raises
        ------
        LedgerError, CheckpointError
            If a file is damaged, in use, or belongs to another run.
        """
        ArrayLayout.of(initial_model)

        def start(ledger: Ledger, saved: RunState | None) -> "PrivateRun":
            if saved is None:
                return self._begin(ledger, initial_model, num_rounds, settings)
            return self._resume(ledger, initial_model, saved, num_rounds, settings)

        return self.files.opened(start)

    def _begin(
        self, ledger: Ledger, model: Arrays, num_rounds: int, settings: Mapping[str, str]
    ) -> "PrivateRun":
        # The scale of the noise is not known yet: no table strays further than the largest one's.
        most = RoundedGaussian(MAX_SCALE).total_variation
        entries = ArrayLayout.of(model).dimension + 1 + len(self.ranges)
        if self.request.noise_multiplier is None:
            _require_worthwhile(ledger, num_rounds)
        else:
            release = self.request.sampling.event(Gaussian(self.request.noise_multiplier))
            self.request.check_one_release(release)
        try:
            multiplier = self.request.solve(
                num_rounds, prior=ledger.events(), total_variation=most * entries * num_rounds
            )
            with self.request.naming_the_budget(multiplier, num_rounds):
                grid = self._grid(model, multiplier)
        except UnsupportedEvent:
            raise
        except ValueError as error:
            if self.request.noise_multiplier is None and ledger.events():
                raise _too_little_left(ledger, num_rounds) from error
            raise
        state = RunState(
            run=uuid.uuid4().hex,
            server_round=0,
            model=model,
            clip_norm=self.clipping.initial_clip_norm,
            settings={**settings, "noise_multiplier": repr(multiplier)},
        )
        part = self._plan_part(ledger, grid, state, num_rounds)
        return PrivateRun(self, ledger, part, grid, self.files.begin(ledger, state))

    def _resume(
        self,
        ledger: Ledger,
        model: Arrays,
        saved: RunState,
        num_rounds: int,
        settings: Mapping[str, str],
    ) -> "PrivateRun":
        ArrayLayout.of(saved.model).check(model)
        current = dict(settings)
        if self.request.noise_multiplier is not None:
            current["noise_multiplier"] = repr(self.request.noise_multiplier)
        require_same_settings(saved, current)
        self.files.go_on(ledger, saved)
        grid = self._grid(model, _noise_multiplier(saved))
        part = self._plan_part(ledger, grid, saved, num_rounds)
        return PrivateRun(self, ledger, part, grid, saved)

    def _plan_part(
        self, ledger: Ledger, grid: IntegerGrid, state: RunState, num_rounds: int
    ) -> str:
        """Write down what this part of the run is going to release; return its name."""
        draws = RoundedGaussian(grid.noise_units).total_variation if grid.noise_units else 0.0
        event = self.request.sampling.event(Gaussian(_noise_multiplier(state)))
        return plan_part(ledger, state, event, num_rounds, total_variation=draws * grid.width)

    def _grid(self, model: Arrays, multiplier: float) -> IntegerGrid:
        indicator_noise = None
        if isinstance(self.clipping, AdaptiveClipping):
            indicator_noise = self.clipping.indicator_stddev(
                multiplier, self.request.sampling.expected_cohort
            )
        metrics = self.noised_metrics

        def at_least(noise_units: int) -> IntegerGrid:
            return IntegerGrid.for_noise_multiplier(
                multiplier,
                ArrayLayout.of(model).dimension,
                rounding=self.rounding,
                indicator_noise=indicator_noise,
                num_metrics=len(self.ranges),
                metric_share=1 if metrics is None else metrics.share,
                max_inflation=self.max_inflation,
                least_noise_units=noise_units,
            )

        return self.choose_grid(at_least)


class PrivateRun:
    """The state of a run between rounds; every change is charged first and saved before release."""

    def __init__(
        self,
        plan: PrivatePlan,
        ledger: Ledger,
        part: str,
        grid: IntegerGrid,
        state: RunState,
    ) -> None:
        self._plan = plan
        self._grid = grid
        self.ledger = ledger
        self.state = state
        self._part = part
        self.noise_multiplier = _noise_multiplier(state)
        self.layout = ArrayLayout.of(state.model)
        self._release = CentralRelease(
            grid,
            ledger=ledger,
            run=part,
            rng=plan.rng,
            expected_cohort=plan.request.sampling.expected_cohort,
            mean_weight=plan.mean_weight,
        )

    @property
    def clip_norm(self) -> float:
        """The clip norm of the next round."""
        return (
            self._plan.clipping.initial_clip_norm
            if self.state.clip_norm is None
            else self.state.clip_norm
        )

    @property
    def affordable(self) -> bool:
        """Whether the budget allows another round."""
        return self.ledger.affordable(self._part, 1) >= 1

    def dither_seed(self) -> bytes | None:
        """Return a fresh public seed for a round's dither, None where rounding is nearest."""
        dithered = self._grid.rounding is Rounding.DITHERED
        return self._plan.rng.random_bytes(_SEED_BYTES) if dithered else None

    def open_sum(self, dither_seed: bytes | None) -> BoundedSum:
        """Return an empty sum for the next round."""
        return BoundedSum(self._grid, clip_norm=self.clip_norm, dither_seed=dither_seed)

    def cohort_request(
        self, server_round: int, *, sampling_rate: float, dither_seed: bytes | None
    ) -> CohortRequest:
        """Return what a node of many units is asked for in the next round."""
        return CohortRequest(
            grid=self._grid,
            clip_norm=self.clip_norm,
            server_round=server_round,
            dither_seed=dither_seed,
            sampling_rate=sampling_rate,
        )

    @property
    def width(self) -> int:
        """Entries of one unit's vector."""
        return self._grid.width

    @property
    def largest_entry(self) -> int:
        """No entry of one unit's vector is larger in absolute value."""
        return self._grid.largest_entry

    @property
    def ranges(self) -> MetricRanges:
        """The metrics that ride behind each unit's update, maybe none."""
        return self._plan.ranges

    @property
    def metric_noise(self) -> dict[str, float]:
        """Standard deviation of the noise on each released mean metric, a public constant."""
        if not self.ranges:
            return {}
        cohort = self._plan.request.sampling.expected_cohort
        return self.ranges.spread(self._grid.metric_noise / cohort)

    def update_request(
        self, bound: SumBound, *, dither_seed: bytes | None, w_max: float
    ) -> UpdateRequest:
        """Return what a node that is one unit is asked for where it bounds its update itself."""
        return UpdateRequest(
            grid=self._grid,
            clip_norm=self.clip_norm,
            dither_seed=dither_seed,
            w_max=w_max,
            metrics=self.ranges,
            largest=bound.largest,
            parties=bound.parties,
        )

    def charge_and_release(self, total: NDArray[np.int64], server_round: int) -> NoisyMean:
        """Charge the ledger for the round and return the noisy mean of the integer ``total``."""
        return self._release.release(total, clip_norm=self.clip_norm, server_round=server_round)

    def commit(
        self,
        server_round: int,
        noisy: NoisyMean,
        *,
        model: NDArray[np.float64],
        template: Arrays,
        optimizer_state: State,
    ) -> Mapping[str, NDArray[Any]]:
        """Save the round's model, then return it for release; arrays are named as in the model."""
        clip_norm = self.clip_norm
        if isinstance(self._plan.clipping, AdaptiveClipping):
            assert noisy.fraction_within_clip is not None
            clip_norm = self._plan.clipping.updated(clip_norm, noisy.fraction_within_clip)
        self.state = RunState(
            run=self.state.run,
            server_round=server_round,
            model=self.layout.restore(model, template),
            clip_norm=clip_norm,
            optimizer_state=optimizer_state,
            ledger=noisy.position,
            settings=self.state.settings,
        )
        self._plan.files.save(self.state)
        return self.state.model

    def close(self) -> None:
        """Let go of the ledger."""
        let_go(self.ledger)


def _require_worthwhile(ledger: Ledger, num_rounds: int) -> None:
    """Refuse to turn the last sliver of a budget into a model that is nothing but noise."""
    budget = ledger.budget
    if budget is not None and ledger.releases:
        left = budget.epsilon - ledger.spent().epsilon
        if left < _WORTH_A_RUN * budget.epsilon:
            raise _too_little_left(ledger, num_rounds)


def _too_little_left(ledger: Ledger, num_rounds: int) -> BudgetExhausted:
    """Return the error for a ledger whose rest pays for no plan that a grid can carry."""
    spent, budget = ledger.spent(), ledger.budget
    assert budget is not None
    left = max(0.0, budget.epsilon - spent.epsilon)
    return BudgetExhausted(
        f"the ledger leaves about epsilon {left:.3g} of {budget.epsilon:g} ({spent}): too little "
        f"for num_rounds={num_rounds} rounds that are more than noise. Nothing was charged. Plan "
        "fewer rounds, or agree on a larger budget"
    )


def _noise_multiplier(state: RunState) -> float:
    return float(state.settings["noise_multiplier"])
