"""Reads ratings, one unit a user, and says which node holds which user and what is held out.

A user's unit is made of that user's ratings and the public catalogue. On which node a user lives
and which ratings are held out follows from ids and a public seed: adding, removing or changing one
user moves nothing of anybody else's.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dpfl_flower import checks

from .catalogue import Catalogue
from .table import read_rows

FILE: Final = "ml-100k.inter"
COLUMNS: Final = ("user_id", "item_id", "rating")
"""What a file of ratings must hold; further columns (timestamp) are not read."""

MIN_STARS: Final = 1.0
MAX_STARS: Final = 5.0
HELD_OUT: Final = 0.2


@dataclass(frozen=True)
class UserRatings:
    """What one user rated: the privacy unit.

    Attributes
    ----------
    user
        The node's key of the user; unique in a file.
    places
        Where the rated films stand in the catalogue, ascending, shape ``(n,)``.
    stars
        The ratings, in the same order, shape ``(n,)``.
    traits
        What is publicly known of the rated films, shape ``(n, traits)``.
    """

    user: str
    places: NDArray[np.int64]
    stars: NDArray[np.float64]
    traits: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.stars)

    def where(self, chosen: NDArray[np.bool_]) -> "UserRatings":
        """Return the same user with the ratings that are ``chosen``, shape ``(n,)``."""
        return UserRatings(self.user, self.places[chosen], self.stars[chosen], self.traits[chosen])


@dataclass(frozen=True)
class Split:
    """One user's ratings, parted into those to learn from and those to measure with."""

    training: UserRatings
    held_out: UserRatings

    @classmethod
    def of(cls, ratings: UserRatings, catalogue: Catalogue, *, seed: int) -> "Split":
        """Hold out about a fifth, by the ids of user and film and a public ``seed``."""
        held_out = np.array(
            [
                _chance("held out", seed, ratings.user, catalogue.films[place].id) < HELD_OUT
                for place in ratings.places
            ],
            dtype=bool,
        )
        return cls(training=ratings.where(~held_out), held_out=ratings.where(held_out))


def read_ratings(path: Path, catalogue: Catalogue) -> tuple[UserRatings, ...]:
    """Return the users of a file of ratings, in the order of their ids.

    Raises
    ------
    ValueError
        Naming the column and the line: a film is not in the catalogue or rated twice by the same
        user, a rating is no number from 1 to 5; or the file is not a table.
    OSError
        The file cannot be opened.
    """
    users: dict[str, dict[int, float]] = {}
    for row in read_rows(path, COLUMNS):
        film = row.token("item_id")
        place = catalogue.places.get(film)
        if place is None:
            raise row.wrong("item_id", f"{film!r} is not in the catalogue")
        rated = users.setdefault(row.token("user_id"), {})
        if place in rated:
            raise row.wrong("item_id", f"{film!r} is rated twice by the same user")
        rated[place] = row.number_in("rating", MIN_STARS, MAX_STARS)
    return tuple(_user(user, users[user], catalogue) for user in sorted(users))


def of_node(
    users: Iterable[UserRatings], *, partition: int, num_partitions: int
) -> tuple[UserRatings, ...]:
    """Return the users who live on one of ``num_partitions`` nodes, by their ids.

    Raises
    ------
    ValueError
        Unless ``0 <= partition < num_partitions``.
    """
    checks.positive_int(num_partitions=num_partitions)
    checks.non_negative_int(partition=partition)
    checks.at_most(num_partitions - 1, partition=partition)
    return tuple(
        user for user in users if int(_chance("node", user.user) * num_partitions) == partition
    )


def _user(user: str, rated: Mapping[int, float], catalogue: Catalogue) -> UserRatings:
    places = np.array(sorted(rated), dtype=np.int64)
    stars = np.array([rated[place] for place in places])
    return UserRatings(user, places, stars, catalogue.traits[places])


def _chance(*key: object) -> float:
    """Return a number in [0, 1) that follows from ``key`` alone."""
    digest = hashlib.sha256("\x1f".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
