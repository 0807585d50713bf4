"""Everything about distributed noise that is public and fixed before the first round.

It travels to the nodes, who check all of it again: what they enforce is what it says.

>>> from dpfl_flower.quantize import DistributedGrid
>>> plan = DistributedPlan(
...     grid=DistributedGrid.within(1000, dimension=16, bits=24), noise=ShareNoise.SKELLAM,
...     squared_scale=4_000_000, clip_norm=0.5, num_nodes=4, min_survivors=3, colluders=1,
...     unit="example", relation="add-or-remove-one",
... )
>>> plan.event.shares, round(plan.noise_multiplier, 3), plan.share_multiplier
(2, 2.828, 2.0)
>>> DistributedPlan.from_fields(plan.to_fields()) == plan
True
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, Self

from dpfl_flower import checks
from dpfl_flower.accounting import (
    DistributedDiscreteGaussian,
    DistributedSkellam,
    PrivacyUnit,
    Relation,
)
from dpfl_flower.accounting.accountant import require_supported
from dpfl_flower.noise import DiscreteGaussian, NoiseDistribution, Skellam
from dpfl_flower.quantize import DistributedGrid

__all__ = ["DistributedEvent", "DistributedPlan", "ShareNoise"]

DistributedEvent = DistributedDiscreteGaussian | DistributedSkellam


class ShareNoise(StrEnum):
    """The law of one node's share of the noise."""

    DISCRETE_GAUSSIAN = "discrete-gaussian"
    """Kairouz, Liu, Steinke, arXiv 2102.06387."""
    SKELLAM = "skellam"
    """Agarwal, Kairouz, Liu, arXiv 2110.04995: sums stay Skellam, so any number of shares is priced
    as it is, however narrow each of them."""


_MOST_NODES: Final = 1 << 32

_EVENTS: Final[Mapping[ShareNoise, type[DistributedEvent]]] = {
    ShareNoise.DISCRETE_GAUSSIAN: DistributedDiscreteGaussian,
    ShareNoise.SKELLAM: DistributedSkellam,
}
_LAWS: Final = {ShareNoise.DISCRETE_GAUSSIAN: DiscreteGaussian, ShareNoise.SKELLAM: Skellam}


@dataclass(frozen=True, kw_only=True)
class DistributedPlan:
    """Grid, noise of one share, and how many honest shares are certain.

    The guarantee is that of ``min_survivors - colluders`` shares: with fewer survivors nothing is
    unmasked, and colluders know their own shares and can subtract them. Every further share makes
    the sum noisier, which is post-processing.

    Attributes
    ----------
    grid : DistributedGrid
    noise : ShareNoise
    squared_scale : int
        sigma^2 of a discrete Gaussian share, the variance of a Skellam share, in squared grid
        units.
    clip_norm : float
        C, in the units of an update.
    num_nodes : int
        The most nodes in a sum.
    min_survivors : int
        t: with fewer nodes in the sum the round is dropped, unreleased.
    colluders : int
        c: how many of the survivors may work with the server; less than t.
    unit : PrivacyUnit
    relation : Relation
        How neighbouring data sets differ. A node that is removed would take its share along, so
        for ``unit="node"`` it is zero-out or replace-one.

    Raises
    ------
    ValueError
        Naming the field, its value and its bound.
    """

    grid: DistributedGrid
    noise: ShareNoise
    squared_scale: int
    clip_norm: float
    num_nodes: int
    min_survivors: int
    colluders: int = 0
    unit: PrivacyUnit
    relation: Relation

    def __post_init__(self) -> None:
        object.__setattr__(self, "noise", ShareNoise(self.noise))
        object.__setattr__(self, "unit", PrivacyUnit(self.unit))
        object.__setattr__(self, "relation", Relation(self.relation))
        checks.positive(clip_norm=self.clip_norm)
        checks.positive_int(num_nodes=self.num_nodes, min_survivors=self.min_survivors)
        checks.non_negative_int(colluders=self.colluders)
        checks.at_most(_MOST_NODES, num_nodes=self.num_nodes)
        checks.at_most(self.num_nodes, min_survivors=self.min_survivors)
        checks.at_most(self.min_survivors - 1, colluders=self.colluders)
        self.share  # noqa: B018 - checks the squared scale
        require_supported(self.event, self.relation, unit=self.unit)

    @property
    def honest_shares(self) -> int:
        """How many shares are certain to be in the sum and known to nobody: t - c."""
        return self.min_survivors - self.colluders

    @property
    def share(self) -> NoiseDistribution:
        """What one node adds to each coordinate."""
        return _LAWS[self.noise](self.squared_scale)

    @property
    def event(self) -> DistributedEvent:
        """What one round is to the accountant."""
        return _EVENTS[self.noise](
            squared_scale=self.squared_scale,
            shares=self.honest_shares,
            l2_sensitivity=self.grid.sensitivity_units,
            l1_sensitivity=self.grid.l1_units,
            dimension=self.grid.padded,
        )

    @property
    def total_variation(self) -> float:
        """How far the certain noise of one round is from what the event speaks of, at most.

        Distances of independent draws add up; what else is in the sum is post-processing.
        """
        return self.share.total_variation * self.grid.padded * self.honest_shares

    @property
    def noise_multiplier(self) -> float:
        """Standard deviation of the certain noise over the enforced bound on one unit."""
        return self.event.noise_multiplier

    @property
    def share_multiplier(self) -> float:
        """Standard deviation of one share over the enforced bound on one unit."""
        return math.sqrt(self.squared_scale) / self.grid.sensitivity_units

    def to_fields(self) -> dict[str, int | float | str]:
        """Return the plan as numbers and text, as they travel."""
        return {
            "dimension": self.grid.dimension,
            "clip-units": float(self.grid.clip_units),
            "sensitivity-units": self.grid.sensitivity_units,
            "bits": self.grid.bits,
            "noise": self.noise.value,
            "squared-scale": self.squared_scale,
            "clip-norm": float(self.clip_norm),
            "num-nodes": self.num_nodes,
            "min-survivors": self.min_survivors,
            "colluders": self.colluders,
            "unit": self.unit.value,
            "relation": self.relation.value,
        }

    @classmethod
    def from_fields(cls, fields: Mapping[str, object]) -> Self:
        """Read a plan among other fields and check all of it.

        Raises
        ------
        ValueError
            When a field is missing, of another type or out of range.
        """
        return cls(
            grid=DistributedGrid(
                dimension=_read(fields, "dimension", int),
                clip_units=_read(fields, "clip-units", float),
                sensitivity_units=_read(fields, "sensitivity-units", int),
                bits=_read(fields, "bits", int),
            ),
            noise=ShareNoise(_read(fields, "noise", str)),
            squared_scale=_read(fields, "squared-scale", int),
            clip_norm=_read(fields, "clip-norm", float),
            num_nodes=_read(fields, "num-nodes", int),
            min_survivors=_read(fields, "min-survivors", int),
            colluders=_read(fields, "colluders", int),
            unit=PrivacyUnit(_read(fields, "unit", str)),
            relation=Relation(_read(fields, "relation", str)),
        )


PLAN_FIELDS: Final = frozenset(
    {
        *("dimension", "clip-units", "sensitivity-units", "bits", "noise", "squared-scale"),
        *("clip-norm", "num-nodes", "min-survivors", "colluders", "unit", "relation"),
    }
)
"""What `DistributedPlan.to_fields` writes."""


def _read(fields: Mapping[str, object], key: str, kind: type[Any]) -> Any:
    value = fields.get(key)
    if type(value) is not kind:
        raise ValueError(f"{key}={value!r} must be of type {kind.__name__}")
    return value
