"""A node's ledger outlives what it must, and says so where it does not."""

import json

import pytest
from flwr.app import RecordDict

from dpfl_flower.accounting import Gaussian, Ledger, PrivacyBudget, PrivacyUnit, events_from_json
from dpfl_flower.client import NodeError, NodeErrorCode, NodeLedger
from dpfl_flower.client.node_ledger import claim
from tests.support.node import context

STEP = Gaussian(4.0)
BUDGET = PrivacyBudget(1.8, 1e-5, PrivacyUnit.EXAMPLE)  # pays for 3 steps and no 4th


def charge(node_ledger, count=1, *, budget=None, planned=100):
    with node_ledger.open(delta=1e-5, budget=budget) as ledger:
        ledger.plan(node_ledger.run, STEP, planned, max_charge=count)
        ledger.charge(node_ledger.run, count)
        return claim(ledger)


def test_a_file_accumulates_over_runs_and_restarts(tmp_path):
    path = tmp_path / "node" / "ledger.jsonl"
    claims = [charge(NodeLedger("heart", path=path, run=run)) for run in ("a", "a", "b")]
    assert events_from_json(str(claims[0]["events"])) == [STEP]
    assert claims[0]["epsilon"] < claims[1]["epsilon"] < claims[2]["epsilon"]
    with Ledger.open(path, dataset="heart", delta=1e-5, unit="example") as ledger:
        assert ledger.releases == 3
        assert claims[2]["epsilon"] == ledger.epsilon()
    assert claims[2]["durable"] is True
    assert "this run only" not in claims[2]["statement"]


def test_without_a_file_the_run_accumulates_and_says_this_run_only():
    node = context()
    claims = [charge(NodeLedger.from_context(node, dataset="heart"), 2) for _ in range(3)]
    assert claims[0]["epsilon"] < claims[1]["epsilon"] < claims[2]["epsilon"]
    assert all(c["durable"] is False for c in claims)
    assert all(str(c["statement"]).endswith("after 6 releases; this run only") for c in claims[2:])
    other = charge(NodeLedger.from_context(node, dataset="lungs"), 2)
    assert other["epsilon"] == claims[0]["epsilon"]
    fresh = charge(NodeLedger.from_context(context(), dataset="heart"), 2)
    assert fresh["epsilon"] == claims[0]["epsilon"]


def test_what_stays_in_the_state_of_a_run_is_plain_data():
    node = context()
    charge(NodeLedger.from_context(node, dataset="heart"), 2)
    (record,) = node.state.config_records.values()
    assert json.loads(record["plan"])["count"] == 100
    assert record["charged"] == 2


def test_the_claim_says_what_anyone_needs_to_price_it(tmp_path):
    record = charge(NodeLedger("heart", path=tmp_path / "l.jsonl"))
    assert set(record) == {
        "epsilon",
        "delta",
        "unit",
        "relation",
        "dataset",
        "durable",
        "cryptographic",
        "events",
        "statement",
    }
    assert (record["unit"], record["relation"]) == ("example", "add-or-remove-one")
    RecordDict({"privacy": record}).deflate()


@pytest.mark.parametrize("durable", [True, False])
def test_past_the_budget_nothing_is_charged(tmp_path, durable):
    path = tmp_path / "l.jsonl" if durable else None
    node = NodeLedger("heart", path=path)
    for _ in range(3):
        charge(node, budget=BUDGET)
    with pytest.raises(NodeError) as refused:
        charge(node, budget=BUDGET)
    assert refused.value.code is NodeErrorCode.BUDGET_EXHAUSTED
    with node.open(delta=1e-5) as ledger:
        assert ledger.releases == 3


def test_the_nodes_own_path_goes_before_the_apps(tmp_path):
    configured = context(ledger_path=str(tmp_path / "mine.jsonl"))
    node = NodeLedger.from_context(configured, dataset="heart", path=tmp_path / "apps.jsonl")
    charge(node)
    assert (tmp_path / "mine.jsonl").exists() and not (tmp_path / "apps.jsonl").exists()
    node = NodeLedger.from_context(context(), dataset="heart", path=tmp_path / "apps.jsonl")
    charge(node)
    assert (tmp_path / "apps.jsonl").exists()


def test_the_run_is_flowers(tmp_path):
    node = NodeLedger.from_context(context(run_id=77), dataset="heart")
    assert node.run == "flower-run-77"


def test_a_ledger_that_cannot_be_used_is_refused_with_a_fixed_code(tmp_path):
    path = tmp_path / "l.jsonl"
    node = NodeLedger("heart", path=path, wait_seconds=0.0)

    def code():
        with pytest.raises(NodeError) as refused:
            charge(node)
        return refused.value.code

    charge(node)
    with node.open(delta=1e-5):
        assert code() is NodeErrorCode.LEDGER_REFUSED  # locked
    path.write_bytes(path.read_bytes()[:-5])
    assert code() is NodeErrorCode.LEDGER_REFUSED  # truncated
    node = NodeLedger("heart", path=tmp_path)
    assert code() is NodeErrorCode.LEDGER_REFUSED  # a directory
    other = tmp_path / "other.jsonl"
    charge(NodeLedger("lungs", path=other))
    node = NodeLedger("heart", path=other)
    assert code() is NodeErrorCode.LEDGER_REFUSED  # another data set


def test_more_rounds_than_planned_are_refused(tmp_path):
    node = NodeLedger("heart", path=tmp_path / "l.jsonl")
    charge(node, planned=1)
    with pytest.raises(NodeError) as refused:
        charge(node, planned=1)
    assert refused.value.code is NodeErrorCode.LEDGER_REFUSED


@pytest.mark.parametrize(
    "arguments",
    [{"dataset": ""}, {"dataset": "x", "run": ""}, {"dataset": "x", "wait_seconds": -1}],
)
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match=r"dataset|run|wait_seconds"):
        NodeLedger(**arguments)


@pytest.mark.parametrize("path", [7, True, ""])
def test_a_configured_path_must_be_one(path):
    with pytest.raises(ValueError, match="ledger-path"):
        NodeLedger.from_context(context(ledger_path=path), dataset="x")


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize(
    "other",
    [
        {"delta": 1e-4},
        {"unit": PrivacyUnit.USER},
        {"relation": "replace-one"},
        {"budget": PrivacyBudget(1.9, 1e-5, PrivacyUnit.EXAMPLE)},
    ],
)
def test_a_run_that_has_begun_keeps_to_its_terms_and_its_budget(durable, other, tmp_path):
    node = NodeLedger("heart", path=tmp_path / "ledger.jsonl" if durable else None)
    charge(node, budget=BUDGET)
    with (
        pytest.raises(NodeError) as refused,
        node.open(**{"delta": 1e-5} | other) as ledger,
    ):
        ledger.plan(node.run, STEP, 100)
        ledger.charge(node.run)
    assert refused.value.code == NodeErrorCode.LEDGER_REFUSED
    charge(node, budget=PrivacyBudget(1.7, 1e-5, PrivacyUnit.EXAMPLE))
    with pytest.raises(NodeError) as refused:  # without one, that of the beginning holds
        charge(node), charge(node)
    assert refused.value.code == NodeErrorCode.BUDGET_EXHAUSTED
