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
from dpfl_flower.clipping import Norm
from dpfl_flower.quantize import BoundedSum, IntegerGrid, Rounding

__all__ = ["CohortRequest", "UserId"]

UserId = int | str
"""A user's name inside its node."""

_DIMENSION: Final = "dimension"
_NOISE_UNITS: Final = "noise-units"
_CLIP_UNITS: Final = "clip-units"
_SENSITIVITY_UNITS: Final = "sensitivity-units"
_INDICATOR_UNITS: Final = "indicator-units"
_NORM: Final = "norm"
_ROUNDING: Final = "rounding"
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
        grid = self.grid
        record = ConfigRecord(
            {
                _DIMENSION: grid.dimension,
                _NOISE_UNITS: grid.noise_units,
                _CLIP_UNITS: float(grid.clip_units),
                _SENSITIVITY_UNITS: grid.sensitivity_units,
                _INDICATOR_UNITS: grid.indicator_units,
                _NORM: str(grid.norm),
                _ROUNDING: str(grid.rounding),
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
            grid=IntegerGrid(
                dimension=_int(record, _DIMENSION),
                noise_units=_int(record, _NOISE_UNITS),
                clip_units=_float(record, _CLIP_UNITS),
                sensitivity_units=_int(record, _SENSITIVITY_UNITS),
                indicator_units=_int(record, _INDICATOR_UNITS),
                norm=Norm(_text(record, _NORM)),
                rounding=Rounding(_text(record, _ROUNDING)),
            ),
            clip_norm=_float(record, _CLIP_NORM),
            server_round=_int(record, _SERVER_ROUND),
            dither_seed=cast("bytes | None", record.get(_DITHER_SEED)),
            sampling_rate=None if rate is None else _float(record, _SAMPLING_RATE),
            users=None if users is None else tuple(users),
        )


_FIELDS: Final = frozenset(
    {
        _DIMENSION,
        _NOISE_UNITS,
        _CLIP_UNITS,
        _SENSITIVITY_UNITS,
        _INDICATOR_UNITS,
        _NORM,
        _ROUNDING,
        _CLIP_NORM,
        _DITHER_SEED,
        _SAMPLING_RATE,
        _USERS,
        _SERVER_ROUND,
    }
)


def _check_users(users: tuple[UserId, ...]) -> None:
    kinds = {type(user) for user in users}
    if not (kinds <= {int} or kinds <= {str}):
        raise ValueError(f"users={users!r} must be all int or all str")
    # Someone named twice would contribute twice, which is twice the bound.
    if len(set(users)) != len(users):
        raise ValueError(f"users={users!r} must name nobody twice")


def _int(record: Mapping[str, object], key: str) -> int:
    value = record.get(key)
    if type(value) is not int:
        raise ValueError(f"{key}={value!r} must be an integer")
    return value


def _float(record: Mapping[str, object], key: str) -> float:
    value = record.get(key)
    if type(value) is not float and type(value) is not int:
        raise ValueError(f"{key}={value!r} must be a number")
    return float(value)


def _text(record: Mapping[str, object], key: str) -> str:
    value = record.get(key)
    if type(value) is not str:
        raise ValueError(f"{key}={value!r} must be text")
    return value
