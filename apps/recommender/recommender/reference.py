"""What can be had without privacy, and without each other. NOT PRIVATE, for comparison only."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from .catalogue import Catalogue
from .data import Split, UserRatings
from .task import BIAS, SquaredErrors, evaluate, new_model
from .taste import MIDDLE, Taste, cut_off

_SWEEPS: Final = 10
_PENALTY: Final = 5.0

Forecast = Callable[[UserRatings, NDArray[np.float64]], NDArray[np.float64]]
"""The stars that a user, by training ratings, is expected to give films of given biases."""


@dataclass(frozen=True)
class Reference:
    """Root mean squared errors on held-out ratings, in stars. NOT PRIVATE.

    Attributes
    ----------
    two_biases
        An offset for each user and a bias for each film, fitted to all ratings in one place.
    together
        The app's model fitted to all ratings in one place, without clipping and noise.
    alone
        The app's model if nobody shares anything: every film's bias stays 0.
    """

    two_biases: float
    together: float
    alone: float

    @classmethod
    def of(cls, splits: Sequence[Split], catalogue: Catalogue) -> "Reference":
        """Measure all three; raise ValueError if no rating is held out."""
        users = [split.training for split in splits]
        plain = _fitted(users, catalogue, _offset_only)
        full = _fitted(users, catalogue, _by_taste)
        return cls(
            two_biases=_rmse(_errors(splits, plain, _offset_only)),
            together=_rmse(evaluate({BIAS: full.astype(np.float32)}, splits)),
            alone=_rmse(evaluate(new_model(catalogue), splits)),
        )


def _offset_only(user: UserRatings, bias: NDArray[np.float64]) -> NDArray[np.float64]:
    left = user.stars - MIDDLE - bias[user.places]
    return np.full(len(bias), left.sum() / (len(user) + _PENALTY)) + MIDDLE + bias


def _by_taste(user: UserRatings, bias: NDArray[np.float64]) -> NDArray[np.float64]:
    stars = np.zeros(len(bias))
    stars[user.places] = Taste.of(user, bias).expected(user.traits, bias[user.places])
    return stars


def _fitted(
    users: Sequence[UserRatings], catalogue: Catalogue, forecast: Forecast
) -> NDArray[np.float64]:
    """Alternate between users and films until both fit; films are drawn towards 0."""
    count = np.zeros(len(catalogue))
    for user in users:
        count[user.places] += 1
    bias = np.zeros(len(catalogue))
    for _ in range(_SWEEPS):
        left = np.zeros(len(catalogue))
        for user in users:
            errors = user.stars - forecast(user, bias)[user.places]
            left[user.places] += errors + bias[user.places]
        bias = left / (count + _PENALTY)
    return bias


def _errors(
    splits: Sequence[Split], bias: NDArray[np.float64], forecast: Forecast
) -> SquaredErrors:
    total = SquaredErrors()
    for split in splits:
        there = split.held_out
        stars = cut_off(forecast(split.training, bias)[there.places])
        total += SquaredErrors(float(np.square(stars - there.stars).sum()), len(there))
    return total


def _rmse(errors: SquaredErrors) -> float:
    if errors.rmse is None:
        raise ValueError("no rating is held out: there is nothing to measure with")
    return errors.rmse
