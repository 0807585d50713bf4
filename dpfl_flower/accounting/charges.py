"""What was planned and charged, and what that costs: a ledger without its file.

>>> from dpfl_flower.accounting.events import Gaussian
>>> charges = Charges(delta=1e-5, relation=Relation.ADD_OR_REMOVE_ONE)
>>> charges.add_plan(Plan("model", Gaussian(10.0), count=100))
>>> charges.add_charge("model", 1)
>>> charges.events()
[Gaussian(noise_multiplier=10.0)]
>>> charges.remaining("model", epsilon_budget=2.0)
24
"""

from collections.abc import Mapping
from functools import lru_cache

from dpfl_flower.accounting.accountant import Price, epsilon
from dpfl_flower.accounting.dominance import dearest
from dpfl_flower.accounting.events import Composed, Event
from dpfl_flower.accounting.plan import Plan
from dpfl_flower.accounting.search import largest_within
from dpfl_flower.accounting.units import Relation


class Charges:
    """The plans and charges of one data set.

    Pricing takes about a second, so what was priced is kept until something changes it. In the
    usual case, where everything planned fits the budget, nothing is priced from charge to charge.
    """

    def __init__(self, *, delta: float, relation: Relation) -> None:
        self._delta = delta
        self._relation = relation
        self._plans: dict[str, Plan] = {}
        self._charged: dict[str, int] = {}
        self._torn: list[Event] = []
        self._torn_variation = 0.0
        self._epsilons: dict[float, float] = {}
        # Per budget: whether all plans fit it, and how many releases of a run fit it in all.
        self._everything_fits: dict[float, bool] = {}
        self._allowances: dict[tuple[str, float], int] = {}

    @property
    def plans(self) -> Mapping[str, Plan]:
        """The plan of each run."""
        return self._plans

    def charged(self, run: str) -> int:
        """Return how many releases of a run were charged."""
        return self._charged[run]

    @property
    def releases(self) -> int:
        """How many releases were charged in all, torn lines included."""
        torn = sum(event.count if isinstance(event, Composed) else 1 for event in self._torn)
        return sum(self._charged.values()) + torn

    @property
    def total_variation(self) -> float:
        """The bound on the total variation distance of all charged noise from its events."""
        return self._variation(self._charged)

    def events(self) -> list[Event]:
        """Return everything that was charged."""
        return self._events_without(None)

    def add_plan(self, plan: Plan) -> None:
        """Take in a new run."""
        self._plans[plan.run] = plan
        self._charged[plan.run] = 0
        self._everything_fits.clear()

    def add_charge(self, run: str, count: int) -> None:
        """Take in ``count`` releases of a run."""
        self._charged[run] += count
        self._epsilons.clear()
        self._allowances = {key: n for key, n in self._allowances.items() if key[0] == run}

    def add_torn(self) -> None:
        """Charge a line that a crash cut short as the dearest charge that was planned."""
        plans = self._plans.values()
        possible = [_times(plan.event, plan.max_charge) for plan in plans]
        self._torn += dearest(possible, self._relation)
        variations = [plan.total_variation * plan.max_charge for plan in plans]
        self._torn_variation += max(variations, default=0.0)
        self._epsilons.clear()
        self._everything_fits.clear()
        self._allowances.clear()

    def epsilon(self, delta: float) -> float:
        """Return the epsilon of everything charged."""
        if delta not in self._epsilons:
            self._epsilons[delta] = priced(
                tuple(self.events()), delta, self._relation, self.total_variation
            )
        return self._epsilons[delta]

    def quick_epsilon(self, delta: float) -> float:
        """Return at least that epsilon, and about a thousandth more: faster by far."""
        if delta in self._epsilons:
            return self._epsilons[delta]
        price = Price(self.events(), self._relation, total_variation=self.total_variation)
        return price.quick_epsilon(delta)

    def remaining(self, run: str, *, epsilon_budget: float) -> int:
        """Return how many more planned releases of a run stay within a budget."""
        plan = self._plans[run]
        if self._fits(epsilon_budget):
            return plan.count - self._charged[run]
        key = (run, epsilon_budget)
        if key not in self._allowances:
            self._allowances[key] = self._affordable(plan, epsilon_budget)
        return max(0, self._allowances[key] - self._charged[run])

    def _affordable(self, plan: Plan, epsilon_budget: float) -> int:
        """Return how many releases of a run, those charged included, stay within a budget."""
        others = self._events_without(plan.run)

        def price(count: int) -> Price:
            events = [*others, Composed(plan.event, count)] if count else others
            variation = self._variation({**self._charged, plan.run: count})
            return Price(events, self._relation, total_variation=variation)

        return largest_within(price, epsilon_budget, self._delta, at_most=plan.count)

    def _fits(self, epsilon_budget: float) -> bool:
        """Return whether all plans, carried out in full, stay within a budget."""
        if epsilon_budget not in self._everything_fits:
            planned = [Composed(plan.event, plan.count) for plan in self._plans.values()]
            cost = epsilon(
                planned + self._torn,
                delta=self._delta,
                relation=self._relation,
                total_variation=self._variation({r: p.count for r, p in self._plans.items()}),
            )
            self._everything_fits[epsilon_budget] = cost <= epsilon_budget
        return self._everything_fits[epsilon_budget]

    def _events_without(self, run: str | None) -> list[Event]:
        charged = [
            _times(self._plans[name].event, n)
            for name, n in self._charged.items()
            if n and name != run
        ]
        return charged + self._torn

    def _variation(self, counts: Mapping[str, int]) -> float:
        """Return the total variation bound of so many releases of each run, and torn lines."""
        runs = sum(self._plans[run].total_variation * n for run, n in counts.items())
        return runs + self._torn_variation


@lru_cache(maxsize=64)
def priced(
    events: tuple[Event, ...], delta: float, relation: Relation, total_variation: float
) -> float:
    """Return `epsilon` of ``events``, remembered: data sets and rounds are often charged alike."""
    return epsilon(events, delta=delta, relation=relation, total_variation=total_variation)


def _times(event: Event, count: int) -> Event:
    return event if count == 1 else Composed(event, count)
