"""Privacy loss distributions, pessimistic ("connect the dots", arXiv 2207.04380).

dp-accounting does the numerics. What is decided here: which distribution prices which event under
which relation, and how fine a grid it needs.

>>> pld = compose({PoissonSampled(0.1, Gaussian(3.0)): 512}, Relation.ADD_OR_REMOVE_ONE, 1e-4)
>>> round(pld.get_epsilon_for_delta(1e-6), 4)
3.7697
"""

import math
from collections.abc import Mapping
from functools import lru_cache, reduce
from typing import Any

import numpy as np

from dpfl_flower.accounting import poisson
from dpfl_flower.accounting.events import (
    CappedPoissonSampled,
    DistributedDiscreteGaussian,
    DistributedSkellam,
    Event,
    FixedSizeSampled,
    Gaussian,
    Laplace,
    PoissonSampled,
)
from dpfl_flower.accounting.units import Relation
from dpfl_flower.lazily import lazily

pld = lazily("dp_accounting.pld.privacy_loss_distribution")
stats = lazily("scipy.stats")
dp_accounting = lazily("dp_accounting")

STANDARD_INTERVAL = 1e-4
# Below this delta the rounding errors of the FFT (about 1e-13) are no longer small beside it.
SMALLEST_DELTA = 1e-10

_GRID_POINTS_WANTED = 2_000
_GRID_POINTS_SINGLE = 400_000
_GRID_POINTS_COMPOSED = 2_000_000
_MOST_HALVINGS = 20
_COARSE_ERROR = 1e-3
_COARSE_POINTS = 8_000
# e^-50 of the mass is cut from each tail: 9.6 standard deviations.
_TAIL = 9.6

_RELATIONS = {
    Relation.ADD_OR_REMOVE_ONE: "ADD_OR_REMOVE_ONE",
    Relation.REPLACE_ONE: "REPLACE_ONE",
    # dp-accounting's word for a unit replaced by zeros.
    Relation.ZERO_OUT: "REPLACE_SPECIAL",
}


def supports(event: Event, relation: Relation) -> bool:
    """Return whether ``event`` has a privacy loss distribution under ``relation``."""
    match event:
        case Gaussian() | Laplace() | CappedPoissonSampled():
            return True
        case PoissonSampled(event=inner):
            # A sampled Laplace is a mixture on both sides under replace-one: no distribution known.
            return isinstance(inner, Gaussian) or relation is not Relation.REPLACE_ONE
        case _:
            return False


@lru_cache(maxsize=8)
def _distribution(event: Event, relation: Relation, interval: float) -> Any:
    """Return the distribution of one release."""
    neighbours = dp_accounting.NeighboringRelation[_RELATIONS[relation]]
    match event:
        case Gaussian(noise_multiplier=z):
            return pld.from_gaussian_mechanism(
                z, value_discretization_interval=interval, neighboring_relation=neighbours
            )
        case Laplace(noise_multiplier=b):
            # A sum moves by twice the clip norm when a unit is replaced.
            scale = b / 2 if relation is Relation.REPLACE_ONE else b
            return pld.from_laplace_mechanism(scale, value_discretization_interval=interval)
        case PoissonSampled(rate=rate, event=Gaussian(noise_multiplier=z)):
            replace = relation is Relation.REPLACE_ONE
            return poisson.distribution(rate, z, replace=replace, interval=interval)
        case PoissonSampled(rate=rate, event=Laplace(noise_multiplier=b)):
            return pld.from_laplace_mechanism(
                b, value_discretization_interval=interval, sampling_prob=rate
            )
        case CappedPoissonSampled():
            return _capped(event, relation, interval)
        case _:
            raise TypeError(f"{event!r} has no privacy loss distribution")


def _capped(event: CappedPoissonSampled, relation: Relation, interval: float) -> Any:
    """Return the distribution of one release on a Poisson sample that is cut to a cap.

    dp-accounting's ``from_truncated_subsampled_gaussian_mechanism`` (its supplement on privacy loss
    distributions, Section 4.3): a mixture over whether the others alone reach the cap. If they do,
    a unit that joins pushes another one out: twice the sensitivity, bounded under every relation by
    replacing, for the unit's chance to be in given that.
    """
    z = event.noise_multiplier
    plain = _distribution(PoissonSampled(event.rate, Gaussian(z)), relation, interval)
    full = float(stats.binom.sf(event.cap - 1, event.population - 1, event.rate))
    if full == 0:
        return plain
    overfull = float(stats.binom.sf(event.cap, event.population, event.rate))
    chance = overfull * event.cap / full / event.population
    pushing = poisson.distribution(chance, z / 2, replace=True, interval=interval)
    return pushing.compute_mixture(plain, full)


def forget() -> None:
    """Drop the distributions of single releases that are kept for reuse."""
    _distribution.cache_clear()


def compose(counts: Mapping[Event, int], relation: Relation, interval: float) -> Any:
    """Return the distribution of all the releases in ``counts``, on a grid of ``interval``.

    Gaussians that are not sampled are one Gaussian: mu^2 adds up.
    """
    mu_squared = sum(
        n / e.noise_multiplier**2 for e, n in counts.items() if isinstance(e, Gaussian)
    )
    parts = [(event, count) for event, count in counts.items() if not isinstance(event, Gaussian)]
    parts.sort(key=lambda part: repr(part[0]))
    if mu_squared:
        parts.append((Gaussian(1 / math.sqrt(mu_squared)), 1))
    with np.errstate(all="ignore"):  # overflow to infinity is the right answer in the far tail
        composed = [
            distribution if count == 1 else distribution.self_compose(count)
            for event, count in parts
            for distribution in [_distribution(event, relation, interval)]
        ]
        return reduce(lambda a, b: a.compose(b), composed)


def approximate_mu(counts: Mapping[Event, int], relation: Relation) -> float:
    """Return the mu of the Gaussian that these releases resemble, for grids and first guesses only.

    The central limit theorem of Bu et al., arXiv 1911.11607: a Poisson-sampled Gaussian is worth
    mu^2 = q^2 (e^(1/z^2) - 1). It bounds nothing.
    """
    factor = 2 if relation is Relation.REPLACE_ONE else 1

    def mu_squared(event: Event) -> float:
        match event:
            case Gaussian(noise_multiplier=z) | Laplace(noise_multiplier=z):
                return (factor / z) ** 2
            case DistributedDiscreteGaussian() | DistributedSkellam():
                return (factor / event.noise_multiplier) ** 2
            case PoissonSampled(rate=rate, event=inner):
                plain = mu_squared(inner)
                return min(plain, rate**2 * math.expm1(min(plain, 700.0)))
            case CappedPoissonSampled():
                return mu_squared(PoissonSampled(event.rate, Gaussian(event.noise_multiplier)))
            case FixedSizeSampled(event=inner):
                return mu_squared(PoissonSampled(event.cohort / event.population, inner))
            case _:
                raise TypeError(f"{event!r} has no privacy loss distribution")

    return math.sqrt(sum(count * mu_squared(event) for event, count in counts.items()))


def interval_for(counts: Mapping[Event, int], relation: Relation) -> float:
    """Return the grid to use: `STANDARD_INTERVAL` times a power of two.

    Finer where single releases leak so little that the standard grid would hardly resolve them,
    coarser where memory asks for it (epsilon in the hundreds); pessimistic always. More events, or
    more of each, never make it finer.
    """
    mu = approximate_mu(counts, relation)
    single = max(_loss_range(event, relation) for event in counts)
    wanted = max(
        2 * (_TAIL * mu + mu * mu / 2) / _GRID_POINTS_COMPOSED,
        single / _GRID_POINTS_SINGLE,
        min(STANDARD_INTERVAL, single / _GRID_POINTS_WANTED),
    )
    doublings = math.ceil(math.log2(wanted / STANDARD_INTERVAL))
    return STANDARD_INTERVAL * 2.0 ** max(-_MOST_HALVINGS, doublings)


def coarsest(counts: Mapping[Event, int], relation: Relation, epsilon: float) -> int:
    """Return how many times coarser a grid may be for an epsilon that is about right.

    Each composition adds up to about interval^2 / 4 to the mean loss.
    """
    standard = interval_for(counts, relation)
    by_error = math.sqrt(_COARSE_ERROR * epsilon / sum(counts.values()))
    by_points = max(_loss_range(event, relation) for event in counts) / _COARSE_POINTS
    return 1 << max(0, math.floor(math.log2(min(by_error, by_points) / standard)))


def _loss_range(event: Event, relation: Relation) -> float:
    """Return about the largest privacy loss on the grid of one release."""
    match event:
        case Laplace(noise_multiplier=b) | PoissonSampled(event=Laplace(noise_multiplier=b)):
            return 2 / b
        case Gaussian(noise_multiplier=z):
            return _gaussian_range((2 if relation is Relation.REPLACE_ONE else 1) / z)
        case PoissonSampled(rate=rate, event=Gaussian(noise_multiplier=z)):
            plain = _gaussian_range((2 if relation is Relation.REPLACE_ONE else 1) / z)
            return math.log1p(rate * math.expm1(plain)) if plain < 700 else plain
        case CappedPoissonSampled(noise_multiplier=z):
            return _gaussian_range(4 / z)  # twice the sensitivity, as replace-one
        case _:
            raise TypeError(f"{event!r} has no privacy loss distribution")


def _gaussian_range(mu: float) -> float:
    return _TAIL * mu + mu * mu / 2
