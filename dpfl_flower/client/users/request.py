"""What a server asks of a node that holds many users, for one round.

>>> grid = IntegerGrid.for_noise_multiplier(1.0, 1000)
>>> request = CohortRequest(grid=grid, clip_norm=0.4, server_round=3, sampling_rate=0.05)
>>> CohortRequest.from_config(request.to_config()) == request
True
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Self, cast

from flwr.app import ConfigRecord

from dpfl_flower import checks
from dpfl_flower.client.awaiting import AwaitingRequest
from dpfl_flower.client.grid_fields import (
    GRID_FIELDS,
    grid_from_fields,
    grid_to_fields,
    integer,
    number,
)
from dpfl_flower.quantize import BoundedSum, IntegerGrid, Rounding

__all__ = ["AnyRequest", "CohortRequest", "UserId"]

UserId = int | str
"""A user's name inside its node."""

_CLIP_NORM: Final = "clip-norm"
_DITHER_SEED: Final = "dither-seed"
_SAMPLING_RATE: Final = "sampling-rate"
_USERS: Final = "users"
_SERVER_ROUND: Final = "server-round"


@dataclass(frozen=True, kw_only=True)
class CohortRequest:
    """One round's public constants: the grid, the clip norm and who may take part.

    Nothing in it depends on a user. The node checks all of it again and holds every user to the
    grid's bound itself.

    Attributes
    ----------
    grid : IntegerGrid
        The integers of the round; ``grid.dimension`` is the length of the released model.
    clip_norm : float
        C, in the units of an update.
    server_round : int
        From 1 on; seeds shuffling and dropout, together with the recipe's own seed.
    dither_seed : bytes or None
        The round's public dither, with a grid that rounds ``DITHERED`` and only then.
    sampling_rate : float or None
        In (0, 1]: each registered user joins by a secret coin of the node's own.
    users : tuple of int or str, or None
        Instead of coins, who takes part, each once; may be empty. For simulations, where the
        server draws the cohort: a node only obeys if its app lets it.

    Raises
    ------
    ValueError
        Naming the field, its value and its bound; also when both or neither of ``sampling_rate``
        and ``users`` are given.
    """

    grid: IntegerGrid
    clip_norm: float
    server_round: int
    dither_seed: bytes | None = None
    sampling_rate: float | None = None
    users: tuple[UserId, ...] | None = None

    def __post_init__(self) -> None:
        checks.positive_int(server_round=self.server_round)
        if self.grid.num_metrics:
            raise ValueError(
                f"num_metrics={self.grid.num_metrics} must be 0: users inside nodes report none"
            )
        if (self.sampling_rate is None) == (self.users is None):
            raise ValueError(
                f"sampling_rate={self.sampling_rate!r} and users={self.users!r}: exactly one of "
                "the two must be given"
            )
        if self.sampling_rate is not None:
            checks.fraction(sampling_rate=self.sampling_rate)
        if self.users is not None:
            _check_users(self.users)
        if self.dither_seed is not None and not (
            isinstance(self.dither_seed, bytes) and self.dither_seed
        ):
            raise ValueError(f"dither_seed={self.dither_seed!r} must be a non-empty bytes object")
        if (self.grid.rounding is Rounding.DITHERED) != (self.dither_seed is not None):
            raise ValueError(
                f"dither_seed={self.dither_seed!r} must be given for rounding=dithered and only "
                f"then, rounding={self.grid.rounding}"
            )
        checks.positive(clip_norm=self.clip_norm)

    def open_sum(self) -> BoundedSum:
        """Return an empty sum that holds every contribution to this round's bound."""
        return BoundedSum(self.grid, clip_norm=self.clip_norm, dither_seed=self.dither_seed)

    def to_config(self) -> ConfigRecord:
        """Return the request as it travels: numbers, text and bytes."""
        record = ConfigRecord(
            {
                **grid_to_fields(self.grid),
                _CLIP_NORM: float(self.clip_norm),
                _SERVER_ROUND: self.server_round,
            }
        )
        if self.dither_seed is not None:
            record[_DITHER_SEED] = self.dither_seed
        if self.sampling_rate is not None:
            record[_SAMPLING_RATE] = float(self.sampling_rate)
        if self.users is not None:
            # One type for all, or mypy and Flower would both object.
            record[_USERS] = cast("list[int]", list(self.users))
        return record

    @classmethod
    def from_config(cls, record: Mapping[str, object]) -> Self:
        """Read a request and check all of it.

        Raises
        ------
        ValueError
            When a field is missing, unknown, of another type or out of range.
        """
        unknown = record.keys() - _FIELDS
        if unknown:
            raise ValueError(f"unknown fields {sorted(unknown)}")
        users = record.get(_USERS)
        if users is not None and not isinstance(users, list):
            raise ValueError(f"{_USERS}={users!r} must be a list")
        rate = record.get(_SAMPLING_RATE)
        return cls(
            grid=grid_from_fields(record),
            clip_norm=number(record, _CLIP_NORM),
            server_round=integer(record, _SERVER_ROUND),
            dither_seed=cast("bytes | None", record.get(_DITHER_SEED)),
            sampling_rate=None if rate is None else number(record, _SAMPLING_RATE),
            users=None if users is None else tuple(users),
        )


_FIELDS: Final = GRID_FIELDS | {_CLIP_NORM, _DITHER_SEED, _SAMPLING_RATE, _USERS, _SERVER_ROUND}


def _check_users(users: tuple[UserId, ...]) -> None:
    kinds = {type(user) for user in users}
    if not (kinds <= {int} or kinds <= {str}):
        raise ValueError(f"users={users!r} must be all int or all str")
    # Someone named twice would contribute twice, which is twice the bound.
    if len(set(users)) != len(users):
        raise ValueError(f"users={users!r} must name nobody twice")


AnyRequest = CohortRequest | AwaitingRequest
"""What a cohort answers: with noise to come from the server, or from a mod on the node."""
