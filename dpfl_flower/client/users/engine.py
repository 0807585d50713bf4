"""How a node goes through its users: one interface, several ways.

>>> Engine("stacked") is Engine.STACKED
True
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from dpfl_flower.client.errors import NODE_LOGGER
from dpfl_flower.client.users.registry import Member
from dpfl_flower.client.users.request import UserId
from dpfl_flower.layout import Array

__all__ = ["Chunk", "Engine", "Update", "UserEngine", "contributes_zeros"]

logger = logging.getLogger(NODE_LOGGER)


class Engine(StrEnum):
    """How users are trained.

    LOOP trains one user after the other in one resident model: for any model, and the fastest way
    for convolutions on a CPU. STACKED trains a chunk of users at once, by batched matrix products:
    for small models of linear, embedding and normalisation layers, and on CUDA for whatever
    ``torch.vmap`` supports. AUTO takes STACKED where it is the faster one, else LOOP.
    """

    AUTO = "auto"
    LOOP = "loop"
    STACKED = "stacked"


@dataclass(frozen=True)
class Update:
    """What one user would add to the global model, valid until the next update is asked for.

    Attributes
    ----------
    user : int or str
        Whose it is; the sum does not keep it.
    values : sequence of floating arrays
        The released arrays after training, or the update itself.
    reference : sequence of floating arrays or None
        What to subtract from ``values``; None where they are the update.
    """

    user: UserId
    values: Sequence[Array]
    reference: Sequence[Array] | None


@dataclass(frozen=True)
class Chunk:
    """How many users are in memory at once, and how much of it they take.

    Attributes
    ----------
    users : int
    bytes : int
        At most, for these users' parameters, gradients, activations and updates; for one user at a
        time without the activations, which the model alone decides.
    """

    users: int
    bytes: int


class UserEngine(ABC):
    """Trains users, each from the same global arrays and as if it were the only one.

    What an update is depends on that user's records, on public constants and on the global arrays:
    to the last bit, since rounding to integers would make a whole unit of it.
    """

    @property
    @abstractmethod
    def chunk(self) -> Chunk:
        """The users in memory at once, fixed by the model and the recipe."""

    @abstractmethod
    def updates(
        self, members: Iterable[Member], global_arrays: Mapping[str, Array], *, server_round: int
    ) -> Iterator[Update]:
        """Yield the members' updates, in any order.

        A member without records yields none, as if it were absent, and so does one whose training
        raises: the reason goes to the node's log and nowhere else.
        """


def contributes_zeros(member: Member, error: Exception) -> None:
    """Log on this node why a user's contribution is zeros."""
    logger.warning("User %r contributes zeros", member.user, exc_info=error)
