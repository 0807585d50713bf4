"""The two classical mechanisms on plain data: a noisy sum over privacy units.

The same pipeline as a federated round, with nothing federated about it: clip each unit, round it to
integers, check the bound, sum exactly, add integer noise, convert to float last.

>>> visits = [[3.0, 0.0], [1.0, 1.0], [0.0, 2.0]]  # one vector per patient
>>> mechanism = GaussianMechanism(epsilon=1.0, delta=1e-5, clip_norm=3.0)
>>> mechanism.release(visits).shape
(2,)
>>> round(mechanism.noise_multiplier, 4)
3.7306
>>> LaplaceMechanism(epsilon=0.5, clip_norm=3.0).event
Laplace(noise_multiplier=2.0)
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dpfl_flower import checks
from dpfl_flower.accounting import Event, Gaussian, Laplace, Relation, total_variation_delta
from dpfl_flower.accounting.analytic import gaussian_mu
from dpfl_flower.clipping import Norm
from dpfl_flower.noise import NoiseDistribution, RoundedGaussian, RoundedLaplace
from dpfl_flower.quantize import BoundedSum, IntegerGrid, to_float
from dpfl_flower.rng import secure

__all__ = ["GaussianMechanism", "LaplaceMechanism", "Mechanism"]


def _times_sensitivity(relation: Relation) -> float:
    """How far one neighbour moves the clipped sum, in clip norms: 2 where one is replaced."""
    return 2.0 if relation is Relation.REPLACE_ONE else 1.0


class Mechanism(ABC):
    """Releases the noisy sum of vectors, one vector per privacy unit, once each time it is asked.

    Every release is another :attr:`event`: several of them compose, and a ledger must be charged
    for each.
    """

    clip_norm: float
    max_inflation: float

    @property
    @abstractmethod
    def event(self) -> Event:
        """What one release is to the accountant, to be priced under ``relation``."""

    @final
    def release(
        self, units: Sequence[ArrayLike], *, dimension: int | None = None
    ) -> NDArray[np.float64]:
        """Return the sum of the clipped units with noise.

        Parameters
        ----------
        units : sequence of vectors
            Everything that one privacy unit contributes, in one vector; longer ones than
            ``clip_norm`` are scaled down to it, one with a NaN or an infinity counts as zeros.
        dimension : int or None
            Length of every vector, a public constant. None: as long as the first, so that there
            must be one.

        Returns
        -------
        float64 array, shape (dimension,)

        Raises
        ------
        ValueError
            When the lengths differ, nothing tells the dimension, or the integer grid would be too
            coarse for it (see :meth:`IntegerGrid.for_noise_multiplier`).
        """
        vectors = [np.asarray(unit, np.float64).reshape(-1) for unit in units]
        if dimension is None:
            if not vectors:
                raise ValueError("dimension=None must be given when there are no units")
            dimension = vectors[0].size
        grid = self._grid(dimension)
        bounded = BoundedSum(grid, clip_norm=self.clip_norm)
        for vector in vectors:
            bounded.add([vector])
        noisy = bounded.total
        noisy += self._noise(grid).sample(noisy.size, secure())
        return to_float(noisy, grid.unit_size(self.clip_norm), 1.0)

    @final
    def sampling_delta(self, dimension: int, *, epsilon: float) -> float:
        """Return what the sampler's distance from the exact law adds to delta: next to nothing.

        A table sampler ends somewhere; one release in this many dimensions, (epsilon, delta)-DP
        with exact noise, is so with this much added to delta.
        """
        distance = self._noise(self._grid(dimension)).total_variation
        return total_variation_delta(distance, dimension, epsilon=epsilon)

    @abstractmethod
    def _grid(self, dimension: int) -> IntegerGrid: ...

    @abstractmethod
    def _noise(self, grid: IntegerGrid) -> NoiseDistribution: ...


@final
@dataclass(frozen=True)
class GaussianMechanism(Mechanism):
    """The Gaussian mechanism: L2 clipping and rounded Gaussian noise.

    Given (epsilon, delta) the noise is the least that the exact condition allows: Balle & Wang,
    arXiv 1805.06530, Theorem 8. It is valid for every epsilon, unlike the classical formula.

    Attributes
    ----------
    clip_norm : float
        L2 bound on one unit.
    epsilon, delta : float or None
        What one release may cost; both or neither.
    noise_multiplier : float
        Standard deviation over ``clip_norm``; give it instead of epsilon and delta.
    relation : Relation
        Under replace-one a neighbour moves the sum by twice the clip norm.
    max_inflation : float
        See :meth:`IntegerGrid.for_noise_multiplier`.

    Raises
    ------
    ValueError
        Naming the argument, its value and its bound.
    """

    _: KW_ONLY
    clip_norm: float
    epsilon: float | None = None
    delta: float | None = None
    noise_multiplier: float = math.nan
    relation: Relation = Relation.ADD_OR_REMOVE_ONE
    max_inflation: float = 1.01

    def __post_init__(self) -> None:
        checks.positive(clip_norm=self.clip_norm)
        checks.at_least(1, max_inflation=self.max_inflation)
        object.__setattr__(self, "relation", checks.choice(Relation, relation=self.relation))
        checks.instance(float, int, noise_multiplier=self.noise_multiplier)
        if not math.isnan(self.noise_multiplier):
            if self.epsilon is not None or self.delta is not None:
                raise ValueError(
                    f"noise_multiplier={self.noise_multiplier!r} must not be given beside "
                    f"epsilon={self.epsilon!r} and delta={self.delta!r}"
                )
            checks.positive(noise_multiplier=self.noise_multiplier)
            return
        checks.positive(epsilon=self.epsilon)
        checks.probability(delta=self.delta)
        assert self.epsilon is not None
        assert self.delta is not None
        stddev = _times_sensitivity(self.relation) / gaussian_mu(self.epsilon, self.delta)
        object.__setattr__(self, "noise_multiplier", math.nextafter(stddev, math.inf))

    @property
    def event(self) -> Gaussian:
        """A Gaussian event, relative to the sensitivity under add-or-remove-one."""
        return Gaussian(self.noise_multiplier)

    def _grid(self, dimension: int) -> IntegerGrid:
        return IntegerGrid.for_noise_multiplier(
            self.noise_multiplier, dimension, max_inflation=self.max_inflation
        )

    def _noise(self, grid: IntegerGrid) -> NoiseDistribution:
        return RoundedGaussian(grid.noise_units)


@final
@dataclass(frozen=True)
class LaplaceMechanism(Mechanism):
    """The Laplace mechanism: L1 clipping, rounded Laplace noise; delta is :meth:`sampling_delta`.

    Scale ``b = sensitivity / epsilon``: Dwork, McSherry, Nissim, Smith, TCC 2006, Proposition 1.
    An L2 bound C on d entries is an L1 bound of ``sqrt(d) C`` only.

    Attributes
    ----------
    epsilon : float
        What one release costs.
    clip_norm : float
        L1 bound on one unit.
    relation : Relation
        Under replace-one a neighbour moves the sum by twice the clip norm.
    max_inflation : float
        See :meth:`IntegerGrid.for_noise_multiplier`.

    Raises
    ------
    ValueError
        Naming the argument, its value and its bound.
    """

    _: KW_ONLY
    epsilon: float
    clip_norm: float
    relation: Relation = Relation.ADD_OR_REMOVE_ONE
    max_inflation: float = 1.01

    def __post_init__(self) -> None:
        checks.positive(epsilon=self.epsilon, clip_norm=self.clip_norm)
        checks.at_least(1, max_inflation=self.max_inflation)
        object.__setattr__(self, "relation", checks.choice(Relation, relation=self.relation))

    @property
    def noise_multiplier(self) -> float:
        """The scale over ``clip_norm``."""
        return _times_sensitivity(self.relation) / self.epsilon

    @property
    def event(self) -> Laplace:
        """A Laplace event, relative to the sensitivity under add-or-remove-one."""
        return Laplace(self.noise_multiplier)

    def _grid(self, dimension: int) -> IntegerGrid:
        return IntegerGrid.for_noise_multiplier(
            self.noise_multiplier, dimension, norm=Norm.L1, max_inflation=self.max_inflation
        )

    def _noise(self, grid: IntegerGrid) -> NoiseDistribution:
        return RoundedLaplace(grid.noise_units)
