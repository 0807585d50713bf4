"""What a list of events costs: the one place that turns events into epsilon or delta.

Each composition is priced by the tightest method that is valid for it: exactly where all of it is
Gaussian, by pessimistic privacy loss distributions where those exist, by Rényi curves for samples
of a fixed size and for distributed noise. What has no valid price raises; nothing is approximated
from below.

>>> from dpfl_flower.accounting.events import Composed
>>> rounds = [Composed(PoissonSampled(0.05, Gaussian(1.0)), 200)]
>>> round(epsilon(rounds, delta=1e-5, relation="add-or-remove-one"), 4)
4.7659
>>> round(epsilon([Composed(Gaussian(10.0), 100)], delta=1e-5, relation="replace-one"), 3)
9.997
"""

import math
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

from dpfl_flower.accounting import pld, rdp
from dpfl_flower.accounting.analytic import gaussian_delta, gaussian_epsilon
from dpfl_flower.accounting.events import (
    CappedPoissonSampled,
    DistributedDiscreteGaussian,
    DistributedSkellam,
    Event,
    FixedSizeSampled,
    Gaussian,
    Laplace,
    PoissonSampled,
    count_events,
)
from dpfl_flower.accounting.units import PrivacyUnit, Relation
from dpfl_flower.checks import non_negative, probability

# Noise this small costs so much that sampling does not help: priced as if everyone took part.
_NO_AMPLIFICATION_BELOW = 0.02
_NO_AMPLIFICATION_ABOVE_MU = 300.0

# Beyond these a claim of somebody else's is not priced exactly.
_QUICK_RELEASES = 10_000
_QUICK_EVENTS = 8
_QUICK_CURVES = 16

# The share of delta set aside for what samplers leave of total variation.
RESERVED_SHARE_OF_DELTA = 1e-6


class UnsupportedEvent(ValueError):
    """No valid price is known for an event under a relation."""


def epsilon(
    events: Iterable[Event],
    *,
    delta: float,
    relation: Relation | str,
    total_variation: float = 0.0,
) -> float:
    """Return an epsilon such that all ``events`` together are (epsilon, delta)-DP.

    Parameters
    ----------
    events : iterable of Event
        In any order; each on fresh coins and fresh noise.
    delta : float
        Strictly between 0 and 1.
    relation : Relation
        How neighbouring data sets differ.
    total_variation : float
        An upper bound on the total variation distance between all the noise that was really drawn
        and the exact distributions the events speak of. It costs delta, as `total_variation_delta`
        says.

    Returns
    -------
    float
        >= 0; infinite where a release had no noise.

    Raises
    ------
    UnsupportedEvent
        If an event has no valid price under ``relation``.
    """
    probability(delta=delta)
    return Price(events, Relation(relation), total_variation=total_variation).epsilon(delta)


def quick_epsilon(events: Iterable[Event], *, delta: float, relation: Relation | str) -> float:
    """Return an epsilon as `epsilon` does, in bounded time: for events that somebody else wrote.

    What is small is priced exactly as by `epsilon`. Beyond 10,000 releases or eight distinct ones
    the price is a Rényi bound, where all of it has a curve and there are at most 16; else it is
    what it costs when everybody takes part each time, and infinite where only a curve has a price.
    Either holds, and is no less than the truth.

    >>> rounds = [PoissonSampled(0.05, Gaussian(1.0))] * 200
    >>> round(quick_epsilon(rounds, delta=1e-5, relation="add-or-remove-one"), 4)
    4.7659
    """
    probability(delta=delta)
    price = Price(events, Relation(relation))
    few = len(price.counts) <= _QUICK_EVENTS and sum(price.counts.values()) <= _QUICK_RELEASES
    if few or price.no_noise:
        return price.epsilon(delta)
    curves = all(rdp.supports(event, price.relation) for event in price.counts)
    if curves and len(price.counts) <= _QUICK_CURVES:
        return rdp.compose(price.counts, price.relation).epsilon(delta)
    if any(map(rdp.needed, price.counts)):
        return math.inf
    mu, pure = _without_coins(price.counts, price.relation)
    return gaussian_epsilon(mu, delta) + pure


def delta(
    events: Iterable[Event],
    *,
    epsilon: float,
    relation: Relation | str,
    total_variation: float = 0.0,
) -> float:
    """Return a delta such that all ``events`` together are (epsilon, delta)-DP.

    See `epsilon` for the arguments.

    Raises
    ------
    UnsupportedEvent
        If an event has no valid price under ``relation``.
    """
    non_negative(epsilon=epsilon)
    return Price(events, Relation(relation), total_variation=total_variation).delta(epsilon)


def total_variation_delta(total_variation: float, draws: int, *, epsilon: float) -> float:
    """Return what inexact samplers add to delta: (1 + e^epsilon) * total_variation * draws.

    If the real output is within total variation t of an (epsilon, delta)-DP one on every data set,
    P(S) <= P*(S) + t <= e^eps Q*(S) + delta + t <= e^eps Q(S) + delta + (1 + e^eps) t.

    >>> total_variation_delta(3.2e-16, 1_000_000 * 200, epsilon=8.0) > 1e-4
    True
    """
    total = total_variation * draws
    if total == 0:
        return 0.0
    return total * (1 + math.exp(epsilon)) if epsilon < 700 else math.inf


def require_supported(
    event: Event, relation: Relation, *, unit: PrivacyUnit | str | None = None
) -> None:
    """Raise UnsupportedEvent unless ``event`` has a valid price under ``relation``.

    With a ``unit``, also where it makes the price invalid: a node that is removed takes its share
    of a distributed noise along, which no event here covers; a node whose update becomes zeros, or
    another one, still adds its share.
    """
    for part in count_events([event]):
        if (
            unit == PrivacyUnit.NODE
            and relation is Relation.ADD_OR_REMOVE_ONE
            and isinstance(part, DistributedDiscreteGaussian | DistributedSkellam)
        ):
            raise UnsupportedEvent(
                f"relation={str(relation)!r} must be 'zero-out' or 'replace-one' for unit='node' "
                f"and {part!r}: a removed node takes its share of the noise along"
            )
        if not (pld.supports(part, relation) or rdp.supports(part, relation)):
            raise UnsupportedEvent(_why_unsupported(part, relation))


class Price:
    """The releases of a composition, sorted by how they are to be priced.

    Parameters
    ----------
    events : iterable of Event
        Everything that was or will be released.
    relation : Relation
        How neighbouring data sets differ.
    total_variation : float
        See `epsilon`.

    Raises
    ------
    UnsupportedEvent
        If an event has no valid price under ``relation``.
    """

    def __init__(
        self, events: Iterable[Event], relation: Relation, *, total_variation: float = 0.0
    ) -> None:
        non_negative(total_variation=total_variation)
        self.relation = relation
        self.total_variation = total_variation
        counts: dict[Event, int] = {}
        for event, count in count_events(events).items():
            require_supported(event, relation)
            simple = _simplify(event)
            counts[simple] = counts.get(simple, 0) + count
        self.counts = counts
        self.no_noise = any(_noise_multiplier(event) == 0 for event in counts)

    def epsilon(self, delta: float, *, coarseness: int = 1) -> float:
        """Return the smallest epsilon that is proven at ``delta``.

        A ``coarseness`` above 1 makes the grid of a `gridded` price coarser: faster, and no less
        than the truth.
        """
        if self.total_variation == 0:
            return self._epsilon_exact(delta, coarseness)
        slack = RESERVED_SHARE_OF_DELTA * delta
        while slack < delta:
            result = self._epsilon_exact(delta - slack, coarseness)
            needed = total_variation_delta(self.total_variation, 1, epsilon=result)
            if needed <= slack:
                return result
            slack = 1.01 * needed
        return math.inf

    def quick_epsilon(self, delta: float) -> float:
        """Return an epsilon that is proven too, about a thousandth larger and faster by far."""
        guess = gaussian_epsilon(self.approximate_mu(), delta) if self.gridded else 0.0
        return self.epsilon(delta, coarseness=self.coarsest(guess) if guess > 0 else 1)

    def _epsilon_exact(self, delta: float, coarseness: int) -> float:
        if not self.counts:
            return 0.0
        if self.no_noise:
            return math.inf
        if self._renyi and self._rest:
            # Basic composition of two valid statements, half of delta each.
            return self._curve.epsilon(delta / 2) + self._epsilon(delta / 2, coarseness)
        return self._curve.epsilon(delta) if self._renyi else self._epsilon(delta, coarseness)

    def delta(self, epsilon: float) -> float:
        """Return the smallest delta that is proven at ``epsilon``."""
        slack = total_variation_delta(self.total_variation, 1, epsilon=epsilon)
        return min(1.0, self._delta_exact(epsilon) + slack)

    def _delta_exact(self, epsilon: float) -> float:
        if not self.counts:
            return 0.0
        if self.no_noise:
            return 1.0
        if self._renyi and self._rest:
            return min(1.0, self._curve.delta(epsilon / 2) + self._delta(epsilon / 2))
        return self._curve.delta(epsilon) if self._renyi else self._delta(epsilon)

    @cached_property
    def _renyi(self) -> Mapping[Event, int]:
        """What only Rényi curves can price, with all that can join it."""
        if not any(rdp.needed(event) for event in self.counts):
            return {}
        return {e: n for e, n in self.counts.items() if rdp.supports(e, self.relation)}

    @cached_property
    def _rest(self) -> Mapping[Event, int]:
        """What is priced exactly or by privacy losses."""
        return {e: n for e, n in self.counts.items() if e not in self._renyi}

    @cached_property
    def _curve(self) -> rdp.Curve:
        """The Rényi curve of `_renyi`."""
        return rdp.compose(self._renyi, self.relation)

    @cached_property
    def _losses(self) -> Any:
        """The privacy losses of `_rest`, on the grid that is meant for them."""
        interval = pld.interval_for(self._rest, self.relation)
        return pld.compose(self._rest, self.relation, interval)

    @property
    def gridded(self) -> bool:
        """Whether the price comes from a grid of privacy losses, and `coarseness` matters."""
        return bool(self._rest) and not self.no_noise and not self._unsampled

    def coarsest(self, target: float) -> int:
        """Return the coarseness at which an epsilon near ``target`` is still about right."""
        return pld.coarsest(self._rest, self.relation, target) if self.gridded else 1

    def approximate_mu(self) -> float:
        """Return the mu of a Gaussian that costs about as much: a first guess, and no bound."""
        return math.inf if self.no_noise else pld.approximate_mu(self.counts, self.relation)

    def _epsilon(self, delta: float, coarseness: int) -> float:
        if self._unsampled:
            mu, pure = _without_coins(self._rest, self.relation)
            return gaussian_epsilon(mu, delta) + pure
        if delta < pld.SMALLEST_DELTA:
            if not all(rdp.supports(event, self.relation) for event in self._rest):
                raise UnsupportedEvent(
                    f"delta={delta!r} must be >= {pld.SMALLEST_DELTA} for {list(self._rest)} "
                    f"under {self.relation}"
                )
            return rdp.compose(self._rest, self.relation).epsilon(delta)
        if coarseness == 1:
            return float(self._losses.get_epsilon_for_delta(delta))
        interval = coarseness * pld.interval_for(self._rest, self.relation)
        coarse = pld.compose(self._rest, self.relation, interval)
        return float(coarse.get_epsilon_for_delta(delta))

    def _delta(self, epsilon: float) -> float:
        if self._unsampled:
            mu, pure = _without_coins(self._rest, self.relation)
            left = epsilon - pure
            return gaussian_delta(mu, left) if left >= 0 else 1.0
        return min(1.0, max(0.0, float(self._losses.get_delta_for_epsilon(epsilon))))

    @cached_property
    def _unsampled(self) -> bool:
        """Whether to price `_rest` as Gaussians and pure epsilons, without coins."""
        if all(isinstance(event, Gaussian) for event in self._rest):
            return True
        return pld.approximate_mu(self._rest, self.relation) > _NO_AMPLIFICATION_ABOVE_MU


def _without_coins(counts: Mapping[Event, int], relation: Relation) -> tuple[float, float]:
    """Return the mu of all Gaussian noise and the summed pure epsilon of all Laplace noise.

    As if everyone took part each time.
    """
    factor = 2 if relation is Relation.REPLACE_ONE else 1
    squares = pure = 0.0
    for event, count in counts.items():
        if _is_laplace(event):
            pure += count * factor / _noise_multiplier(event)
        else:
            # A cap may bring another unit in when one leaves: the sum moves by two clip norms.
            moved = 2 if isinstance(event, CappedPoissonSampled) else factor
            squares += count * (moved / _noise_multiplier(event)) ** 2
    return math.sqrt(squares), pure


def _simplify(event: Event) -> Event:
    """Return the event without a sampling step that samples everyone, or that noise drowns in."""
    match event:
        case PoissonSampled(rate=rate, event=inner) if (
            rate == 1 or 0 < _noise_multiplier(inner) < _NO_AMPLIFICATION_BELOW
        ):
            return inner
        case FixedSizeSampled(population=population, cohort=cohort, event=inner) if (
            cohort == population
        ):
            return inner
        case CappedPoissonSampled() if event.cap >= event.population:
            return _simplify(PoissonSampled(event.rate, Gaussian(event.noise_multiplier)))
        case _:
            return event


def _noise_multiplier(event: Event) -> float:
    match event:
        case Gaussian(noise_multiplier=z) | Laplace(noise_multiplier=z):
            return z
        case CappedPoissonSampled(noise_multiplier=z):
            return z
        case DistributedDiscreteGaussian() | DistributedSkellam():
            return event.noise_multiplier
        case PoissonSampled(event=inner) | FixedSizeSampled(event=inner):
            return _noise_multiplier(inner)
        case _:
            raise UnsupportedEvent(f"{event!r} has no price")


def _is_laplace(event: Event) -> bool:
    return isinstance(event, Laplace) or (
        isinstance(event, PoissonSampled) and isinstance(event.event, Laplace)
    )


def _why_unsupported(event: Event, relation: Relation) -> str:
    if isinstance(event, FixedSizeSampled):
        return (
            f"relation={relation!r} must be {Relation.REPLACE_ONE!r} for {event!r}: "
            "one unit more or less would change the size of a fixed-size sample"
        )
    return f"no valid price is known for {event!r} under relation={relation!r}"
