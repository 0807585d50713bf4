"""The people whose data a node holds: fixed, by name, their data read when it is needed.

>>> registry = UserRegistry({"ann": 1, "bob": 2})
>>> len(registry), registry.find("bob"), registry[1].load()
(2, 1, 2)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpfl_flower import checks
from dpfl_flower.client.users.request import UserId

__all__ = ["LazyUsers", "Member", "UserRegistry", "Users", "as_records"]


@dataclass(frozen=True)
class LazyUsers:
    """Users whose data is read one at a time: user ``i`` of ``count`` is named ``i``.

    Attributes
    ----------
    user_data : callable
        ``user_data(i)`` returns what a mapping would hold for that user. Called again each time
        the user takes part.
    count : int
        How many places there are, a public constant. A number is a name and stays with its user:
        who leaves leaves an empty place (no records, or an exception), and nobody moves up.
    """

    user_data: Callable[[int], Any]
    count: int

    def __post_init__(self) -> None:
        checks.non_negative_int(count=self.count)


Users = Mapping[Any, Any] | LazyUsers
"""A mapping from name (int or str) to data, or lazily."""


@final
@dataclass(frozen=True)
class Member:
    """One user: the name and how to get the data."""

    user: UserId
    load: Callable[[], Any]


@final
class UserRegistry(Sequence[Member]):
    """All users of a node, in an order that stays.

    Raises
    ------
    ValueError
        When a mapping's keys are not all int or all str, or when users come without names.
    """

    def __init__(self, users: Users) -> None:
        self._users = users
        self._names: Sequence[UserId]
        if isinstance(users, Mapping):
            self._names = list(users)
            kinds = {type(name) for name in self._names}
            if not (kinds <= {int} or kinds <= {str}):
                raise ValueError(f"users have keys of {kinds}, must be all int or all str")
        elif isinstance(users, LazyUsers):
            self._names = range(users.count)
        else:
            raise ValueError(
                f"users={type(users).__name__} must be a mapping from names to data, or LazyUsers: "
                "in a list, whoever leaves would rename those behind"
            )

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, position: Any) -> Any:
        """Return the member at ``position``."""
        name = self._names[position]
        users = self._users
        if isinstance(users, LazyUsers):
            return Member(name, lambda: users.user_data(position))
        return Member(name, lambda: users[name])

    def find(self, user: UserId) -> int:
        """Return the position of the user of that name; ValueError where there is none."""
        try:
            return self._positions[user]
        except KeyError:
            raise ValueError(f"user {user!r} is not registered on this node") from None

    @cached_property
    def _positions(self) -> Mapping[UserId, int]:
        return {name: position for position, name in enumerate(self._names)}


def as_records(data: Sequence[Tensor | NDArray[Any]]) -> list[Tensor]:
    """Return a user's records as tensors: the model's inputs, then the targets.

    Raises
    ------
    ValueError
        Unless there are at least two tensors, each with one row per record.
    """
    tensors = [_as_tensor(part) for part in data]
    if len(tensors) < 2 or any(tensor.dim() == 0 for tensor in tensors):
        raise ValueError("a user's data must be inputs and targets, one row for each record")
    if len({len(tensor) for tensor in tensors}) > 1:
        raise ValueError(
            f"a user's tensors have {[len(tensor) for tensor in tensors]} rows, must be equal"
        )
    return tensors


def _as_tensor(part: Tensor | NDArray[Any]) -> Tensor:
    if isinstance(part, Tensor):
        return part.detach()
    array = np.asarray(part)
    # torch would warn of an array that it may not write, although nothing here writes.
    return torch.from_numpy(array if array.flags.writeable else array.copy())
