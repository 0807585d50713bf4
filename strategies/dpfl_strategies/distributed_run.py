"""A run with distributed noise, from its plan to its last round: ledger, checkpoint, state."""

import dataclasses
import json
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpfl_flower.accounting import Event, Ledger
from dpfl_flower.client.distributed_request import DistributedRequest
from dpfl_flower.distributed import DistributedPlan
from dpfl_flower.layout import ArrayLayout
from dpfl_flower.quantize import decoded
from dpfl_flower.rng import secure
from dpfl_strategies.checkpoint import RunState
from dpfl_strategies.messages import Arrays
from dpfl_strategies.privacy_request import PrivacyRequest
from dpfl_strategies.run_files import RunFiles, let_go, plan_part, require_same_settings
from dpfl_strategies.server_optimizers import State

__all__ = ["DistributedRun", "DistributedSettings"]

_SEED_BYTES = 16
_PLAN = "plan"
_NUM_ROUNDS = "num_rounds"

DesignFn = Callable[[int, int, tuple[Event, ...]], DistributedPlan]
"""Given dimension, rounds and what was released before, returns the plan of a run."""


@dataclass(frozen=True, kw_only=True)
class DistributedSettings:
    """Everything a run is made of that is known before its first round."""

    files: RunFiles
    design: DesignFn
    sampling_rate: float | None

    @property
    def request(self) -> PrivacyRequest:
        """What the user asked for."""
        return self.files.request

    def open(
        self, initial_model: Arrays, num_rounds: int, *, settings: Mapping[str, str]
    ) -> "DistributedRun":
        """Open the ledger, go on from the checkpoint or begin a new run.

        Raises
        ------
        LedgerError, CheckpointError
            If a file is damaged, in use, or belongs to another run.
        ValueError
            If there is no plan within the budget, or none that fits the modulus.
        """
        layout = ArrayLayout.of(initial_model)

        def start(ledger: Ledger, saved: RunState | None) -> "DistributedRun":
            begun = saved is None
            if saved is None:
                plan = self.design(layout.dimension, num_rounds, tuple(ledger.events()))
                self.request.check_one_release(plan.event)
                saved = RunState(
                    run=uuid.uuid4().hex,
                    server_round=0,
                    model=initial_model,
                    settings={
                        **settings,
                        _PLAN: json.dumps(plan.to_fields(), sort_keys=True),
                        _NUM_ROUNDS: str(num_rounds),
                    },
                )
            else:
                # Nodes' ledgers plan for the number of rounds, and so did the calibration.
                require_same_settings(saved, {**settings, _NUM_ROUNDS: str(num_rounds)})
                layout.check(saved.model)
                self.files.go_on(ledger, saved)
                plan = DistributedPlan.from_fields(json.loads(saved.settings[_PLAN]))
            part = plan_part(
                ledger, saved, plan.event, num_rounds, total_variation=plan.total_variation
            )
            if begun:
                saved = self.files.begin(ledger, saved)
            return DistributedRun(self, ledger, part, plan, saved, num_rounds)

        return self.files.opened(start)


class DistributedRun:
    """The state of a run between rounds; every release is charged first and saved before it."""

    def __init__(
        self,
        settings: DistributedSettings,
        ledger: Ledger,
        part: str,
        plan: DistributedPlan,
        state: RunState,
        num_rounds: int,
    ) -> None:
        self._settings = settings
        self._part = part
        self._num_rounds = num_rounds
        self.ledger = ledger
        self.plan = plan
        self.state = state
        self.layout = ArrayLayout.of(state.model)

    @property
    def affordable(self) -> bool:
        """Whether the budget allows another round."""
        return self.ledger.affordable(self._part, 1) >= 1

    def request(self, server_round: int) -> DistributedRequest:
        """Return what nodes are asked for in a round, with a fresh public seed."""
        return DistributedRequest(
            plan=self.plan,
            server_round=server_round,
            num_rounds=self._num_rounds,
            rotation_seed=secure().random_bytes(_SEED_BYTES),
            sampling_rate=self._settings.sampling_rate,
        )

    def charge_and_decode(
        self, total: NDArray[np.int64], request: DistributedRequest
    ) -> NDArray[np.float64]:
        """Charge the ledger for the round and return the noisy mean that ``total`` stands for."""
        self.ledger.charge(self._part, note={"round": request.server_round})
        return decoded(
            total,
            self.plan.grid,
            clip_norm=self.plan.clip_norm,
            rotation_seed=request.rotation_seed,
            expected_cohort=self._settings.request.sampling.expected_cohort,
        )

    def commit(
        self,
        server_round: int,
        *,
        model: NDArray[np.float64],
        template: Arrays,
        optimizer_state: State,
    ) -> Mapping[str, NDArray[Any]]:
        """Save the round's model, then return it for release; arrays are named as in the model."""
        self.state = dataclasses.replace(
            self.state,
            server_round=server_round,
            model=self.layout.restore(model, template),
            optimizer_state=optimizer_state,
            ledger=self.ledger.position,
        )
        self._settings.files.save(self.state)
        return self.state.model

    def close(self) -> None:
        """Let go of the ledger."""
        let_go(self.ledger)
