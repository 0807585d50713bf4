"""How much privacy a data set may spend.

>>> budget = PrivacyBudget(epsilon=8.0, delta=1e-5, unit="node")
>>> print(budget)
epsilon 8 at delta 1e-05 for each node (add-or-remove-one)
>>> budget.check_population(100_000)
Traceback (most recent call last):
    ...
ValueError: delta=1e-05 must be < 1/population = 1e-05 for a population of 100000
"""

import math
from dataclasses import dataclass

from dpfl_flower.accounting.units import PrivacyUnit, Relation
from dpfl_flower.checks import choice, positive, positive_int, probability


@dataclass(frozen=True)
class PrivacyBudget:
    """An (epsilon, delta) that all releases about one data set together stay within.

    Parameters
    ----------
    epsilon : float
        Finite and > 0.
    delta : float
        Strictly between 0 and 1, and to be below 1/population: see `check_population`. Always to be
        given: an epsilon without its delta says nothing.
    unit : PrivacyUnit
        Whom the budget protects; the enum or its value.
    relation : Relation
        How neighbouring data sets differ; the enum or its value.

    Raises
    ------
    ValueError
        If an argument is out of bounds or names no unit or relation.
    """

    epsilon: float
    delta: float = math.nan
    unit: PrivacyUnit = PrivacyUnit.NODE
    relation: Relation = Relation.ADD_OR_REMOVE_ONE

    def __post_init__(self) -> None:
        positive(epsilon=self.epsilon)
        if isinstance(self.delta, float) and math.isnan(self.delta):
            raise ValueError(
                f"delta={self.delta!r} must be given, strictly between 0 and 1: an epsilon without "
                "its delta says nothing"
            )
        probability(delta=self.delta)
        object.__setattr__(self, "epsilon", float(self.epsilon))
        object.__setattr__(self, "delta", float(self.delta))
        object.__setattr__(self, "unit", choice(PrivacyUnit, unit=self.unit))
        object.__setattr__(self, "relation", choice(Relation, relation=self.relation))

    def __str__(self) -> str:
        return (
            f"epsilon {self.epsilon:g} at delta {self.delta:g} "
            f"for each {self.unit} ({self.relation})"
        )

    def check_population(self, population: int) -> None:
        """Raise ValueError unless delta < 1/population.

        At delta = 1/population a mechanism may publish one unit at random and still keep to delta.
        """
        positive_int(population=population)
        if self.delta * population >= 1:
            raise ValueError(
                f"delta={self.delta!r} must be < 1/population = {1 / population:g} "
                f"for a population of {population}"
            )
