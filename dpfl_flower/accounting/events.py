"""What was released, as plain data: an event says what happened, the accountant what it costs.

Noise multipliers are relative to the sensitivity under add-or-remove-one, so that one event can be
priced under any relation. Distributed noise is in integer units of its own, sensitivity beside it.

>>> event = Composed(PoissonSampled(0.1, Gaussian(3.0)), 512)
>>> event_from_json(event.to_json()) == event
True
>>> event.to_json()["event"]["rate"]
0.1
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dpfl_flower.checks import at_most, fraction, non_negative, positive_int


class Event(ABC):
    """One release, or several; the subclasses below are all there are."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Return the event as JSON-able data, ``kind`` included."""


@dataclass(frozen=True)
class Gaussian(Event):
    """Gaussian noise of standard deviation ``noise_multiplier`` times the L2 sensitivity.

    A Gaussian that was rounded to integers, added to an integer sum, is this event too: rounding is
    post-processing of a real Gaussian. The *discrete* Gaussian is not.
    """

    noise_multiplier: float

    def __post_init__(self) -> None:
        non_negative(noise_multiplier=self.noise_multiplier)
        object.__setattr__(self, "noise_multiplier", float(self.noise_multiplier))

    def to_json(self) -> dict[str, Any]:
        """Return the event as JSON-able data."""
        return {"kind": "gaussian", "noise_multiplier": self.noise_multiplier}


@dataclass(frozen=True)
class Laplace(Event):
    """Laplace noise of scale ``noise_multiplier`` times the L1 sensitivity (rounded or real)."""

    noise_multiplier: float

    def __post_init__(self) -> None:
        non_negative(noise_multiplier=self.noise_multiplier)
        object.__setattr__(self, "noise_multiplier", float(self.noise_multiplier))

    def to_json(self) -> dict[str, Any]:
        """Return the event as JSON-able data."""
        return {"kind": "laplace", "noise_multiplier": self.noise_multiplier}


@dataclass(frozen=True)
class _Distributed(Event, ABC):
    """What the shares of several nodes and the units they protect have in common.

    Attributes
    ----------
    squared_scale : int
        Parameter of one share, in squared grid units: sigma^2 of the discrete Gaussian, the
        variance of the Skellam.
    shares : int
        How many independent shares are certain to be in what is released: the fewest survivors
        allowed, less the colluders who could subtract their own.
    l2_sensitivity, l1_sensitivity : int
        Bounds, in grid units, on what one unit adds to the sum, as checked on its integers.
    dimension : int
        Coordinates that every share has, padding included.
    """

    squared_scale: int
    shares: int
    l2_sensitivity: int
    l1_sensitivity: int
    dimension: int

    def __post_init__(self) -> None:
        for name in _DISTRIBUTED_FIELDS:
            positive_int(**{name: getattr(self, name)})
            object.__setattr__(self, name, int(getattr(self, name)))
        if self.l1_sensitivity < self.l2_sensitivity:
            raise ValueError(
                f"l1_sensitivity={self.l1_sensitivity!r} must be >= l2_sensitivity = "
                f"{self.l2_sensitivity!r}, as norms are"
            )

    @property
    def noise_multiplier(self) -> float:
        """Standard deviation of the certain noise over the L2 sensitivity."""
        return math.sqrt(self.shares * self.squared_scale) / self.l2_sensitivity

    def _fields(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in _DISTRIBUTED_FIELDS}


_DISTRIBUTED_FIELDS = (
    "squared_scale",
    "shares",
    "l2_sensitivity",
    "l1_sensitivity",
    "dimension",
)


@dataclass(frozen=True)
class DistributedDiscreteGaussian(_Distributed):
    """A sum of integers to which each of several nodes added discrete Gaussian noise.

    With ``shares=1`` it is the central discrete Gaussian. Whoever picks the cohort learns the noisy
    sum, so no sampling amplifies it: it has no sampled variant.
    """

    def to_json(self) -> dict[str, Any]:
        """Return the event as JSON-able data."""
        return {"kind": "distributed-discrete-gaussian", **self._fields()}


@dataclass(frozen=True)
class DistributedSkellam(_Distributed):
    """A sum of integers to which each of several nodes added Skellam noise.

    As `DistributedDiscreteGaussian`; a sum of Skellam draws is Skellam, with the summed variance.
    """

    def to_json(self) -> dict[str, Any]:
        """Return the event as JSON-able data."""
        return {"kind": "distributed-skellam", **self._fields()}


def _check_inner(event: Event, *allowed: type[Event]) -> None:
    if not isinstance(event, allowed):
        names = " or ".join(kind.__name__ for kind in allowed)
        raise ValueError(f"event={event!r} must be a {names}")


@dataclass(frozen=True)
class PoissonSampled(Event):
    """A release on a sample that each unit joins by its own coin of probability ``rate``."""

    rate: float
    event: Event

    def __post_init__(self) -> None:
        fraction(rate=self.rate)
        object.__setattr__(self, "rate", float(self.rate))
        _check_inner(self.event, Gaussian, Laplace)

    def to_json(self) -> dict[str, Any]:
        """Return the event as JSON-able data."""
        return {"kind": "poisson-sampled", "rate": self.rate, "event": self.event.to_json()}


@dataclass(frozen=True)
class CappedPoissonSampled(Event):
    """A Gaussian release on a Poisson sample cut to a random subset of ``cap`` when it is larger.

    ``population`` is an enforced upper bound on the number of units: the price depends on it. With
    a rate of 1 a cap below it is a sample of fixed size, which is not this event.
    """

    population: int
    rate: float
    cap: int
    noise_multiplier: float

    def __post_init__(self) -> None:
        positive_int(population=self.population, cap=self.cap)
        fraction(rate=self.rate)
        if self.rate == 1 and self.cap < self.population:
            raise ValueError(
                f"rate={self.rate!r} must be < 1 with a cap of {self.cap!r} < population = "
                f"{self.population!r}: that is a sample of fixed size"
            )
        non_negative(noise_multiplier=self.noise_multiplier)
        object.__setattr__(self, "rate", float(self.rate))
        object.__setattr__(self, "noise_multiplier", float(self.noise_multiplier))

    def to_json(self) -> dict[str, Any]:
        """Return the event as JSON-able data."""
        return {
            "kind": "capped-poisson-sampled",
            "population": self.population,
            "rate": self.rate,
            "cap": self.cap,
            "noise_multiplier": self.noise_multiplier,
        }


@dataclass(frozen=True)
class FixedSizeSampled(Event):
    """A Gaussian release on exactly ``cohort`` of ``population`` units, without replacement."""

    population: int
    cohort: int
    event: Event

    def __post_init__(self) -> None:
        positive_int(population=self.population, cohort=self.cohort)
        at_most(self.population, cohort=self.cohort)
        _check_inner(self.event, Gaussian)

    def to_json(self) -> dict[str, Any]:
        """Return the event as JSON-able data."""
        return {
            "kind": "fixed-size-sampled",
            "population": self.population,
            "cohort": self.cohort,
            "event": self.event.to_json(),
        }


@dataclass(frozen=True)
class Composed(Event):
    """The same release ``count`` times, on fresh coins and fresh noise each time."""

    event: Event
    count: int

    def __post_init__(self) -> None:
        positive_int(count=self.count)
        if not isinstance(self.event, Event):
            raise ValueError(f"event={self.event!r} must be an Event")

    def to_json(self) -> dict[str, Any]:
        """Return the event as JSON-able data."""
        return {"kind": "composed", "count": self.count, "event": self.event.to_json()}


_KINDS: dict[str, type[Event]] = {
    "gaussian": Gaussian,
    "laplace": Laplace,
    "poisson-sampled": PoissonSampled,
    "capped-poisson-sampled": CappedPoissonSampled,
    "fixed-size-sampled": FixedSizeSampled,
    "composed": Composed,
    "distributed-discrete-gaussian": DistributedDiscreteGaussian,
    "distributed-skellam": DistributedSkellam,
}


def event_from_json(data: Mapping[str, Any]) -> Event:
    """Return the event that `Event.to_json` wrote.

    Raises
    ------
    ValueError
        If the data names an unknown kind, lacks a field or has one too many.
    """
    fields = dict(data)
    kind = fields.pop("kind", None)
    if kind not in _KINDS:
        raise ValueError(f"kind={kind!r} must be one of {sorted(_KINDS)}")
    if isinstance(fields.get("event"), Mapping):
        fields["event"] = event_from_json(fields["event"])
    try:
        return _KINDS[kind](**fields)
    except TypeError as error:
        raise ValueError(f"malformed {kind} event {dict(data)!r}: {error}") from None


def events_to_json(events: Iterable[Event]) -> str:
    """Return a list of events as one line of canonical JSON."""
    return json.dumps([event.to_json() for event in events], sort_keys=True, separators=(",", ":"))


def events_from_json(text: str) -> list[Event]:
    """Return the events that `events_to_json` wrote; ValueError if it is anything else."""
    data = json.loads(text)
    if not isinstance(data, list) or not all(isinstance(item, dict) for item in data):
        raise ValueError(f"events must be a JSON list of objects, not {text[:80]!r}")
    return [event_from_json(item) for item in data]


def count_events(events: Iterable[Event]) -> dict[Event, int]:
    """Return how often each elementary release happened, nested compositions multiplied out.

    >>> count_events([Composed(Composed(Gaussian(1.0), 2), 3), Gaussian(1.0)])
    {Gaussian(noise_multiplier=1.0): 7}
    """
    counts: dict[Event, int] = {}
    for event in events:
        if not isinstance(event, Event):
            raise ValueError(f"event={event!r} must be an Event")
        count = 1
        elementary = event
        while isinstance(elementary, Composed):
            count *= elementary.count
            elementary = elementary.event
        counts[elementary] = counts.get(elementary, 0) + count
    return counts
