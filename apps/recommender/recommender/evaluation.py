"""What a node says of its held-out ratings. NOT PRIVATE: their errors are added up exactly."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from .task import SquaredErrors

HELD_OUT: Final = "held_out"
"""The query that asks a node for its `HeldOutAnswer`."""

SHOW_FILMS: Final = "show_films"
"""Asks a node to show films to its own user."""

_TOTAL: Final = "not-private.squared-errors"
_COUNT: Final = "not-private.held-out-ratings"
_PACKAGED: Final = "packaged"


@dataclass(frozen=True)
class HeldOutAnswer:
    """One node's answer. NOT PRIVATE.

    Attributes
    ----------
    errors
        On the held-out ratings of its users.
    packaged
        Whether they are of the packaged data set.

    Examples
    --------
    >>> answer = HeldOutAnswer(SquaredErrors(2.0, 8), packaged=True)
    >>> HeldOutAnswer.from_metrics(answer.to_metrics()) == answer
    True
    """

    errors: SquaredErrors
    packaged: bool

    def to_metrics(self) -> dict[str, int | float]:
        """Return the answer as it travels."""
        return {
            _TOTAL: self.errors.total,
            _COUNT: self.errors.count,
            _PACKAGED: int(self.packaged),
        }

    @classmethod
    def from_metrics(cls, metrics: Mapping[str, object]) -> "HeldOutAnswer":
        """Read what `to_metrics` wrote; raise ValueError if it is something else."""
        total, count = metrics.get(_TOTAL), metrics.get(_COUNT)
        if not isinstance(total, float) or not math.isfinite(total) or total < 0:
            raise ValueError(f"{_TOTAL}={total!r} must be a finite number >= 0")
        if type(count) is not int or count < 0:
            raise ValueError(f"{_COUNT}={count!r} must be a count")
        return cls(SquaredErrors(total, count), packaged=metrics.get(_PACKAGED) == 1)
