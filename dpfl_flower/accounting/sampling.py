"""Who takes part in a round, and what that does to the price of its release.

Amplification by sampling holds against observers of the released models, who do not see the cohort;
a server that picks the cohort is not such an observer.

>>> sampling = PoissonSampling(expected_cohort=50, population=1000)
>>> sampling.event(Gaussian(1.0))
PoissonSampled(rate=0.05, event=Gaussian(noise_multiplier=1.0))
>>> FixedSizeSampling(cohort=50, population=1000).supports(Relation.ADD_OR_REMOVE_ONE)
False
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, final

from dpfl_flower.accounting.events import (
    CappedPoissonSampled,
    Event,
    FixedSizeSampled,
    Gaussian,
    PoissonSampled,
)
from dpfl_flower.accounting.units import Relation
from dpfl_flower.checks import at_most, positive, positive_int

if TYPE_CHECKING:
    from dpfl_flower.rng import RandomSource


def _unique(registry: Sequence[int]) -> list[int]:
    nodes = list(registry)
    if len(set(nodes)) != len(nodes):
        raise ValueError("registry must name each unit once: a unit named twice has two coins")
    return nodes


def _gaussian(release: Event, sampling: str) -> Gaussian:
    if not isinstance(release, Gaussian):
        raise ValueError(f"release={release!r} must be a Gaussian under {sampling}")
    return release


class Sampling(ABC):
    """A rule by which units join a round.

    To sample in another way, subclass `CustomSampling`: it is priced without amplification. No
    other class can be subclassed, and what that one is priced at cannot be overridden: TypeError.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__ == __name__:
            return
        # Not by issubclass: a class is no ABC yet when this runs.
        priced = {PoissonSampling, CappedPoissonSampling, FixedSizeSampling, EveryoneSampling}
        if CustomSampling not in cls.__mro__ or priced.intersection(cls.__mro__):
            raise TypeError(
                f"{cls.__name__} must subclass CustomSampling and no other Sampling: "
                "the price of each holds for the way it draws"
            )
        for name in ("event", "supports"):
            if getattr(cls, name) is not getattr(CustomSampling, name):
                raise TypeError(
                    f"{cls.__name__}.{name} cannot be overridden: "
                    "CustomSampling is priced without amplification"
                )

    def __setattr__(self, name: str, value: object) -> None:
        if name in ("event", "supports"):
            raise TypeError(f"{type(self).__name__}.{name} cannot be overridden")
        super().__setattr__(name, value)

    @property
    @abstractmethod
    def population(self) -> int:
        """The public number of units there are."""

    @property
    @abstractmethod
    def expected_cohort(self) -> float:
        """The public number of units expected in a round: what the estimator divides by."""

    @property
    @abstractmethod
    def max_cohort(self) -> int | None:
        """The most units a round can have, None where nothing bounds it."""

    @abstractmethod
    def draw(self, registry: Sequence[int], rng: "RandomSource") -> list[int]:
        """Return the units of one round, drawn afresh from all that are registered.

        Raises
        ------
        ValueError
            If the registry names a unit twice, or exceeds a population the price depends on.
        """

    @abstractmethod
    def event(self, release: Event) -> Event:
        """Return the event that prices ``release`` made on such a cohort.

        Raises
        ------
        ValueError
            If no valid price is known for that release under this sampling.
        """

    @abstractmethod
    def supports(self, relation: Relation) -> bool:
        """Return whether a price is known under ``relation``."""


@final
class PoissonSampling(Sampling):
    """Every registered unit joins by its own coin of probability expected_cohort / population.

    A registry larger than the population is fine: each unit's chance stays the same.
    """

    def __init__(self, expected_cohort: float, population: int) -> None:
        positive(expected_cohort=expected_cohort)
        positive_int(population=population)
        at_most(population, expected_cohort=expected_cohort)
        self._expected_cohort = float(expected_cohort)
        self._population = int(population)

    def __repr__(self) -> str:
        return f"PoissonSampling({self._expected_cohort:g}, {self._population})"

    @property
    def population(self) -> int:
        """The public number of units there are."""
        return self._population

    @property
    def expected_cohort(self) -> float:
        """The public number of units expected in a round."""
        return self._expected_cohort

    @property
    def max_cohort(self) -> int | None:
        """None: any number of coins may come up."""
        return None

    @property
    def rate(self) -> float:
        """The probability with which each unit joins."""
        return self._expected_cohort / self._population

    def draw(self, registry: Sequence[int], rng: "RandomSource") -> list[int]:
        """Return the units whose coin came up, in registry order."""
        nodes = _unique(registry)
        coins = rng.coins(self.rate, len(nodes))
        return [node for node, coin in zip(nodes, coins, strict=True) if coin]

    def event(self, release: Event) -> Event:
        """Return the Poisson-sampled release; at rate 1 the release itself."""
        return release if self.rate == 1 else PoissonSampled(self.rate, release)

    def supports(self, relation: Relation) -> bool:
        """Return True: every relation has a price."""
        return relation in Relation


@final
class CappedPoissonSampling(Sampling):
    """Poisson sampling, cut to a random subset of ``cap`` units when more coins come up.

    The population is an enforced bound: with a cap of 80, an expected cohort of 50 and 200 rounds
    at noise multiplier 1, the price for 1000 units is 4.81, the truth for 1200 would be 7.02.
    """

    def __init__(self, expected_cohort: float, population: int, cap: int) -> None:
        positive(expected_cohort=expected_cohort)
        positive_int(population=population, cap=cap)
        at_most(population, expected_cohort=expected_cohort)
        if cap < expected_cohort:
            raise ValueError(f"cap={cap!r} must be >= expected_cohort = {expected_cohort!r}")
        self._expected_cohort = float(expected_cohort)
        self._population = int(population)
        self._cap = int(cap)
        self.event(Gaussian(1.0))  # raises where rounding makes the rate 1 though a cap binds

    def __repr__(self) -> str:
        return f"CappedPoissonSampling({self._expected_cohort:g}, {self._population}, {self._cap})"

    @property
    def population(self) -> int:
        """The most units there may be."""
        return self._population

    @property
    def expected_cohort(self) -> float:
        """The public number of units expected in a round, before the cap."""
        return self._expected_cohort

    @property
    def max_cohort(self) -> int | None:
        """The cap."""
        return min(self._cap, self._population)

    @property
    def rate(self) -> float:
        """The probability with which each unit's coin comes up."""
        return self._expected_cohort / self._population

    def draw(self, registry: Sequence[int], rng: "RandomSource") -> list[int]:
        """Return the units whose coin came up, a uniform subset of them when above the cap."""
        nodes = _unique(registry)
        _check_registry(nodes, self._population)
        coins = rng.coins(self.rate, len(nodes))
        drawn = [node for node, coin in zip(nodes, coins, strict=True) if coin]
        return drawn if len(drawn) <= self._cap else rng.sample(drawn, self._cap)

    def event(self, release: Event) -> Event:
        """Return the capped Poisson-sampled release; ValueError unless it is Gaussian."""
        gaussian = _gaussian(release, "capped Poisson sampling")
        return CappedPoissonSampled(
            population=self._population,
            rate=self.rate,
            cap=self._cap,
            noise_multiplier=gaussian.noise_multiplier,
        )

    def supports(self, relation: Relation) -> bool:
        """Return True: every relation has a price."""
        return relation in Relation


@final
class FixedSizeSampling(Sampling):
    """Exactly ``cohort`` of ``population`` places are drawn without replacement.

    A place that nobody has registered for stays empty: drawing the full cohort from a smaller
    registry would raise everyone's chance above the one that is priced.
    """

    def __init__(self, cohort: int, population: int) -> None:
        positive_int(cohort=cohort, population=population)
        at_most(population, cohort=cohort)
        self._cohort = int(cohort)
        self._population = int(population)

    def __repr__(self) -> str:
        return f"FixedSizeSampling({self._cohort}, {self._population})"

    @property
    def population(self) -> int:
        """The number of places."""
        return self._population

    @property
    def expected_cohort(self) -> float:
        """The number of places drawn."""
        return self._cohort

    @property
    def max_cohort(self) -> int | None:
        """The number of places drawn."""
        return self._cohort

    def draw(self, registry: Sequence[int], rng: "RandomSource") -> list[int]:
        """Return the units on the drawn places; ValueError if there are more units than places."""
        nodes = _unique(registry)
        _check_registry(nodes, self._population)
        places = rng.sample(range(self._population), self._cohort)
        return [nodes[place] for place in places if place < len(nodes)]

    def event(self, release: Event) -> Event:
        """Return the release on a fixed-size sample; ValueError unless it is Gaussian."""
        gaussian = _gaussian(release, "fixed-size sampling")
        return FixedSizeSampled(self._population, self._cohort, gaussian)

    def supports(self, relation: Relation) -> bool:
        """Return True for replace-one only: adding a unit would change the cohort's size."""
        return relation is Relation.REPLACE_ONE


@final
class EveryoneSampling(Sampling):
    """Everyone takes part in every round; nothing is amplified."""

    def __init__(self, population: int) -> None:
        positive_int(population=population)
        self._population = int(population)

    def __repr__(self) -> str:
        return f"EveryoneSampling({self._population})"

    @property
    def population(self) -> int:
        """The public number of units there are."""
        return self._population

    @property
    def expected_cohort(self) -> float:
        """The population."""
        return self._population

    @property
    def max_cohort(self) -> int | None:
        """None: everyone who has registered takes part."""
        return None

    def draw(self, registry: Sequence[int], rng: "RandomSource") -> list[int]:
        """Return everyone."""
        del rng
        return _unique(registry)

    def event(self, release: Event) -> Event:
        """Return the release itself."""
        return release

    def supports(self, relation: Relation) -> bool:
        """Return True: every relation has a price."""
        return relation in Relation


class CustomSampling(Sampling, ABC):
    """Any other rule: cyclic, with replacement, whoever is online. Priced without amplification.

    Subclass it, implement `draw`, `population` and `expected_cohort`, and return each unit at most
    once. No proof of amplification is known for an arbitrary rule, so none is claimed. Nor may a
    unit be added or removed: where the rule looks at who is registered, one unit more or less may
    change the whole cohort. Who is registered is public here; what is protected is a unit's data,
    replaced or zeroed in its place.
    """

    @property
    def max_cohort(self) -> int | None:
        """None: nothing is known about the rule."""
        return None

    @final
    def event(self, release: Event) -> Event:
        """Return the release itself."""
        return release

    @final
    def supports(self, relation: Relation) -> bool:
        """Return False for add-or-remove-one: the rule may answer it with another cohort."""
        return relation in (Relation.REPLACE_ONE, Relation.ZERO_OUT)


def _check_registry(nodes: list[int], population: int) -> None:
    if len(nodes) > population:
        raise ValueError(
            f"registry of {len(nodes)} units must be <= population = {population}: "
            "the price depends on that bound"
        )
