"""What a server asks of a node that adds a share of the noise, for one round.

>>> from dpfl_flower.accounting import PrivacyBudget
>>> from dpfl_flower.distributed import design
>>> plan = design(PrivacyBudget(1.0, 1e-4, "example"), rounds=30, dimension=16, clip_norm=0.5,
...     num_nodes=4, min_survivors=3, max_units=736)
>>> request = DistributedRequest(plan=plan, server_round=3, num_rounds=30, rotation_seed=b"x",
...     sampling_rate=1.0)
>>> DistributedRequest.from_config(request.to_config()) == request
True
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Self

from flwr.app import ConfigRecord

from dpfl_flower import checks
from dpfl_flower.accounting import PrivacyUnit
from dpfl_flower.distributed import DistributedPlan
from dpfl_flower.distributed.plan import PLAN_FIELDS
from dpfl_flower.quantize import DistributedGrid, DistributedSum

__all__ = ["DistributedRequest"]

_SERVER_ROUND: Final = "server-round"
_NUM_ROUNDS: Final = "num-rounds"
_ROTATION_SEED: Final = "rotation-seed"
_SAMPLING_RATE: Final = "sampling-rate"
_FIELDS: Final = PLAN_FIELDS | {_SERVER_ROUND, _NUM_ROUNDS, _ROTATION_SEED, _SAMPLING_RATE}


@dataclass(frozen=True, kw_only=True)
class DistributedRequest:
    """One round's public constants; a node of many units draws its own by secret coins.

    Attributes
    ----------
    plan : DistributedPlan
        The same in every round of a run.
    server_round : int
        From 1 on.
    num_rounds : int
        How many rounds the run has: what a node's ledger plans for.
    rotation_seed : bytes
        The round's public rotation.
    sampling_rate : float or None
        In (0, 1]: each registered unit joins by a coin of the node's own, which amplifies nothing.
        None where the node is the unit, and only there.

    Raises
    ------
    ValueError
        Naming the field, its value and its bound.
    """

    plan: DistributedPlan
    server_round: int
    num_rounds: int
    rotation_seed: bytes
    sampling_rate: float | None = None

    def __post_init__(self) -> None:
        checks.positive_int(server_round=self.server_round, num_rounds=self.num_rounds)
        checks.at_most(self.num_rounds, server_round=self.server_round)
        if not isinstance(self.rotation_seed, bytes) or not self.rotation_seed:
            raise ValueError(
                f"rotation_seed={self.rotation_seed!r} must be a non-empty bytes object"
            )
        if (self.sampling_rate is None) != (self.plan.unit is PrivacyUnit.NODE):
            raise ValueError(
                f"sampling_rate={self.sampling_rate!r} must be None for unit='node' and only "
                f"there, unit={str(self.plan.unit)!r}"
            )
        if self.sampling_rate is not None:
            checks.fraction(sampling_rate=self.sampling_rate)

    @property
    def grid(self) -> DistributedGrid:
        """The plan's grid."""
        return self.plan.grid

    @property
    def users(self) -> None:
        """Nobody is named: the server would learn who took part."""
        return

    def open_sum(self) -> DistributedSum:
        """Return an empty sum that holds every contribution to the plan's bound."""
        return DistributedSum(
            self.grid, clip_norm=self.plan.clip_norm, rotation_seed=self.rotation_seed
        )

    def to_config(self) -> ConfigRecord:
        """Return the request as it travels: numbers, text and bytes."""
        record = ConfigRecord(
            {
                **self.plan.to_fields(),
                _SERVER_ROUND: self.server_round,
                _NUM_ROUNDS: self.num_rounds,
                _ROTATION_SEED: self.rotation_seed,
            }
        )
        if self.sampling_rate is not None:
            record[_SAMPLING_RATE] = float(self.sampling_rate)
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
        return cls(
            plan=DistributedPlan.from_fields(record),
            server_round=record.get(_SERVER_ROUND),  # type: ignore[arg-type]
            num_rounds=record.get(_NUM_ROUNDS),  # type: ignore[arg-type]
            rotation_seed=record.get(_ROTATION_SEED),  # type: ignore[arg-type]
            sampling_rate=record.get(_SAMPLING_RATE),  # type: ignore[arg-type]
        )
