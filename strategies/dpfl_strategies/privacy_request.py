"""What the user asked for: a budget, a noise multiplier, or both; parsed once, at the edge."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from dpfl_flower import checks
from dpfl_flower.accounting import (
    Event,
    PrivacyBudget,
    PrivacyUnit,
    Relation,
    Sampling,
    affordable_rounds,
    calibrate,
)

# With less noise than this it is never the budget that integers cannot carry.
_MUCH_NOISE = 1.0


@dataclass(frozen=True)
class PrivacyRequest:
    """A privacy unit and either a budget, a noise multiplier, or a multiplier under a budget.

    Parameters
    ----------
    budget:
        The most that the data set may spend, all runs on its ledger together.
    noise_multiplier:
        Standard deviation of the noise on the sum, in clip norms. Where None, the smallest that
        lets all planned rounds fit the budget is found at the start of the run.
    delta:
        Where epsilon is reported without a budget; ``min(1e-5, 0.1 / population)`` by default.
    unit, relation:
        Only without a budget, which names its own.
    """

    sampling: Sampling
    budget: PrivacyBudget | None
    noise_multiplier: float | None
    delta: float
    unit: PrivacyUnit
    relation: Relation

    @classmethod
    def parse(
        cls,
        *,
        sampling: Sampling,
        budget: PrivacyBudget | None,
        noise_multiplier: float | None,
        delta: float | None,
        unit: PrivacyUnit | str | None,
        relation: Relation | str | None,
    ) -> "PrivacyRequest":
        """Check the user's arguments against each other and fill in what they imply.

        Raises
        ------
        ValueError
            Naming the argument, its value and the bound.
        """
        if not isinstance(sampling, Sampling):
            raise ValueError(
                f"sampling={sampling!r} must be PoissonSampling(expected_cohort, population), "
                "EveryoneSampling(population) or another Sampling"
            )
        if budget is not None:
            checks.instance(PrivacyBudget, budget=budget)
        population = sampling.population
        if budget is None and noise_multiplier is None:
            raise ValueError(
                "budget=None and noise_multiplier=None: one of the two must be given; without "
                "either, nothing would say how much noise the run needs"
            )
        if noise_multiplier is not None:
            checks.non_negative(noise_multiplier=noise_multiplier)
        if budget is not None:
            for name, value, own in (
                ("delta", delta, budget.delta),
                ("unit", unit, budget.unit),
                ("relation", relation, budget.relation),
            ):
                if value is not None and value != own:
                    raise ValueError(f"{name}={value!r} must be the budget's own, {own!r}")
            delta, unit, relation = budget.delta, budget.unit, budget.relation
        if delta is None:
            delta = min(1e-5, 0.1 / population)
        checks.probability(delta=delta)
        if delta >= 1 / population:
            raise ValueError(
                f"delta={delta!r} must be < 1/population={1 / population!r}: with a larger delta, "
                "publishing somebody's data outright would count as private"
            )
        relation = checks.choice(Relation, relation=relation or Relation.ADD_OR_REMOVE_ONE)
        if not sampling.supports(relation):
            priced = [str(other) for other in Relation if sampling.supports(other)]
            raise ValueError(
                f"relation={str(relation)!r} must be one of {priced}, for which "
                f"{type(sampling).__name__} has a price"
            )
        return cls(
            sampling=sampling,
            budget=budget,
            noise_multiplier=noise_multiplier,
            delta=delta,
            unit=checks.choice(PrivacyUnit, unit=unit or PrivacyUnit.NODE),
            relation=relation,
        )

    def solve(self, num_rounds: int, *, prior: Sequence[Event], total_variation: float) -> float:
        """Return the noise multiplier for ``num_rounds`` rounds after the ``prior`` events.

        ``total_variation`` bounds how far all the noise drawn is from its exact distribution.
        """
        if self.noise_multiplier is not None:
            return self.noise_multiplier
        assert self.budget is not None
        return calibrate(
            self.budget, self.sampling, num_rounds, prior=prior, total_variation=total_variation
        )

    def check_one_release(self, event: Event) -> None:
        """Raise ValueError where the noise that was given is too little for a single ``event``."""
        budget = self.budget
        if budget is None or self.noise_multiplier is None:
            return
        if affordable_rounds(budget, event, at_most=1) < 1:
            raise ValueError(
                f"noise_multiplier={self.noise_multiplier!r} is too little noise for {budget}: not "
                "one round fits this budget, so that none would be run. Raise noise_multiplier or "
                "epsilon, or leave noise_multiplier out: it then follows from the budget"
            )

    @contextmanager
    def naming_the_budget(self, noise_multiplier: float, num_rounds: int) -> Iterator[None]:
        """Where integers inside cannot carry the noise that the budget asks for, say that it does.

        Raises
        ------
        ValueError
            Instead of one about a noise multiplier that the user never gave.
        """
        try:
            yield
        except ValueError as error:
            if self.budget is None or self.noise_multiplier is not None:
                raise
            if noise_multiplier < _MUCH_NOISE:
                raise
            raise ValueError(
                f"epsilon={self.budget.epsilon!r} over num_rounds={num_rounds} rounds asks for "
                f"more noise (noise_multiplier={noise_multiplier:.4g}) than this model can be "
                "released under: raise epsilon, plan fewer rounds, or draw each round from more "
                "units"
            ) from error
