"""Where a node writes down what it has released, before it answers.

A file outlives rounds, runs and restarts. Without one the ledger lives in Flower's state of the
run, which forgets: everything that is said about it says "this run only".

>>> from dpfl_flower.accounting import Gaussian
>>> ledger = NodeLedger("heart")
>>> with ledger.open(delta=1e-5) as opened:
...     _ = opened.plan(ledger.run, Gaussian(4.0), 30, max_charge=3)
...     _ = opened.charge(ledger.run, 3)
>>> with ledger.open(delta=1e-5) as opened:
...     print(opened.spent())
epsilon 1.7 at delta 1e-05 for each example (add-or-remove-one) of data set "heart" after \
3 releases; this run only
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

from flwr.app import ConfigRecord, Context, RecordDict

from dpfl_flower import checks, records
from dpfl_flower.accounting import (
    BudgetExhausted,
    Ledger,
    LedgerError,
    Plan,
    PrivacyBudget,
    PrivacyUnit,
    Relation,
    events_to_json,
)
from dpfl_flower.accounting.ledger import NOISE_NOTE
from dpfl_flower.accounting.terms import LedgerTerms
from dpfl_flower.client.errors import NodeError, NodeErrorCode
from dpfl_flower.client.policy import NodePolicy
from dpfl_flower.wire import config_record

_WAIT_SECONDS: Final = 60.0


@dataclass(frozen=True)
class NodeLedger:
    """The ledger of one data set on this node, opened for each charge and closed again.

    Parameters
    ----------
    dataset : str
        The name of the data set: apps that train on the same records name the same one, and share
        its ledger.
    path : path, optional
        The ledger's file. None: the ledger is part of ``state``.
    run : str
        Names the run whose plan is charged.
    wait_seconds : float
        How long to wait for another process that has the file.
    chosen_by_node : bool
        Whether whoever runs the node chose ``path``. Only such a ledger holds a node's own policy:
        one that the app or the server names starts from zero wherever they name another.
    policy : NodePolicy, optional
        What whoever runs the node agrees to: DP-SGD asks it before each charge.
    state : RecordDict
        Where a ledger without a file stays between two messages of a run.
    """

    dataset: str
    path: str | os.PathLike[str] | None = field(default=None, kw_only=True)
    run: str = field(default="local", kw_only=True)
    wait_seconds: float = field(default=_WAIT_SECONDS, kw_only=True)
    chosen_by_node: bool = field(default=False, kw_only=True)
    policy: NodePolicy | None = field(default=None, kw_only=True)
    state: RecordDict = field(default_factory=RecordDict, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        checks.non_negative(wait_seconds=self.wait_seconds)
        for name in ("dataset", "run"):
            if not getattr(self, name) or not isinstance(getattr(self, name), str):
                raise ValueError(f"{name}={getattr(self, name)!r} must be a name")

    @classmethod
    def from_context(
        cls,
        context: Context,
        *,
        dataset: str,
        path: str | os.PathLike[str] | None = None,
        wait_seconds: float = _WAIT_SECONDS,
    ) -> Self:
        """Return the ledger at the node config's ``ledger-path``, else at ``path``, and its policy.

        Whoever runs the node chooses: its ``ledger-path`` goes before ``path``, which is the app's,
        and its policy holds for all that is charged here, whatever the app asks for; see
        `NodePolicy.from_node_config`, errors too.
        """
        configured = context.node_config.get(records.LEDGER_PATH)
        if configured is not None and not (configured and isinstance(configured, str)):
            raise ValueError(f"node config {records.LEDGER_PATH}={configured!r} must be a path")
        return cls(
            dataset,
            path=path if configured is None else str(configured),
            run=f"flower-run-{context.run_id}",
            wait_seconds=wait_seconds,
            chosen_by_node=configured is not None,
            policy=NodePolicy.from_node_config(context.node_config),
            state=context.state,
        )

    @contextlib.contextmanager
    def open(
        self,
        *,
        delta: float,
        unit: PrivacyUnit = PrivacyUnit.EXAMPLE,
        relation: Relation = Relation.ADD_OR_REMOVE_ONE,
        budget: PrivacyBudget | None = None,
    ) -> Iterator[Ledger]:
        """Open the ledger, and close it after the block with every charge in place.

        Raises
        ------
        NodeError
            BUDGET_EXHAUSTED where a charge in the block exceeds the budget, LEDGER_REFUSED where
            the ledger is locked, tampered with, about something else or cannot be written.
        """
        try:
            if self.path is None:
                terms = LedgerTerms.of(self.dataset, delta, unit=unit, relation=relation)
                recorded = self._recorded_budget(terms, budget)
                with Ledger.in_memory(
                    dataset=self.dataset,
                    delta=delta,
                    unit=unit,
                    relation=relation,
                    budget=recorded if budget is None else budget,
                ) as ledger:
                    self._recall(ledger)
                    yield ledger
                    self._remember(ledger, terms.header(recorded or budget))
            else:
                with Ledger.open(
                    Path(self.path),
                    dataset=self.dataset,
                    delta=delta,
                    unit=unit,
                    relation=relation,
                    budget=budget,
                    wait_seconds=self.wait_seconds,
                ) as ledger:
                    yield ledger
        except BudgetExhausted as error:
            raise NodeError(NodeErrorCode.BUDGET_EXHAUSTED, str(error)) from error
        except (LedgerError, OSError) as error:
            raise NodeError(NodeErrorCode.LEDGER_REFUSED, str(error)) from error

    @property
    def _key(self) -> str:
        return f"dpfl-flower.ledger.{self.dataset}"

    def _recall(self, ledger: Ledger) -> None:
        record = config_record(self.state, self._key)
        if record is None:
            return
        plan = Plan.from_json(json.loads(str(record["plan"])))
        ledger.plan(
            plan.run,
            plan.event,
            plan.count,
            max_charge=plan.max_charge,
            total_variation=plan.total_variation,
        )
        charged = int(str(record["charged"]))
        note = {} if record.get("cryptographic", True) else {NOISE_NOTE: "not cryptographic"}
        while charged:
            part = min(charged, plan.max_charge)
            ledger.charge(plan.run, part, note)
            charged -= part

    def _recorded_budget(
        self, terms: LedgerTerms, given: PrivacyBudget | None
    ) -> PrivacyBudget | None:
        """Return the budget that the run began with; LedgerError for a larger one, or other terms.

        As a file's header holds: else whoever names them could name others in every round.
        """
        record = config_record(self.state, self._key)
        if record is None:
            return None
        header = json.loads(str(record["header"]))
        name = f"ledger of {self.dataset!r}"
        terms.check_same(LedgerTerms.from_header(header), name)
        if header["budget"] is None:
            return None
        budget = PrivacyBudget(header["budget"], terms.delta, terms.unit, terms.relation)
        if given is not None and given.epsilon > budget.epsilon:
            raise LedgerError(
                f"{name} has a budget of epsilon {budget.epsilon}, it was opened for "
                f"{given.epsilon}"
            )
        return budget

    def _remember(self, ledger: Ledger, header: Mapping[str, object]) -> None:
        if plan := ledger.plans.get(self.run):
            self.state[self._key] = ConfigRecord(
                {
                    "header": json.dumps(header),
                    "plan": json.dumps(plan.to_json()),
                    "charged": ledger.releases,
                    "cryptographic": ledger.cryptographic,
                }
            )


def claim(ledger: Ledger) -> ConfigRecord:
    """Return what a node says in public about all that its data set has spent.

    ``epsilon``, ``delta``, ``unit``, ``relation``, ``dataset``; ``durable``, False where the claim
    covers this run only; ``cryptographic``, False where some of the noise was not; ``events``, from
    which anyone can compute epsilon anew; ``statement``, all of it in one sentence.
    """
    spent = ledger.spent()
    return ConfigRecord(
        {
            "epsilon": spent.epsilon,
            "delta": spent.delta,
            "unit": spent.unit.value,
            "relation": spent.relation.value,
            "dataset": spent.dataset,
            "durable": spent.durable,
            "cryptographic": spent.cryptographic,
            "events": events_to_json(ledger.events()),
            "statement": str(spent),
        }
    )
