"""What a server asks of a node that adds all of its noise itself, for one round.

>>> noise = LocalNoise(clip_norm=1.0, rounds=10, delta=1e-5, noise_multiplier=4.0)
>>> request = LocalRequest(noise=noise, dimension=1000, server_round=3)
>>> LocalRequest.from_config(request.to_config()) == request
True
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Self

from flwr.app import ConfigRecord

from dpfl_flower import checks
from dpfl_flower.accounting import PrivacyBudget, PrivacyUnit, Relation
from dpfl_flower.client.grid_fields import integer, number, text
from dpfl_flower.client.local_noise import LocalLaw, LocalNoise
from dpfl_flower.quantize import BoundedSum, IntegerGrid

__all__ = ["LocalRequest"]

_CLIP_NORM: Final = "clip-norm"
_DELTA: Final = "delta"
_NOISE_MULTIPLIER: Final = "noise-multiplier"
_LAW: Final = "law"
_MAX_INFLATION: Final = "max-inflation"
_UNIT: Final = "unit"
_RELATION: Final = "relation"
_SAMPLING_RATE: Final = "sampling-rate"
_DIMENSION: Final = "dimension"
_SERVER_ROUND: Final = "server-round"
_NUM_ROUNDS: Final = "num-rounds"
_BUDGET_EPSILON: Final = "budget-epsilon"
_FIELDS: Final = frozenset(
    {
        _CLIP_NORM,
        _DELTA,
        _NOISE_MULTIPLIER,
        _LAW,
        _MAX_INFLATION,
        _UNIT,
        _RELATION,
        _SAMPLING_RATE,
        _DIMENSION,
        _SERVER_ROUND,
        _NUM_ROUNDS,
        _BUDGET_EPSILON,
    }
)

_REACH: Final = 96
"""Beyond so many scales no sampler's table has an entry."""


@dataclass(frozen=True, kw_only=True)
class LocalRequest:
    """One round's public constants: the noise, the length of the model, the round.

    The node makes the grid of them itself, and holds its units to the grid's bound.

    Attributes
    ----------
    noise : LocalNoise
        The same in every round of a run, with its multiplier.
    dimension : int
        The length of the released model.
    server_round : int
        From 1 to ``noise.rounds``.
    budget_epsilon : float or None
        What the node's data set may spend in all, at the noise's delta.

    Raises
    ------
    ValueError
        Naming the field, its value and its bound.
    """

    noise: LocalNoise
    dimension: int
    server_round: int
    budget_epsilon: float | None = None

    def __post_init__(self) -> None:
        checks.positive_int(dimension=self.dimension, server_round=self.server_round)
        checks.at_most(self.noise.rounds, server_round=self.server_round)
        if self.noise.noise_multiplier is None:
            raise ValueError("noise_multiplier=None must be given: nodes do not calibrate anew")
        if self.budget_epsilon is not None:
            checks.positive(budget_epsilon=self.budget_epsilon)

    @cached_property
    def grid(self) -> IntegerGrid:
        """The integers of the round; ValueError where none are fine enough."""
        return self.noise.grid(self.dimension)

    @property
    def largest_noise(self) -> int:
        """No entry of the noise is larger in absolute value, in units of the grid."""
        return _REACH * self.grid.noise_units

    @property
    def budget(self) -> PrivacyBudget | None:
        """What the node's data set may spend in all."""
        if self.budget_epsilon is None:
            return None
        noise = self.noise
        return PrivacyBudget(self.budget_epsilon, noise.delta, noise.unit, noise.relation)

    @property
    def sampling_rate(self) -> float | None:
        """The rate of the node's own coins, None where the node is the unit."""
        return self.noise.sampling_rate

    @property
    def users(self) -> None:
        """Nobody is named: the server would learn who took part."""
        return

    def open_sum(self) -> BoundedSum:
        """Return an empty sum that holds every contribution to the grid's bound."""
        return BoundedSum(self.grid, clip_norm=self.noise.clip_norm)

    def to_config(self) -> ConfigRecord:
        """Return the request as it travels: numbers and text."""
        noise = self.noise
        assert noise.noise_multiplier is not None
        record = ConfigRecord(
            {
                _CLIP_NORM: float(noise.clip_norm),
                _DELTA: float(noise.delta),
                _NOISE_MULTIPLIER: float(noise.noise_multiplier),
                _LAW: str(noise.law),
                _MAX_INFLATION: float(noise.max_inflation),
                _UNIT: str(noise.unit),
                _RELATION: str(noise.relation),
                _DIMENSION: int(self.dimension),
                _SERVER_ROUND: int(self.server_round),
                _NUM_ROUNDS: int(noise.rounds),
            }
        )
        if noise.sampling_rate is not None:
            record[_SAMPLING_RATE] = float(noise.sampling_rate)
        if self.budget_epsilon is not None:
            record[_BUDGET_EPSILON] = float(self.budget_epsilon)
        return record

    @classmethod
    def from_config(cls, record: Mapping[str, object]) -> Self:
        """Read a request and check all of it.

        Raises
        ------
        ValueError
            When a field is missing, unknown, of another type or out of range.
        """
        if unknown := record.keys() - _FIELDS:
            raise ValueError(f"unknown fields {sorted(unknown)}")
        noise = LocalNoise(
            clip_norm=number(record, _CLIP_NORM),
            rounds=integer(record, _NUM_ROUNDS),
            delta=number(record, _DELTA),
            noise_multiplier=number(record, _NOISE_MULTIPLIER),
            law=LocalLaw(text(record, _LAW)),
            max_inflation=number(record, _MAX_INFLATION),
            unit=PrivacyUnit(text(record, _UNIT)),
            relation=Relation(text(record, _RELATION)),
            sampling_rate=_optional(record, _SAMPLING_RATE),
        )
        return cls(
            noise=noise,
            dimension=integer(record, _DIMENSION),
            server_round=integer(record, _SERVER_ROUND),
            budget_epsilon=_optional(record, _BUDGET_EPSILON),
        )


def _optional(record: Mapping[str, object], key: str) -> float | None:
    return None if record.get(key) is None else number(record, key)
