"""Local trust: how a node bounds what it answers, and all of the noise that it adds itself.

Nobody else is trusted with anything. Either the node is the unit and the relation is replace-one:
whoever sees the answer may compare any two data sets that the node could have. Or the units are
the users or records inside it, whom the node alone adds up.

>>> noise = LocalNoise(clip_norm=1.0, rounds=10, delta=1e-5, target_epsilon=8.0)
>>> round(noise.resolve_noise_multiplier(), 2)
3.8
>>> noise.event(3.8)
Gaussian(noise_multiplier=3.8)
"""

import dataclasses
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Final, Self

from dpfl_flower import checks
from dpfl_flower.accounting import (
    Composed,
    Event,
    Gaussian,
    Laplace,
    PoissonSampled,
    PrivacyBudget,
    PrivacyUnit,
    Relation,
    calibrate_event,
)
from dpfl_flower.accounting.accountant import require_supported
from dpfl_flower.clipping import Norm
from dpfl_flower.noise import NoiseDistribution, RoundedGaussian, RoundedLaplace
from dpfl_flower.quantize import IntegerGrid

__all__ = ["LocalLaw", "LocalNoise"]

_SAMPLERS: Final = 2.0**-80
"""More total variation than all rounds' samplers have, so that calibrating leaves room for it."""


class LocalLaw(StrEnum):
    """The law of local noise, and the norm that clips to it."""

    GAUSSIAN = "gaussian"
    """L2."""
    LAPLACE = "laplace"
    """L1: an L2 bound C on d entries is an L1 bound of sqrt(d) C only."""


@dataclass(frozen=True, kw_only=True)
class LocalNoise:
    """How units are clipped and their node's answer noised, and what all rounds may cost.

    Attributes
    ----------
    clip_norm : float
        L2 bound on one unit's update, L1 for Laplace noise.
    rounds : int
        Rounds of a run; a node answers no more.
    delta : float
        At which the node's ledger reports epsilon.
    noise_multiplier : float or None
        Noise over clip norm in every round: standard deviation, or scale for Laplace noise.
    target_epsilon : float or None
        What all rounds together may cost, instead of a noise multiplier.
    law : LocalLaw
    max_inflation : float
        How much longer than the clip norm the enforced bound may be.
    unit : PrivacyUnit
        The node, whose whole update is bounded; or users or examples, whose sum is noised once.
    relation : Relation
        For a node only replace-one: another data set moves its update by at most twice the clip
        norm. Inside a node also add-or-remove-one and zero-out: a unit moves the sum by one.
    sampling_rate : float or None
        Inside a node: each unit joins a round by a secret coin of the node's own, drawn afresh for
        each answer. It amplifies against whoever sees the noisy sums: no trace of the coins is in
        them. How long a node takes is one, and is not accounted for. None for a node.

    Raises
    ------
    ValueError
        Naming the argument, its value and its bound; UnsupportedEvent where the relation has no
        price, as sampled Laplace noise under replace-one.
    """

    clip_norm: float
    rounds: int
    delta: float
    noise_multiplier: float | None = None
    target_epsilon: float | None = None
    law: LocalLaw = LocalLaw.GAUSSIAN
    max_inflation: float = 1.01
    unit: PrivacyUnit = PrivacyUnit.NODE
    relation: Relation = Relation.REPLACE_ONE
    sampling_rate: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "law", checks.choice(LocalLaw, law=self.law))
        object.__setattr__(self, "unit", checks.choice(PrivacyUnit, unit=self.unit))
        object.__setattr__(self, "relation", checks.choice(Relation, relation=self.relation))
        checks.positive(clip_norm=self.clip_norm, max_inflation=self.max_inflation)
        checks.positive_int(rounds=self.rounds)
        checks.probability(delta=self.delta)
        if (self.noise_multiplier is None) == (self.target_epsilon is None):
            raise ValueError(
                f"noise_multiplier={self.noise_multiplier!r} and target_epsilon="
                f"{self.target_epsilon!r}: exactly one of the two must be given"
            )
        for name in ("noise_multiplier", "target_epsilon"):
            if (value := getattr(self, name)) is not None:
                checks.positive(**{name: value})
        self._check_unit()

    def _check_unit(self) -> None:
        if self.unit is PrivacyUnit.NODE:
            if self.relation is not Relation.REPLACE_ONE:
                raise ValueError(
                    f"relation={str(self.relation)!r} must be 'replace-one' for unit='node': "
                    "whoever sees a node's answer may compare any two data sets that it could have"
                )
            if self.sampling_rate is not None:
                raise ValueError(
                    f"sampling_rate={self.sampling_rate!r} must be None for unit='node': the "
                    "server sees who answers"
                )
        else:
            checks.fraction(sampling_rate=self.sampling_rate)
        require_supported(self.event(1.0), self.relation, unit=self.unit)

    @property
    def budget(self) -> PrivacyBudget | None:
        """What all rounds together may cost; None where only the noise was given."""
        if self.target_epsilon is None:
            return None
        return PrivacyBudget(self.target_epsilon, self.delta, self.unit, self.relation)

    def event(self, noise_multiplier: float) -> Event:
        """Return what one round is to the accountant, to be priced under ``relation``."""
        law = Gaussian if self.law is LocalLaw.GAUSSIAN else Laplace
        if self.sampling_rate is None or self.sampling_rate == 1:
            return law(noise_multiplier)
        return PoissonSampled(self.sampling_rate, law(noise_multiplier))

    def resolve_noise_multiplier(self) -> float:
        """Return the noise multiplier given, or the least that keeps to the target."""
        if self.noise_multiplier is not None:
            return self.noise_multiplier
        return _calibrated(self)

    def resolved(self) -> Self:
        """Return the same noise, given by its multiplier."""
        if self.noise_multiplier is not None:
            return self
        return dataclasses.replace(
            self, noise_multiplier=self.resolve_noise_multiplier(), target_epsilon=None
        )

    def grid(self, dimension: int) -> IntegerGrid:
        """Return the integers of an update of this length."""
        norm = Norm.L2 if self.law is LocalLaw.GAUSSIAN else Norm.L1
        return IntegerGrid.for_noise_multiplier(
            self.resolve_noise_multiplier(),
            dimension,
            norm=norm,
            max_inflation=self.max_inflation,
        )

    def distribution(self, grid: IntegerGrid) -> NoiseDistribution:
        """Return what is added to each of the integers."""
        law = RoundedGaussian if self.law is LocalLaw.GAUSSIAN else RoundedLaplace
        return law(grid.noise_units)


@lru_cache(maxsize=8)
def _calibrated(noise: LocalNoise) -> float:
    assert noise.budget is not None
    return calibrate_event(
        lambda z: Composed(noise.event(z), noise.rounds), noise.budget, total_variation=_SAMPLERS
    )
