"""A claim about privacy that carries everything it needs to mean something.

>>> unit, relation = PrivacyUnit.NODE, Relation.ADD_OR_REMOVE_ONE
>>> print(PrivacyStatement(1.9234, 1e-5, unit, relation, "x", 30, durable=True))
epsilon 1.93 at delta 1e-05 for each node (add-or-remove-one) of data set "x" after 30 releases
"""

import math
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context, Decimal

from dpfl_flower.accounting.units import PrivacyUnit, Relation

_THREE_DIGITS_UP = Context(prec=3, rounding=ROUND_CEILING)


@dataclass(frozen=True)
class PrivacyStatement:
    """What was spent, on whose data, for whom, under which relation, by how many releases.

    ``cryptographic`` is False where some noise came from a generator that is not: then epsilon
    holds only against whoever does not see through that generator, and the sentence says so.
    """

    epsilon: float
    delta: float
    unit: PrivacyUnit
    relation: Relation
    dataset: str
    releases: int
    durable: bool
    cryptographic: bool = True

    def __str__(self) -> str:
        noun = "release" if self.releases == 1 else "releases"
        sentence = (
            f"epsilon {rounded_up(self.epsilon)} at delta {self.delta:g} for each {self.unit} "
            f'({self.relation}) of data set "{self.dataset}" after {self.releases} {noun}'
        )
        scope = "" if self.durable else "; this run only"
        return f"{sentence}{scope}{noise_caveat(cryptographic=self.cryptographic)}"


def noise_caveat(*, cryptographic: bool) -> str:
    """Return what is to be said after an epsilon about its noise.

    >>> noise_caveat(cryptographic=False)
    '; noise not cryptographic'
    """
    return "" if cryptographic else "; noise not cryptographic"


def rounded_up(epsilon: float) -> str:
    """Return ``epsilon`` to three digits, never less than it is.

    >>> rounded_up(4.7601), rounded_up(0.0), rounded_up(1234.5), rounded_up(float("inf"))
    ('4.77', '0', '1240', 'infinite')
    """
    if math.isinf(epsilon):
        return "infinite"
    return f"{float(_THREE_DIGITS_UP.create_decimal(Decimal(epsilon))):g}"
