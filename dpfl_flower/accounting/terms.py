"""What a ledger is about: its first line, and all that may never change.

>>> terms = LedgerTerms("heart", 1e-5, "node", "add-or-remove-one")
>>> LedgerTerms.from_header(terms.header(None)) == terms
True
>>> terms.check_budget(PrivacyBudget(epsilon=1.0, delta=1e-6))
Traceback (most recent call last):
    ...
ValueError: budget.delta=1e-06 must be the ledger's 1e-05
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from dpfl_flower.accounting.budget import PrivacyBudget
from dpfl_flower.accounting.errors import LedgerError, LedgerTampered
from dpfl_flower.accounting.units import PrivacyUnit, Relation
from dpfl_flower.checks import choice, probability

_FORMAT = "dpfl-ledger-1"
_FIELDS = ("dataset", "delta", "unit", "relation")


@dataclass(frozen=True)
class LedgerTerms:
    """The data set, the delta, the privacy unit and the relation of a ledger."""

    dataset: str
    delta: float
    unit: PrivacyUnit
    relation: Relation

    def __post_init__(self) -> None:
        probability(delta=self.delta)
        if not self.dataset or not isinstance(self.dataset, str):
            raise ValueError(f"dataset={self.dataset!r} must be a name")
        object.__setattr__(self, "delta", float(self.delta))
        object.__setattr__(self, "unit", choice(PrivacyUnit, unit=self.unit))
        object.__setattr__(self, "relation", choice(Relation, relation=self.relation))

    @classmethod
    def of(
        cls, dataset: str, delta: float, *, unit: PrivacyUnit | str, relation: Relation | str
    ) -> Self:
        """Return the terms that a user named; ValueError naming what is out of bounds."""
        return cls(
            dataset, delta, choice(PrivacyUnit, unit=unit), choice(Relation, relation=relation)
        )

    def header(self, budget: PrivacyBudget | None) -> dict[str, Any]:
        """Return the first line of a ledger with these terms."""
        return {
            "kind": "header",
            "format": _FORMAT,
            "dataset": self.dataset,
            "unit": self.unit.value,
            "relation": self.relation.value,
            "delta": self.delta,
            "budget": None if budget is None else budget.epsilon,
        }

    @classmethod
    def from_header(cls, header: Mapping[str, Any] | None) -> Self:
        """Return the terms in a ledger's first line; LedgerTampered if it is none."""
        if header is None or header.get("format") != _FORMAT:
            raise LedgerTampered(f"does not begin with a {_FORMAT} header")
        return cls(**{field: header[field] for field in _FIELDS})

    def check_budget(self, budget: PrivacyBudget) -> None:
        """Raise ValueError unless ``budget`` is for the same delta, unit and relation."""
        for field in ("delta", "unit", "relation"):
            theirs, ours = getattr(budget, field), getattr(self, field)
            if theirs != ours:
                raise ValueError(f"budget.{field}={theirs!r} must be the ledger's {ours!r}")

    def check_same(self, found: "LedgerTerms", name: str) -> None:
        """Raise LedgerError, naming both, unless the ledger ``name`` has these terms."""
        for field in _FIELDS:
            theirs, ours = getattr(found, field), getattr(self, field)
            if theirs != ours:
                begun, asked = (str(it) if isinstance(it, str) else it for it in (theirs, ours))
                raise LedgerError(
                    f"{name} was begun with {field}={begun!r}, and is to go on with {asked!r}: use "
                    "the same, or give other data a ledger of its own"
                )
