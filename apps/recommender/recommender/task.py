"""What everybody agreed on in public: the model, one user's update of it, and what it may cost."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from dpfl_flower import checks

from .catalogue import Catalogue, Film
from .data import Split, UserRatings
from .taste import Taste, cut_off

BIAS: Final = "item_bias"
"""The model's only array: how much better each film of the catalogue is than the middle."""

Arrays = Mapping[str, NDArray[np.float32]]
T = TypeVar("T", int, float, str)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The app's run configuration, parsed; every value is public and the same everywhere.

    Attributes
    ----------
    num_nodes
        Nodes to wait for.
    num_users
        A public count of the users on all nodes together: what sums are divided by.
    num_rounds
        Rounds; every user takes part in each.
    clip_norm
        Bounds one user's update in L2. At 1, well below a typical update's norm of 7, it is a
        vote: everybody has the same say, whether with 20 ratings or with 700.
    server_learning_rate, server_momentum
        Of the server optimizer, which is `FedAvgM`.
    target_epsilon, target_delta
        What all rounds may cost a user.
    split_seed
        Decides, with the ids of user and film, which ratings are held out.
    dataset
        Whose budget it is: the name of the users' data in the ledger.
    sample_user
        Who is shown films at the end, at the user's node; nobody if empty.
    run_dir
        Where ledger, model and result go.
    """

    num_nodes: int
    num_users: int
    num_rounds: int
    clip_norm: float
    server_learning_rate: float
    server_momentum: float
    target_epsilon: float
    target_delta: float
    split_seed: int
    dataset: str
    sample_user: str
    run_dir: Path

    def __post_init__(self) -> None:
        checks.positive_int(
            num_nodes=self.num_nodes,
            num_users=self.num_users,
            num_rounds=self.num_rounds,
        )
        checks.positive(
            clip_norm=self.clip_norm,
            server_learning_rate=self.server_learning_rate,
            target_epsilon=self.target_epsilon,
        )
        checks.non_negative(server_momentum=self.server_momentum)
        checks.probability(target_delta=self.target_delta)
        checks.non_negative_int(split_seed=self.split_seed)

    @classmethod
    def parse(cls, run_config: Mapping[str, bool | float | int | str]) -> "Settings":
        """Read Flower's ``run_config``; raise a ValueError that names a missing or wrong key."""

        def read(key: str, kind: type[T]) -> T:
            value = run_config.get(key)
            accepted = (int, float) if kind is float else kind
            if isinstance(value, bool) or not isinstance(value, accepted):
                raise ValueError(f"run config {key}={value!r} must be of type {kind.__name__}")
            return kind(value)

        return cls(
            num_nodes=read("num-nodes", int),
            num_users=read("num-users", int),
            num_rounds=read("num-server-rounds", int),
            clip_norm=read("clip-norm", float),
            server_learning_rate=read("server-learning-rate", float),
            server_momentum=read("server-momentum", float),
            target_epsilon=read("target-epsilon", float),
            target_delta=read("target-delta", float),
            split_seed=read("split-seed", int),
            dataset=read("dataset", str),
            sample_user=read("sample-user", str),
            run_dir=Path(read("run-dir", str)),
        )


def new_model(catalogue: Catalogue) -> dict[str, NDArray[np.float32]]:
    """Return the model that training starts from: no film is better than another."""
    return {BIAS: np.zeros(len(catalogue), dtype=np.float32)}


def local_update(arrays: Arrays, ratings: UserRatings) -> dict[str, NDArray[np.float32]]:
    """Return how one user would move the biases: dense over the catalogue, not yet clipped.

    The user's taste is solved for first; the update is the negative gradient of half the squared
    errors that remain. It depends on the user's ratings, ``arrays`` and the public catalogue alone.
    """
    bias = arrays[BIAS]
    update = np.zeros(bias.shape, dtype=np.float32)
    if len(ratings):
        taste = Taste.of(ratings, bias)
        errors = ratings.stars - taste.expected(ratings.traits, bias[ratings.places])
        update[ratings.places] = (1.0 + taste.contrast) * errors
    return {BIAS: update}


@dataclass(frozen=True)
class SquaredErrors:
    """How far off held-out ratings were forecast. NOT PRIVATE: they are counted exactly."""

    total: float = 0.0
    count: int = 0

    def __add__(self, other: "SquaredErrors") -> "SquaredErrors":
        return SquaredErrors(self.total + other.total, self.count + other.count)

    @property
    def rmse(self) -> float | None:
        """The root of the mean, in stars; None of no ratings."""
        return (self.total / self.count) ** 0.5 if self.count else None


def evaluate(arrays: Arrays, splits: Iterable[Split]) -> SquaredErrors:
    """Measure on held-out ratings, each user's taste solved from the others. NOT PRIVATE."""
    bias = arrays[BIAS]
    errors = SquaredErrors()
    for split in splits:
        there = split.held_out
        taste = Taste.of(split.training, bias)
        forecast = cut_off(taste.expected(there.traits, bias[there.places]))
        errors += SquaredErrors(float(np.square(forecast - there.stars).sum()), len(there))
    return errors


@dataclass(frozen=True)
class Recommendation:
    """A film and the stars that a user is expected to give it."""

    film: Film
    stars: float


def recommend(
    arrays: Arrays, ratings: UserRatings, catalogue: Catalogue, *, count: int = 10
) -> tuple[Recommendation, ...]:
    """Return the films that a user has not rated and should like best, the best first.

    Made at the user's node, for the user; it is no release.
    """
    checks.positive_int(count=count)
    taste = Taste.of(ratings, arrays[BIAS])
    stars = taste.expected(catalogue.traits, arrays[BIAS])
    stars[ratings.places] = -np.inf
    best = np.argsort(-stars, kind="stable")[: min(count, len(catalogue) - len(ratings))]
    shown = cut_off(stars[best])
    return tuple(
        Recommendation(catalogue.films[place], float(value))
        for place, value in zip(best, shown, strict=True)
    )
