"""``dpfl plan``: what a budget costs in noise, before anything is run.

The noise on the sum has ``z C`` as its standard deviation in each coordinate; divided by the
expected cohort ``m`` that is ``z / m`` clip norms on the mean, and over ``d`` coordinates its
length is about ``sqrt(d) z / m`` clip norms, where a mean of clipped updates has at most one.

>>> noise = MeanNoise(noise_multiplier=1.0, cohort=100, rounds=64, dimension=40_000)
>>> noise.per_coordinate, noise.length, noise.length_over_run
(0.01, 2.0, 0.25)
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Final

import typer
from rich.table import Table

from dpfl_flower import checks
from dpfl_flower.accounting import (
    Composed,
    Gaussian,
    PoissonSampling,
    PrivacyBudget,
    PrivacyUnit,
    Relation,
    UnsupportedEvent,
    calibrate,
    epsilon,
)
from dpfl_flower.accounting.cache import remembered
from dpfl_flower.accounting.statement import rounded_up
from dpfl_flower.cli.output import ExitCode, Format, FormatOption, Output

__all__ = ["MeanNoise", "neighbourhood", "plan"]

_FACTORS: Final = (0.5, 1.0, 2.0)


@dataclass(frozen=True)
class MeanNoise:
    """The noise on the mean of a round, in clip norms.

    Attributes
    ----------
    noise_multiplier
        Standard deviation of the noise on the sum.
    cohort, rounds
        Expected units in a round, and rounds.
    dimension
        Parameters of the model.
    """

    noise_multiplier: float
    cohort: float
    rounds: int
    dimension: int

    @property
    def per_coordinate(self) -> float:
        """Standard deviation in each coordinate."""
        return self.noise_multiplier / self.cohort

    @property
    def length(self) -> float:
        """Its length, to that of the longest possible mean."""
        return math.sqrt(self.dimension) * self.per_coordinate

    @property
    def length_over_run(self) -> float:
        """The same for sums over all rounds: noise adds up as ``sqrt(T)``, means at best as T."""
        return self.length / math.sqrt(self.rounds)

    def verdict(self) -> str:
        """Say in plain words what becomes of a model of that dimension."""
        enough = math.ceil(self.cohort * self.length)
        if self.length_over_run > 1:
            return (
                f"WARNING: the model will drown. Even if the updates of all {self.rounds} rounds "
                f"pointed the same way at full length, the noise would be "
                f"{self.length_over_run:.1f} times as long as what was learned. Take a smaller "
                f"model, a larger cohort (at this noise, {enough:,} units a round make noise and "
                "mean equally long) or a larger epsilon."
            )
        if self.length > 1:
            return (
                f"WARNING: in each round the noise is {self.length:.1f} times as long as the "
                "longest possible mean update. Only what most units agree on, round after round, "
                f"will be learned. At this noise, {enough:,} units a round make them equally long."
            )
        return (
            f"The noise of a round is {self.length:.2g} of the longest possible mean update. Real "
            "means are shorter where units disagree: expect the model to learn, not for certain."
        )


def neighbourhood(
    sampling: PoissonSampling, budget: PrivacyBudget, noise_multiplier: float, rounds: int
) -> list[tuple[int, int, float]]:
    """Return ``(cohort, rounds, epsilon)`` around a plan, at its noise multiplier and delta."""
    cohorts = [max(1, round(sampling.expected_cohort * factor)) for factor in _FACTORS]
    lengths = [max(1, round(rounds * factor)) for factor in _FACTORS]
    found = []
    for cohort in sorted({min(cohort, sampling.population) for cohort in cohorts}):
        release = PoissonSampling(cohort, sampling.population).event(Gaussian(noise_multiplier))
        for count in sorted(set(lengths)):
            spent = _epsilon(Composed(release, count), budget)
            found.append((cohort, count, spent))
    return found


def plan(
    population: Annotated[int, typer.Option(help="Units there are: N.")],
    cohort: Annotated[float, typer.Option(help="Units expected in a round, by secret coins: m.")],
    rounds: Annotated[int, typer.Option(help="Rounds: T.")],
    epsilon: Annotated[float, typer.Option(help="The budget of all rounds together.")],
    delta: Annotated[float, typer.Option(help="Below 1/N.")],
    dimension: Annotated[int | None, typer.Option(help="Parameters of the model: d.")] = None,
    clip: Annotated[float | None, typer.Option(help="Clip norm: C.")] = None,
    unit: Annotated[PrivacyUnit, typer.Option(help="Whom it protects.")] = PrivacyUnit.NODE,
    relation: Annotated[
        Relation, typer.Option(help="How neighbouring data sets differ.")
    ] = Relation.ADD_OR_REMOVE_ONE,
    format: FormatOption = Format.TEXT,  # noqa: A002 - the option's name
) -> None:
    """Print the noise that a budget asks for, what it does to the mean, and what moves epsilon.

    Exit codes: 0 there is a plan (read its warning), 2 an argument is wrong or no noise suffices.
    """
    output = Output(format)
    try:
        if dimension is not None:
            checks.positive_int(dimension=dimension)
        if clip is not None:
            checks.positive(clip=clip)
        budget = PrivacyBudget(epsilon=epsilon, delta=delta, unit=unit, relation=relation)
        checks.positive_int(**{"--population": population})
        checks.positive(**{"--cohort": cohort})
        if cohort > population:
            raise ValueError(f"--cohort={cohort:g} must be <= --population={population}")
        sampling = PoissonSampling(cohort, population)
        budget.check_population(population)
        with output.working("Solving for the noise, then pricing its neighbourhood"):
            multiplier = calibrate(budget, sampling, rounds)
            around = neighbourhood(sampling, budget, multiplier, rounds)
    except (ValueError, UnsupportedEvent) as error:
        raise output.fail(ExitCode.BAD_ARGUMENTS, str(error)) from None
    drowning = math.floor((cohort / multiplier) ** 2)
    data: dict[str, Any] = {
        "budget": {
            "epsilon": epsilon,
            "delta": delta,
            "unit": str(unit),
            "relation": str(relation),
        },
        "sampling": {"kind": "poisson", "expected-cohort": cohort, "population": population},
        "rounds": rounds,
        "noise-multiplier": multiplier,
        "noise-on-mean": {"per-coordinate-in-clip-norms": multiplier / cohort},
        "dimension-of-equal-length": drowning,
        "epsilon-around": [
            {"cohort": size, "rounds": count, "epsilon": spent} for size, count, spent in around
        ],
    }
    text = [
        f"Budget: {budget}, over {rounds} rounds.",
        f"Sampling: each of {population} units by its own secret coin, {cohort:g} expected; holds "
        "against those who see released models, not who was asked.",
        f"Noise multiplier: {multiplier:.4f} (standard deviation on the sum, in clip norms)",
        f"Noise on the mean, each coordinate: {multiplier / cohort:.3g} clip norms"
        + ("" if clip is None else f" = {multiplier * clip / cohort:.3g} at clip norm {clip:g}"),
    ]
    if clip is not None:
        data["noise-on-mean"]["per-coordinate"] = multiplier * clip / cohort
    if dimension is None:
        text.append(
            f"The noise is as long as the longest possible mean at {drowning:,} parameters: name "
            "your model's with --dimension."
        )
    else:
        noise = MeanNoise(multiplier, cohort, rounds, dimension)
        data["noise-on-mean"] |= {
            "length-to-clipped-mean": noise.length,
            "length-to-clipped-mean-over-run": noise.length_over_run,
        }
        data |= {"dimension": dimension, "verdict": noise.verdict()}
        text += [
            f"Its length to that of a clipped mean, at {dimension:,} parameters: "
            f"{noise.length:.3g} in a round, {noise.length_over_run:.3g} over the run",
            noise.verdict(),
        ]
    output.result(data, *text, "", _table(around, multiplier))


def _epsilon(event: Composed, budget: PrivacyBudget) -> float:
    key = ["epsilon", event, budget.delta, budget.relation]
    return remembered(key, lambda: epsilon([event], delta=budget.delta, relation=budget.relation))


def _table(around: list[tuple[int, int, float]], noise_multiplier: float) -> Table:
    counts = sorted({count for _, count, _ in around})
    title = f"Epsilon at noise multiplier {noise_multiplier:.4f}, by cohort and rounds"
    note = "noise: on each coordinate of the mean, in clip norms C"
    table = Table(title=title, title_justify="left", caption=note, caption_justify="left")
    table.add_column("cohort", justify="right")
    table.add_column("noise [C]", justify="right")
    for count in counts:
        table.add_column(f"{count} rounds", justify="right")
    for cohort in sorted({cohort for cohort, _, _ in around}):
        row = [rounded_up(spent) for size, _, spent in around if size == cohort]
        table.add_row(str(cohort), f"{noise_multiplier / cohort:.3g}", *row)
    return table
