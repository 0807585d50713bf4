"""What a user asked of distributed noise, and the plan that it comes to once a model is there.

>>> from dpfl_flower.secagg import SecAggPlus
>>> request = PrivacyRequest.parse(
...     sampling=EveryoneSampling(736), budget=None, noise_multiplier=2.0, delta=1e-4,
...     unit="example", relation=None,
... )
>>> plan_for = DistributedDesign(
...     request=request, clip_norm=0.5, num_nodes=4, noise="skellam", bits=32, max_inflation=1.1,
...     secure_aggregation=SecAggPlus(min_cohort=3),
... )
>>> plan_for(16, 30, ()).honest_shares, unit_sampling_rate(request, num_nodes=4)
(3, 1.0)
"""

from dataclasses import dataclass

from dpfl_flower.accounting import (
    Event,
    EveryoneSampling,
    PoissonSampling,
    PrivacyUnit,
)
from dpfl_flower.distributed import DistributedPlan, ShareNoise, design
from dpfl_flower.quantize import DistributedGrid
from dpfl_flower.secagg import SecureAggregation
from dpfl_strategies.privacy_request import PrivacyRequest

__all__ = ["DistributedDesign", "unit_sampling_rate"]


@dataclass(frozen=True, kw_only=True)
class DistributedDesign:
    """All that a plan for distributed noise is made of, but the model and the rounds.

    Attributes
    ----------
    request : PrivacyRequest
    clip_norm : float
        C, in the units of an update.
    num_nodes : int
    secure_aggregation : SecureAggregation
        Names the fewest survivors and how many of them may collude.
    noise : ShareNoise
    bits : int
        Sums travel modulo 2^bits.
    max_inflation : float
        How much longer than the clip norm the enforced bound may be.

    Raises
    ------
    ValueError
        For a relation, a modulus or numbers of nodes that no plan has, before anybody waits for a
        node.
    """

    request: PrivacyRequest
    clip_norm: float
    num_nodes: int
    secure_aggregation: SecureAggregation
    noise: ShareNoise | str
    bits: int
    max_inflation: float

    def __post_init__(self) -> None:
        most = self.secure_aggregation.max_cohort
        if most is not None and most < self.num_nodes:
            raise ValueError(f"max_cohort={most} must be >= num_nodes={self.num_nodes}")
        seen = self.secure_aggregation.seen_by_a_node(self.num_nodes)
        if self.secure_aggregation.min_cohort > seen:
            raise ValueError(
                f"min_cohort={self.secure_aggregation.min_cohort} must be <= {seen}, the vectors "
                "of a sum that a node can tell are in it: it lets no noised sum of fewer be "
                "unmasked. More neighbours or, with rosters, a higher threshold make more certain"
            )
        DistributedPlan(
            grid=DistributedGrid(dimension=1, clip_units=1.0, sensitivity_units=1, bits=self.bits),
            noise=ShareNoise(self.noise),
            squared_scale=1,
            clip_norm=self.clip_norm,
            num_nodes=self.num_nodes,
            min_survivors=self.secure_aggregation.min_cohort,
            colluders=self.secure_aggregation.colluders,
            unit=self.request.unit,
            relation=self.request.relation,
        )

    def __call__(self, dimension: int, rounds: int, prior: tuple[Event, ...]) -> DistributedPlan:
        """Return the plan of a run, given what was released before.

        Raises
        ------
        ValueError
            If there is no plan within the budget, or none that fits the modulus.
        """
        request = self.request
        return design(
            None if request.noise_multiplier is not None else request.budget,
            noise_multiplier=request.noise_multiplier,
            unit=request.unit,
            relation=request.relation,
            rounds=rounds,
            dimension=dimension,
            clip_norm=self.clip_norm,
            num_nodes=self.num_nodes,
            min_survivors=self.secure_aggregation.min_cohort,
            colluders=self.secure_aggregation.colluders,
            max_units=request.sampling.population,
            noise=self.noise,
            bits=self.bits,
            max_inflation=self.max_inflation,
            prior=prior,
        )


def unit_sampling_rate(request: PrivacyRequest, num_nodes: int) -> float | None:
    """Return the rate of the nodes' coins, None where the node is the unit.

    Raises
    ------
    ValueError
        If units would have to be drawn in another way, or there is another number of nodes.
    """
    sampling = request.sampling
    if request.unit is PrivacyUnit.NODE:
        if not isinstance(sampling, EveryoneSampling):
            raise ValueError(
                f"sampling={sampling!r} must be EveryoneSampling for unit='node': a node that is "
                "not drawn adds no share, and no sampling is amplified"
            )
        if sampling.population != num_nodes:
            raise ValueError(
                f"num_nodes={num_nodes} must be population={sampling.population} for unit='node'"
            )
        return None
    if isinstance(sampling, EveryoneSampling):
        return 1.0
    if isinstance(sampling, PoissonSampling):
        return sampling.rate
    raise ValueError(
        f"sampling={sampling!r} must be EveryoneSampling or PoissonSampling: nodes draw their own "
        "units, and only coins can be drawn apart"
    )
