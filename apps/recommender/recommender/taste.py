"""One user's taste: solved on the user's own device from the user's own ratings, and never sent.

A rating is explained by public traits of the film and its bias, which all users learn together:

    stars = 3.5 + bias + offset + sum of liking * trait + contrast * bias

The offset, the likings and the contrast are the user's, by ridge regression in closed form. They
cost no privacy: nothing of them leaves, except in a bounded and noised update of the biases.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from .data import MAX_STARS, MIN_STARS, UserRatings

MIDDLE: Final = 3.5
"""What a film is worth before anything is known: a public constant, not a mean of ratings."""

_OFFSET_PENALTY: Final = 5.0
_GENRE_PENALTY: Final = 20.0
_AGE_PENALTY: Final = 30.0
_CONTRAST_PENALTY: Final = 5.0


@dataclass(frozen=True)
class Taste:
    """What one user makes of a film.

    Attributes
    ----------
    weights
        Offset, a liking for each trait, contrast; shape ``(traits + 2,)``.
    """

    weights: NDArray[np.float64]

    @classmethod
    def of(cls, ratings: UserRatings, bias: NDArray[np.floating]) -> "Taste":
        """Solve for one user's taste, given the ``bias`` of every film; of no ratings it is 0."""
        own_bias = bias[ratings.places].astype(np.float64)
        design = _design(ratings.traits, own_bias)
        penalty = np.full(design.shape[1], _GENRE_PENALTY)
        penalty[[0, -2, -1]] = _OFFSET_PENALTY, _AGE_PENALTY, _CONTRAST_PENALTY
        gram = design.T @ design + np.diag(penalty)
        weights = np.linalg.solve(gram, design.T @ (ratings.stars - MIDDLE - own_bias))
        return cls(weights.astype(np.float64))

    @property
    def contrast(self) -> float:
        """How much more than others this user makes of a film's bias."""
        return float(self.weights[-1])

    def expected(
        self, traits: NDArray[np.float64], bias: NDArray[np.floating]
    ) -> NDArray[np.float64]:
        """Return the expected stars of films, not cut off; both arguments one row a film."""
        own_bias = bias.astype(np.float64)
        stars: NDArray[np.float64] = MIDDLE + own_bias + _design(traits, own_bias) @ self.weights
        return stars


def cut_off(stars: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ``stars``, none outside what a user can give."""
    return np.clip(stars, MIN_STARS, MAX_STARS)


def _design(traits: NDArray[np.float64], bias: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.column_stack([np.ones(len(bias)), traits, bias])
