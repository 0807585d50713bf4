"""How much a unit's update counts, decided from public constants and that unit alone.

>>> NumExamplesWeighting(w_max=100).weigh(25)
0.25
>>> NumExamplesWeighting(w_max=100).weigh(1e9)
1.0
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

from dpfl_flower import checks


class Weighting(ABC):
    """A weight in [0, 1] for each unit, applied before its update is clipped.

    Because the weight lies inside the clip, the sum moves by at most one clip norm whatever the
    weights are; and because ``mean_weight`` is a public constant, so is the divisor of the sum.
    """

    @property
    @abstractmethod
    def mean_weight(self) -> float:
        """The public constant that, times the expected cohort, divides the sum."""

    @abstractmethod
    def weigh(self, num_examples: float) -> float:
        """Return the weight, in [0, 1], of a unit that reports ``num_examples``."""


@final
@dataclass(frozen=True)
class UniformWeighting(Weighting):
    """Every unit counts the same (the default)."""

    @property
    def mean_weight(self) -> float:
        """1."""
        return 1.0

    def weigh(self, num_examples: float) -> float:
        """Return 1, whatever the unit reports."""
        return 1.0


@final
@dataclass(frozen=True)
class NumExamplesWeighting(Weighting):
    """``min(num_examples / w_max, 1)`` (McMahan et al., arXiv 1710.06963, section 2).

    Parameters
    ----------
    w_max:
        Examples at which a unit's weight saturates; a public constant, never derived from data.
    mean_weight:
        The public guess of the mean weight over the population. 1 is always safe; a smaller one
        only scales the step of the server.
    """

    w_max: float
    mean_weight: float = 1.0

    def __post_init__(self) -> None:
        checks.positive(w_max=self.w_max)
        checks.fraction(mean_weight=self.mean_weight)

    def weigh(self, num_examples: float) -> float:
        """Return the weight of a unit; 0 for a count that is negative or not a number."""
        if math.isnan(num_examples) or num_examples <= 0:
            return 0.0
        return min(num_examples / self.w_max, 1.0)
