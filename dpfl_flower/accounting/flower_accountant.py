"""Flower's ``PrivacyAccountant`` protocol on top of a ledger.

Hand it to Flower's own wrappers, and what they release is charged to the data set's ledger,
together with every other run on that data. It prices what the wrapper says it did; floating-point
noise from a seeded generator stays what it is.

>>> from dpfl_flower.accounting.ledger import Ledger
>>> ledger = Ledger.in_memory(dataset="x", delta=1e-5)
>>> accountant = LedgerAccountant(ledger, population=100, planned_releases=50)
>>> release = GaussianPrivacyEvent(noise_multiplier=5.0, sample_size=10, population_size=100)
>>> accountant.compose(release, count=3)
>>> round(accountant.get_privacy_spent().epsilon, 3)
2.876
"""

from collections.abc import Mapping
from typing import cast, final

from flwr.serverapp import (
    GaussianPrivacyEvent,
    NeighboringRelation,
    PrivacyConfig,
    PrivacySpent,
    SamplingMethod,
)

from dpfl_flower.accounting import accountant
from dpfl_flower.accounting.errors import BudgetExhausted, LedgerError
from dpfl_flower.accounting.events import (
    Composed,
    Event,
    FixedSizeSampled,
    Gaussian,
    PoissonSampled,
)
from dpfl_flower.accounting.ledger import Ledger
from dpfl_flower.accounting.ledger_file import LedgerPosition
from dpfl_flower.accounting.units import Relation
from dpfl_flower.checks import positive, positive_int

_BACKEND = "dpfl-ledger"

_RELATIONS = {
    Relation.ADD_OR_REMOVE_ONE: NeighboringRelation.ADD_OR_REMOVE_ONE,
    Relation.REPLACE_ONE: NeighboringRelation.REPLACE_ONE,
}


@final
class LedgerAccountant:
    """One Flower run as one run of a ledger, satisfying ``flwr.serverapp.PrivacyAccountant``.

    Parameters
    ----------
    ledger : Ledger
        The open ledger of the data set.
    population : int
        The number of units.
    planned_releases : int
        How many releases the run may make.
    sampling_method : SamplingMethod
        How Flower draws its cohorts. Its wrappers accept only no amplification, the default.
    run : str
        The run's name in the ledger; the noise multiplier and sample size of its first release
        become its plan.

    Raises
    ------
    ValueError
        If Flower knows no such combination of sampling method and the ledger's relation.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        population: int,
        planned_releases: int,
        sampling_method: SamplingMethod = SamplingMethod.NO_AMPLIFICATION,
        run: str = "flower",
    ) -> None:
        positive_int(population=population, planned_releases=planned_releases)
        if ledger.relation not in _RELATIONS:
            raise ValueError(
                f"relation={ledger.relation.value!r} must be one of {list(_RELATIONS)} for Flower"
            )
        self._ledger = ledger
        self._planned_releases = planned_releases
        self._run = run
        self._config = PrivacyConfig(
            target_delta=ledger.delta,
            population_size=population,
            neighboring_relation=_RELATIONS[ledger.relation],
            sampling_method=sampling_method,
            max_epsilon=None if ledger.budget is None else ledger.budget.epsilon,
        )

    @property
    def config(self) -> PrivacyConfig:
        """The ledger's terms in Flower's words."""
        return self._config

    @property
    def num_releases(self) -> int:
        """How many releases about the data set were charged, other runs' included."""
        return self._ledger.releases

    def compose(self, event: GaussianPrivacyEvent, count: int = 1) -> None:
        """Charge ``count`` releases.

        Raises
        ------
        BudgetExhausted
            If the budget does not allow all of them; none is charged.
        LedgerError
            If the release is not the one that was planned.
        """
        positive_int(count=count)
        self._ledger.plan(self._run, self._price(event), self._planned_releases)
        affordable = self._ledger.affordable(self._run, count)
        if affordable < count:
            raise BudgetExhausted(
                f"{count} more releases, {affordable} affordable: {self._spent()}"
            )
        for _ in range(count):
            self._ledger.charge(self._run)

    def get_epsilon(self, delta: float) -> float:
        """Return the epsilon of everything charged at ``delta``."""
        return self._ledger.epsilon(delta)

    def get_delta(self, epsilon: float) -> float:
        """Return the delta of everything charged at ``epsilon``."""
        return accountant.delta(
            self._ledger.events(),
            epsilon=epsilon,
            relation=self._ledger.relation,
            total_variation=self._ledger.total_variation,
        )

    def get_privacy_spent(self, delta: float | None = None) -> PrivacySpent:
        """Return what was spent in Flower's words."""
        at = self._config.target_delta if delta is None else delta
        return PrivacySpent(
            epsilon=self.get_epsilon(at),
            delta=at,
            num_releases=self.num_releases,
            accounting_method=_BACKEND,
        )

    def would_exceed(
        self, event: GaussianPrivacyEvent, max_epsilon: float | None = None, count: int = 1
    ) -> bool:
        """Return whether ``count`` more releases would cost more than ``max_epsilon``."""
        positive_int(count=count)
        limit = self._config.max_epsilon if max_epsilon is None else max_epsilon
        if limit is None:
            raise ValueError("max_epsilon=None must be a number where the ledger has no budget")
        positive(max_epsilon=limit)
        events = [*self._ledger.events(), Composed(self._price(event), count)]
        cost = accountant.epsilon(
            events,
            delta=self._config.target_delta,
            relation=self._ledger.relation,
            total_variation=self._ledger.total_variation,
        )
        return cost > limit

    def state_dict(self) -> dict[str, object]:
        """Return where the ledger stands; the releases themselves stay in the ledger."""
        position = self._ledger.position
        return {
            "backend": _BACKEND,
            "dataset": self._ledger.dataset,
            "run": self._run,
            "length": position.length,
            "head": position.head,
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Verify that the ledger goes on from where ``state`` was taken.

        Raises
        ------
        LedgerError
            If the state is another ledger's or run's.
        LedgerTampered
            If the ledger is shorter than it was.
        """
        expected = {"backend": _BACKEND, "dataset": self._ledger.dataset, "run": self._run}
        for key, value in expected.items():
            if state.get(key) != value:
                raise LedgerError(f"state has {key}={state.get(key)!r}, not {value!r}")
        length, head = cast(int, state.get("length")), cast(str, state.get("head"))
        self._ledger.require_extends(LedgerPosition(length=length, head=head))

    def _price(self, event: GaussianPrivacyEvent) -> Event:
        """Return a Flower event as one of ours."""
        if event.population_size != self._config.population_size:
            raise ValueError(
                f"population_size={event.population_size} must be the accountant's "
                f"{self._config.population_size}"
            )
        release = Gaussian(event.noise_multiplier)
        match self._config.sampling_method:
            case SamplingMethod.POISSON:
                return PoissonSampled(event.sample_size / event.population_size, release)
            case SamplingMethod.WITHOUT_REPLACEMENT:
                return FixedSizeSampled(event.population_size, event.sample_size, release)
            case SamplingMethod.NO_AMPLIFICATION:
                return self._unamplified(event)

    def _unamplified(self, event: GaussianPrivacyEvent) -> Event:
        """Price a cohort that Flower drew: with less than everyone, a node that leaves makes room.

        Another one takes its place, so that under add-or-remove-one the sum moves by two clip
        norms; under replace-one that is counted already.
        """
        moved = 1.0
        removed = self._ledger.relation is Relation.ADD_OR_REMOVE_ONE
        if removed and event.sample_size < event.population_size:
            moved = 2.0
        return Gaussian(event.noise_multiplier / moved)

    def _spent(self) -> str:
        return str(self._ledger.spent())
