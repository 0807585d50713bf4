"""What a run with local noise asks of its nodes, from the user's arguments to the request.

>>> budget = PrivacyBudget(8.0, delta=1e-5, unit="node", relation="replace-one")
>>> plan = LocalPlan.parse(
...     sampling=None, clipping=FixedClipping(0.5), num_nodes=100, budget=budget,
...     noise_multiplier=None, delta=None, unit=None, relation=None, law="gaussian",
...     max_inflation=1.01,
... )
>>> noise = plan.noise(rounds=10).resolved()
>>> request = plan.ask(noise, dimension=1000, server_round=1)
>>> round(noise.noise_multiplier, 2), request.budget == budget
(3.8, True)
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from dpfl_flower import checks
from dpfl_flower.accounting import (
    EveryoneSampling,
    PoissonSampling,
    PrivacyUnit,
    Relation,
    Sampling,
    affordable_rounds,
)
from dpfl_flower.accounting.budget import PrivacyBudget
from dpfl_flower.accounting.events import count_events
from dpfl_flower.client.local_noise import LocalLaw, LocalNoise
from dpfl_flower.client.local_request import LocalRequest
from dpfl_flower.clipping import FixedClipping
from dpfl_strategies.checkpoint import RunState
from dpfl_strategies.node_privacy import NodeClaim
from dpfl_strategies.privacy_request import PrivacyRequest
from dpfl_strategies.run_files import require_same_settings

__all__ = ["LocalPlan", "claim_covers", "noise_of_run", "noise_settings"]

_NOISE_MULTIPLIER: Final = "noise_multiplier"


@dataclass(frozen=True, kw_only=True)
class LocalPlan:
    """Everything that is known before the first round, whoever the units are.

    Attributes
    ----------
    request : PrivacyRequest
        Budget or noise multiplier, delta, unit and relation of *each node's* data set.
    clipping : FixedClipping
    law : LocalLaw
    num_nodes : int
    max_inflation : float
    """

    request: PrivacyRequest
    clipping: FixedClipping
    law: LocalLaw
    num_nodes: int
    max_inflation: float

    @classmethod
    def parse(
        cls,
        *,
        sampling: Sampling | None,
        clipping: FixedClipping,
        num_nodes: int,
        budget: PrivacyBudget | None,
        noise_multiplier: float | None,
        delta: float | None,
        unit: PrivacyUnit | str | None,
        relation: Relation | str | None,
        law: LocalLaw | str,
        max_inflation: float,
    ) -> "LocalPlan":
        """Check the user's arguments against each other.

        Raises
        ------
        ValueError
            Naming the argument, its value and the bound.
        """
        checks.positive_int(num_nodes=num_nodes)
        if not isinstance(clipping, FixedClipping):
            raise ValueError(
                f"clipping={clipping!r} must be FixedClipping: an indicator of who was clipped is "
                "no part of what local noise is accounted for"
            )
        if budget is not None:
            checks.instance(PrivacyBudget, budget=budget)
            whose = budget.unit
        else:
            whose = checks.choice(PrivacyUnit, unit=unit or PrivacyUnit.NODE)
            if relation is None and whose is PrivacyUnit.NODE:
                relation = Relation.REPLACE_ONE
        request = PrivacyRequest.parse(
            sampling=_sampling(sampling, whose, num_nodes),
            budget=budget,
            noise_multiplier=noise_multiplier,
            delta=delta,
            unit=unit,
            relation=relation,
        )
        plan = cls(
            request=request,
            clipping=clipping,
            law=checks.choice(LocalLaw, noise=law),
            num_nodes=num_nodes,
            max_inflation=max_inflation,
        )
        plan.noise(1)  # unit, relation and multiplier are checked before anybody waits for a node
        return plan

    def noise(self, rounds: int) -> LocalNoise:
        """Return what each node is asked for in so many rounds, not yet calibrated."""
        request = self.request
        given = request.noise_multiplier
        target = None if given is not None or request.budget is None else request.budget.epsilon
        return LocalNoise(
            clip_norm=self.clipping.clip_norm,
            rounds=rounds,
            delta=request.delta,
            noise_multiplier=given,
            target_epsilon=target,
            law=self.law,
            max_inflation=self.max_inflation,
            unit=request.unit,
            relation=request.relation,
            sampling_rate=self.sampling_rate,
        )

    @property
    def sampling_rate(self) -> float | None:
        """The rate of the nodes' coins; None where every node is one unit."""
        if self.request.unit is PrivacyUnit.NODE:
            return None
        sampling = self.request.sampling
        return sampling.rate if isinstance(sampling, PoissonSampling) else 1.0

    @property
    def expected_units(self) -> float:
        """How many units the sum is expected to hold: the public normaliser."""
        return float(self.request.sampling.expected_cohort)

    def affordable(self, noise: LocalNoise) -> int:
        """Return how many rounds a node's budget pays for, if nothing else was released.

        Raises
        ------
        ValueError
            If it pays for none.
        """
        budget = self.request.budget
        if budget is None or self.request.noise_multiplier is None:
            return noise.rounds
        event = noise.event(self.request.noise_multiplier)
        self.request.check_one_release(event)
        return affordable_rounds(budget, event, at_most=noise.rounds)

    def check_dimension(self, noise: LocalNoise, dimension: int) -> None:
        """Raise ValueError where no integers carry the noise on a model of this length."""
        with self.request.naming_the_budget(noise.resolve_noise_multiplier(), noise.rounds):
            noise.grid(dimension)

    def ask(self, noise: LocalNoise, *, dimension: int, server_round: int) -> LocalRequest:
        """Return the request of one round."""
        budget = self.request.budget
        return LocalRequest(
            noise=noise,
            dimension=dimension,
            server_round=server_round,
            budget_epsilon=None if budget is None else budget.epsilon,
        )

    def largest_entry(self, request: LocalRequest) -> int:
        """Return what no entry of an honest answer exceeds."""
        grid = request.grid
        units = 1 if self.request.unit is PrivacyUnit.NODE else self.request.sampling.population
        return min(units * grid.sensitivity_units + request.largest_noise, 2**62 // self.num_nodes)

    def fixed(self, num_rounds: int) -> dict[str, str]:
        """Return what may not change between the parts of a resumed run."""
        found = {field.name: repr(getattr(self, field.name)) for field in dataclasses.fields(self)}
        if self.request.noise_multiplier is None:  # it was calibrated for so many rounds
            found["num_rounds"] = str(num_rounds)
        return found


def _sampling(sampling: Sampling | None, unit: PrivacyUnit, num_nodes: int) -> Sampling:
    if unit is PrivacyUnit.NODE:
        if sampling is not None and sampling != EveryoneSampling(num_nodes):
            raise ValueError(
                f"sampling={sampling!r} must be None or EveryoneSampling({num_nodes}) for "
                "unit='node': the server sees who answers, so that drawing nodes hides nobody"
            )
        return EveryoneSampling(num_nodes)
    if not isinstance(sampling, EveryoneSampling | PoissonSampling):
        raise ValueError(
            f"sampling={sampling!r} must be EveryoneSampling or PoissonSampling for "
            f"unit={str(unit)!r}: nodes draw their own units, and only coins can be drawn apart"
        )
    return sampling


def claim_covers(claim: NodeClaim, noise: LocalNoise, *, known: int) -> bool:
    """Return whether a node's claim is as asked, and counts one more release than ``known``.

    ``known`` is how many the node's ledger file held before; a node without one may have forgotten.
    """
    event = noise.event(noise.resolve_noise_multiplier())
    charged = count_events(claim.events).get(event, 0)
    asked = (noise.unit, noise.relation, noise.delta)
    return (claim.unit, claim.relation, claim.delta) == asked and charged > (
        known if claim.durable else 0
    )


def noise_settings(noise: LocalNoise) -> dict[str, str]:
    """Return what a checkpoint remembers of the noise that a run began with."""
    return {_NOISE_MULTIPLIER: repr(noise.noise_multiplier)}


def noise_of_run(planned: LocalNoise, saved: RunState, fixed: Mapping[str, str]) -> LocalNoise:
    """Return ``planned`` with the multiplier that a resumed run began with.

    Raises
    ------
    CheckpointError
        If anything that may not change has.
    """
    require_same_settings(saved, fixed)
    multiplier = float(saved.settings[_NOISE_MULTIPLIER])
    return dataclasses.replace(planned, noise_multiplier=multiplier, target_epsilon=None)
