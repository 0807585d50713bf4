"""The ledger of one data set: what was released about it, written down before it was released.

Epsilon is computed from the ledger, never stored. Two models trained on the same data share one
ledger, and compose. A charge is checked against the budget, appended, fsynced, and confirmed in a
sidecar, in that order; only then may the noisy value leave.

>>> budget = PrivacyBudget(epsilon=2.0, delta=1e-5)
>>> from dpfl_flower.accounting.events import Gaussian
>>> with Ledger.in_memory(dataset="x", delta=1e-5, budget=budget) as ledger:
...     _ = ledger.plan("model", Gaussian(5.0), count=10)
...     for _ in range(3):
...         _ = ledger.charge("model")
...     print(ledger.spent())
epsilon 1.33 at delta 1e-05 for each node (add-or-remove-one) of data set "x" after 3 releases; \
this run only
"""

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Self

from dpfl_flower.accounting.accountant import require_supported
from dpfl_flower.accounting.budget import PrivacyBudget
from dpfl_flower.accounting.charges import Charges
from dpfl_flower.accounting.errors import BudgetExhausted, LedgerError, LedgerTampered
from dpfl_flower.accounting.events import Event
from dpfl_flower.accounting.ledger_file import TORN_MARK, Chain, Entry, LedgerFile, LedgerPosition
from dpfl_flower.accounting.plan import Plan
from dpfl_flower.accounting.statement import PrivacyStatement
from dpfl_flower.accounting.terms import LedgerTerms
from dpfl_flower.accounting.units import PrivacyUnit, Relation
from dpfl_flower.checks import non_negative, non_negative_int, positive_int

__all__ = ["NOISE_NOTE", "Ledger", "LedgerPosition", "Plan"]

NOISE_NOTE: Final = "noise"
"""The key of a charge's note that says how its noise falls short of cryptographic noise."""


class Ledger:
    """The append-only record of all releases about one data set.

    Use `Ledger.open` or `Ledger.in_memory`, as a context manager or with `close`.

    A plan that is chosen by looking at what an earlier run released is an adaptive choice that
    composing privacy loss distributions does not cover: fix noise and sampling beforehand.
    """

    def __init__(
        self, terms: LedgerTerms, *, file: LedgerFile | None, budget: PrivacyBudget | None
    ) -> None:
        if budget is not None:
            terms.check_budget(budget)
        self._terms = terms
        self._budget = budget
        self._file = file
        self._chain = Chain()
        self._lock = threading.RLock()
        self._closed = False
        self._charges = Charges(delta=terms.delta, relation=terms.relation)
        self._recorded_budget: float | None = None
        self._cryptographic = True

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        dataset: str,
        delta: float,
        unit: PrivacyUnit | str = PrivacyUnit.NODE,
        relation: Relation | str = Relation.ADD_OR_REMOVE_ONE,
        budget: PrivacyBudget | None = None,
        wait_seconds: float = 0.0,
        accept_missing_head: bool = False,
        raise_budget: bool = False,
    ) -> Self:
        """Create or verify the ledger at ``path`` and lock it.

        Parameters
        ----------
        path : path
            The ledger; its sidecar lies beside it as ``PATH.head``.
        dataset, delta, unit, relation
            What the ledger is about; fixed when it is created.
        budget : PrivacyBudget, optional
            What all releases together stay within. It is written down; a smaller one given later
            holds for that opening, and without one the budget written down holds.
        wait_seconds : float
            How long to wait for another holder of the ledger.
        accept_missing_head : bool
            Take a ledger with charges whose sidecar is missing to be complete.
        raise_budget : bool
            Write down a larger budget than before.

        Raises
        ------
        ValueError
            If an argument is out of bounds, or the budget is for something else.
        LedgerLocked
            If it is open elsewhere.
        LedgerTampered
            If it was edited, truncated or rolled back.
        LedgerError
            If it is about another data set, unit, relation or delta, or has a smaller budget.
        """
        terms = LedgerTerms.of(dataset, delta, unit=unit, relation=relation)
        if budget is not None:
            terms.check_budget(budget)
        non_negative(wait_seconds=wait_seconds)
        file = LedgerFile.lock(Path(path).resolve(), wait_seconds=wait_seconds)
        try:
            ledger = cls(terms, file=file, budget=budget)
            ledger._load(accept_missing_head=accept_missing_head)
            ledger._reconcile_budget(raise_budget=raise_budget)
        except BaseException:
            file.close()
            raise
        return ledger

    @classmethod
    def in_memory(
        cls,
        *,
        dataset: str,
        delta: float,
        unit: PrivacyUnit | str = PrivacyUnit.NODE,
        relation: Relation | str = Relation.ADD_OR_REMOVE_ONE,
        budget: PrivacyBudget | None = None,
    ) -> Self:
        """Return a ledger that forgets: it can only speak for "this run only"."""
        terms = LedgerTerms.of(dataset, delta, unit=unit, relation=relation)
        ledger = cls(terms, file=None, budget=budget)
        ledger._append(terms.header(budget))
        return ledger

    # What the ledger is about.

    @property
    def durable(self) -> bool:
        """Whether the ledger outlives the process."""
        return self._file is not None

    @property
    def dataset(self) -> str:
        """The name of the data set."""
        return self._terms.dataset

    @property
    def delta(self) -> float:
        """The delta that the budget and `spent` speak of."""
        return self._terms.delta

    @property
    def unit(self) -> PrivacyUnit:
        """Whom the ledger protects."""
        return self._terms.unit

    @property
    def relation(self) -> Relation:
        """How neighbouring data sets differ."""
        return self._terms.relation

    @property
    def budget(self) -> PrivacyBudget | None:
        """What all releases together stay within."""
        return self._budget

    @property
    def plans(self) -> Mapping[str, Plan]:
        """The plan of each run."""
        return dict(self._charges.plans)

    @property
    def position(self) -> LedgerPosition:
        """The ledger's length and head, for a checkpoint to remember."""
        return self._chain.position

    def require_extends(self, position: LedgerPosition) -> None:
        """Raise LedgerTampered unless the ledger has been at ``position``."""
        if not self._chain.extends(position):
            raise LedgerTampered(
                f"{self._name} is at {self.position} and has never been at {position}: "
                "an older copy was put back, or it belongs to another run"
            )

    # What is charged.

    def plan(
        self,
        run: str,
        event: Event,
        count: int,
        *,
        max_charge: int = 1,
        total_variation: float = 0.0,
    ) -> Plan:
        """Fix the event of a run before its first charge, and return the plan.

        Planning a run again returns its plan if nothing differs.

        Raises
        ------
        UnsupportedEvent
            If the event has no valid price under the ledger's relation, for its unit.
        LedgerError
            If the run has another plan.
        """
        plan = Plan(run, event, count, max_charge=max_charge, total_variation=total_variation)
        with self._lock:
            existing = self._charges.plans.get(run)
            if existing is None:
                require_supported(event, self.relation, unit=self.unit)
                self._append(plan.to_json())
            elif existing != plan:
                raise LedgerError(f"{self._name}: run {run!r} is planned as {existing}, not {plan}")
            return plan

    def charge(
        self, run: str, count: int = 1, note: Mapping[str, int | str] | None = None
    ) -> LedgerPosition:
        """Charge ``count`` releases of a run; after this returns, they may be released.

        A ``note`` under `NOISE_NOTE` says that their noise is not cryptographic, and why.

        Raises
        ------
        ValueError
            If the count exceeds the plan's ``max_charge``.
        BudgetExhausted
            If the budget does not allow it; nothing is written.
        LedgerError
            If the run has no plan, or has used it up; nothing is written.
        """
        positive_int(count=count)
        record = {"kind": "charge", "run": run, "count": int(count), "note": dict(note or {})}
        with self._lock:
            plan = self._planned(run)
            if count > plan.max_charge:
                raise ValueError(f"count={count} must be <= max_charge = {plan.max_charge}")
            charged = self._charges.charged(run)
            if charged + count > plan.count:
                raise LedgerError(
                    f"{self._name}: run {run!r} has charged {charged} of {plan.count} "
                    f"planned releases, {count} more are not planned"
                )
            if self.affordable(run, count) < count:
                raise BudgetExhausted(
                    f"{self._name}: {count} more releases of run {run!r} would exceed the budget "
                    f"({self._budget}); so far {self.spent()}"
                )
            self._append(record)
            return self.position

    def affordable(self, run: str, at_most: int) -> int:
        """Return how many more planned releases of a run the budget allows, up to ``at_most``."""
        non_negative_int(at_most=at_most)
        with self._lock:
            plan = self._planned(run)
            if self._budget is None:
                remaining = plan.count - self._charges.charged(run)
            else:
                remaining = self._charges.remaining(run, epsilon_budget=self._budget.epsilon)
            return min(at_most, remaining)

    # What it costs.

    def events(self) -> list[Event]:
        """Return everything that was charged, one event per run and torn line."""
        return self._charges.events()

    @property
    def total_variation(self) -> float:
        """The bound on the total variation distance of all charged noise from its events."""
        return self._charges.total_variation

    @property
    def cryptographic(self) -> bool:
        """Whether no charge's note says that its noise is not cryptographic."""
        return self._cryptographic

    @property
    def releases(self) -> int:
        """How many releases were charged, torn lines included."""
        return self._charges.releases

    def epsilon(self, delta: float | None = None) -> float:
        """Return the epsilon of everything charged, at the ledger's delta or another."""
        with self._lock:
            return self._charges.epsilon(self.delta if delta is None else delta)

    def quick_epsilon(self) -> float:
        """Return about :meth:`epsilon` and no less, for who only watches: within a thousandth."""
        with self._lock:
            return self._charges.quick_epsilon(self.delta)

    def spent(self) -> PrivacyStatement:
        """Return what was spent, with all that the number needs to mean something."""
        return PrivacyStatement(
            epsilon=self.epsilon(),
            delta=self.delta,
            unit=self.unit,
            relation=self.relation,
            dataset=self.dataset,
            releases=self.releases,
            durable=self.durable,
            cryptographic=self.cryptographic,
        )

    def close(self) -> None:
        """Release the ledger."""
        with self._lock:
            self._closed = True
            if self._file is not None:
                self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # How it is kept.

    @property
    def _name(self) -> str:
        return f"ledger {self._file.path}" if self._file else f"ledger of {self.dataset!r}"

    def _planned(self, run: str) -> Plan:
        plans = self._charges.plans
        if run not in plans:
            raise LedgerError(f"{self._name}: run {run!r} has no plan, only {list(plans)}")
        return plans[run]

    def _append(self, record: dict[str, Any]) -> None:
        """Write a line, fsync it, confirm it, and take it in."""
        if self._closed:
            raise LedgerError(f"{self._name} is closed")
        line = self._chain.line(record)
        if self._file is not None:
            self._file.append(line)
        self._take(self._chain.extend(line))
        if self._file is not None:
            self._file.confirm(self._chain.position)

    def _take(self, entry: Entry) -> None:
        """Update what is known by one verified line."""
        try:
            match entry.record:
                case None:
                    self._charges.add_torn()
                case {"kind": "header", "budget": budget} | {"kind": "budget", "epsilon": budget}:
                    self._recorded_budget = budget
                case {"kind": "plan"}:
                    self._charges.add_plan(Plan.from_json(entry.record))
                case {"kind": "charge", "run": run, "count": count}:
                    self._charges.add_charge(run, count)
                    self._cryptographic &= NOISE_NOTE not in entry.record.get("note", {})
                case _:
                    raise ValueError("unknown kind of line")
        except (KeyError, TypeError, ValueError) as error:
            raise LedgerTampered(f"has a line {entry.record!r} that is none: {error}") from error

    def _load(self, *, accept_missing_head: bool) -> None:
        """Verify the file, or begin it."""
        assert self._file is not None
        confirmed = self._file.confirmed()
        data = self._file.read()
        if confirmed is None and b"\n" not in data:
            # Nothing was ever confirmed: a new file, or one whose creation a crash cut short.
            if data:
                self._file.truncate()
            self._append(self._terms.header(self._budget))
            return
        try:
            chain = Chain.parse(data)
            if confirmed is not None and not chain.extends(confirmed):
                raise LedgerTampered(
                    f"has {len(data)} bytes and does not extend the {confirmed.length} that "
                    f"{self._file.sidecar} remembers: it was truncated, edited or rolled back"
                )
            found = LedgerTerms.from_header(chain.entries[0].record)
            self._terms.check_same(found, self._name)
            self._chain = chain
            for entry in chain.entries:
                self._take(entry)
        except LedgerTampered as error:
            raise LedgerTampered(f"{self._name} {error}") from None
        except (LookupError, TypeError, ValueError, ArithmeticError, RecursionError) as damaged:
            raise LedgerTampered(f"{self._name} is damaged: {type(damaged).__name__}") from damaged
        # The first line is confirmed before a second one is written.
        begun = len(chain.entries) > 1 or len(data) > chain.position.length
        if confirmed is None and begun and not accept_missing_head:
            raise self._file.without_head(self._name)
        if len(data) > chain.position.length:
            self._file.append(TORN_MARK)
            self._take(chain.extend(data[chain.position.length :] + TORN_MARK))
        if confirmed != chain.position:
            self._file.confirm(chain.position)

    def _reconcile_budget(self, *, raise_budget: bool) -> None:
        """Hold to the smaller of the budget written down and the one given, unless raised."""
        recorded = self._recorded_budget
        given = self._budget
        if given is None:
            if recorded is not None:
                self._budget = PrivacyBudget(recorded, self.delta, self.unit, self.relation)
            return
        if recorded is None or (given.epsilon > recorded and raise_budget):
            self._append({"kind": "budget", "epsilon": given.epsilon})
        elif given.epsilon > recorded:
            raise LedgerError(
                f"{self._name} has a budget of epsilon {recorded}, it was opened for "
                f"{given.epsilon}: raise it deliberately, once, with "
                "Ledger.open(path, ..., raise_budget=True)"
            )
