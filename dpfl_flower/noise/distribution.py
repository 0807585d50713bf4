"""What every noise distribution on the integers says of itself.

>>> from dpfl_flower.noise import RoundedGaussian
>>> isinstance(RoundedGaussian(4), NoiseDistribution)
True
"""

import math
from abc import ABC, abstractmethod
from typing import final

import numpy as np
from numpy.typing import NDArray

from dpfl_flower.rng import RandomSource


class NoiseDistribution(ABC):
    """A symmetric distribution on the integers, in units of the grid it is added on."""

    @abstractmethod
    def sample(self, n: int, rng: RandomSource) -> NDArray[np.int64]:
        """Return ``n`` independent draws in grid units, made from the words of ``rng``."""

    @property
    @abstractmethod
    def variance(self) -> float:
        """The true variance of one draw, rounding included, in squared grid units."""

    @property
    @abstractmethod
    def total_variation(self) -> float:
        """A bound on the total variation distance between one draw's law and the exact one.

        A release of ``d`` draws whose exact law is (epsilon, delta)-DP is
        (epsilon, delta + (1 + e^epsilon) * d * total_variation)-DP.
        """

    @final
    @property
    def stddev(self) -> float:
        """The true standard deviation of one draw, in grid units."""
        return math.sqrt(self.variance)
