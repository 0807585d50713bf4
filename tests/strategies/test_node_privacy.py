import dataclasses
import json
import logging
import math

import pytest
from flwr.app import ConfigRecord

from dpfl_flower.accounting import (
    Composed,
    DistributedSkellam,
    Gaussian,
    Laplace,
    PoissonSampled,
    Relation,
    accountant,
    epsilon,
)
from dpfl_strategies.node_privacy import NodeClaim, NodePrivacyReport, read_claim


def claim_record(**changes):
    fields = {
        "dataset": "cleveland",
        "epsilon": 1.0,
        "delta": 1e-4,
        "unit": "example",
        "relation": "add-or-remove-one",
        "durable": True,
        "events": json.dumps([Gaussian(20.0).to_json()]),
    } | changes
    return ConfigRecord({name: value for name, value in fields.items() if value is not None})


def test_a_claim_is_never_believed_below_what_its_events_cost():
    events = [PoissonSampled(0.1, Gaussian(1.0))] * 3
    text = json.dumps([event.to_json() for event in events])
    honest = epsilon(events, delta=1e-4, relation=Relation.ADD_OR_REMOVE_ONE)
    assert NodeClaim.from_record(claim_record(epsilon=0.1, events=text)).epsilon == honest
    assert NodeClaim.from_record(claim_record(epsilon=9.0, events=text)).epsilon == 9.0


def test_the_report_names_the_worst_node_and_the_composition_of_all():
    loud = json.dumps([Gaussian(2.0).to_json()])
    claims = {
        1: NodeClaim.from_record(claim_record(epsilon=0.0)),
        2: NodeClaim.from_record(claim_record(epsilon=0.0, events=loud, dataset="zurich")),
    }
    report = NodePrivacyReport(claims)
    everywhere = epsilon(
        [Gaussian(20.0), Gaussian(2.0)], delta=1e-4, relation=Relation.ADD_OR_REMOVE_ONE
    )
    assert report.worst.dataset == "zurich"
    assert report.epsilon_everywhere() == pytest.approx(everywhere)
    assert report.epsilon_everywhere() > report.worst.epsilon
    assert "all 2 nodes" in str(report)
    assert "this run only" not in str(report)


def test_what_events_do_not_explain_composes_by_adding_epsilons_and_deltas():
    opaque = NodeClaim.from_record(claim_record(events="[]"))
    report = NodePrivacyReport({1: opaque, 2: opaque})
    assert (report.epsilon_everywhere(), report.delta) == (2.0, 2e-4)
    assert "epsilon 2 at delta 0.0002 for someone in all 2 nodes" in str(report)
    told = NodeClaim.from_record(claim_record(epsilon=0.0))
    both = NodePrivacyReport({1: opaque, 2: told})
    assert both.epsilon_everywhere() == pytest.approx(1.0 + told.epsilon)
    assert both.delta == 2e-4


@pytest.mark.parametrize("worst_delta", [1e-6, 1e-3])
def test_the_first_figure_is_said_at_the_largest_delta_of_all_claims(worst_delta):
    # An epsilon at delta 1e-6 holds at 1e-3 too; one at 1e-3 does not hold at 1e-6, so that the
    # smaller delta, be it the worst node's or another's, would say too much.
    quiet_delta = 1e-3 if worst_delta == 1e-6 else 1e-6
    worst = NodeClaim.from_record(claim_record(events="[]", epsilon=4.0, delta=worst_delta))
    quiet = NodeClaim.from_record(claim_record(events="[]", epsilon=1.0, delta=quiet_delta))
    for claims in ({1: worst, 2: quiet}, {1: quiet, 2: worst}):
        report = NodePrivacyReport(claims)
        assert report.worst is worst
        assert str(report).startswith("at most epsilon 4 at delta 0.001 for each example ")


def test_a_claim_without_a_file_composes_with_what_came_before_a_restart():
    first = NodeClaim.from_record(claim_record(events="[]", epsilon=3.0, durable=False))
    second = NodeClaim.from_record(claim_record(events="[]", epsilon=2.0, durable=False))
    after = second.after(first)
    assert (after.epsilon, after.delta) == (5.0, 2e-4)
    assert second.after(None) == second
    told = NodeClaim.from_record(claim_record(epsilon=0.0, durable=False))
    twice = epsilon([Gaussian(20.0)] * 2, delta=1e-4, relation=Relation.ADD_OR_REMOVE_ONE)
    assert told.after(told).epsilon == pytest.approx(twice)
    assert told.after(told).delta == 1e-4


@pytest.mark.parametrize("number", ["1" + "0" * 400, "1e999", "[" * 10_000])
def test_a_number_that_no_float_holds_makes_a_claim_malformed(number):
    events = '[{"kind": "gaussian", "noise_multiplier": ' + number + "}]"
    assert read_claim(1, claim_record(events=events)) is None


HOSTILE = {
    "many sampled releases": [Composed(PoissonSampled(1e-3, Gaussian(1.0)), 10**7)],
    "many kinds": [PoissonSampled(0.01 + i / 1000, Gaussian(1 + i / 100)) for i in range(12)],
    "more kinds": [PoissonSampled(0.01 + i / 1e4, Gaussian(1 + i / 100)) for i in range(300)],
    "kinds without a curve": [
        PoissonSampled(0.01 + i / 1e4, Laplace(1 + i / 100)) for i in range(300)
    ],
    "counts beyond any run": [Composed(PoissonSampled(0.5, Gaussian(1.0)), 10**300)],
}


@pytest.mark.parametrize("kind", list(HOSTILE))
def test_a_hostile_claim_is_priced_without_privacy_losses_and_never_below_the_truth(
    kind, monkeypatch
):
    """What takes long is to compose privacy losses: 10^7 releases took 25 seconds."""
    events = HOSTILE[kind]

    def refuse(*_):
        raise AssertionError("privacy losses were composed")

    with monkeypatch.context() as patch:
        patch.setattr(accountant.pld, "compose", refuse)
        text = json.dumps([event.to_json() for event in events])
        found = NodeClaim.from_record(claim_record(epsilon=0.0, events=text)).epsilon
    assert math.isfinite(found)
    # A part of it, priced exactly, costs less.
    part = [Composed(events[0].event, 1000)] if len(events) == 1 else events[:3]
    exact = epsilon(part, delta=1e-4, relation=Relation.ADD_OR_REMOVE_ONE)
    assert found > exact
    if kind == "many kinds":
        whole = epsilon(events, delta=1e-4, relation=Relation.ADD_OR_REMOVE_ONE)
        assert whole < found < 3 * whole


def test_a_claim_of_more_events_than_any_node_has_kinds_of_is_no_claim(caplog):
    text = json.dumps([Gaussian(1.0).to_json()] * 50_000)
    assert read_claim(1, claim_record(events=text)) is None
    assert "counts as a dropout" in caplog.text


def test_claims_under_different_relations_do_not_compose():
    report = NodePrivacyReport(
        {
            1: NodeClaim.from_record(claim_record()),
            2: NodeClaim.from_record(claim_record(relation="replace-one", durable=False)),
        }
    )
    assert report.epsilon_everywhere() == math.inf
    assert "this run only" in str(report)


def test_without_claims_there_is_nothing_to_report():
    empty = NodePrivacyReport()
    assert empty.worst is None
    assert empty.epsilon_everywhere() == 0.0
    assert "no node" in str(empty)


@pytest.mark.parametrize(
    "changes",
    [
        {"delta": None},
        {"delta": 0.0},
        {"delta": "x"},
        {"epsilon": math.nan},
        {"epsilon": -1.0},
        {"relation": "neighbours"},
        {"unit": "planet"},
        {"events": "{"},
        {"events": "[1]"},
        {"events": json.dumps([{"kind": "sentinel"}])},
    ],
)
def test_a_claim_that_cannot_be_read_is_no_claim(changes, caplog):
    caplog.set_level(logging.DEBUG)
    assert read_claim(1, claim_record(**changes)) is None
    assert read_claim(1, None) is None
    assert "counts as a dropout" in caplog.text
    assert "sentinel" not in caplog.text


SHARED = DistributedSkellam(
    squared_scale=10_000, shares=3, l2_sensitivity=10, l1_sensitivity=30, dimension=16
)


def shared_claim(*events, **changes):
    text = json.dumps([event.to_json() for event in events])
    return NodeClaim.from_record(claim_record(epsilon=0.0, events=text, **changes))


def test_someone_in_every_node_moves_a_shared_sum_so_many_times_as_far():
    # One sum with distributed noise is in all four ledgers: it moves by four contributions, which
    # costs more than four sums of their own would.
    report = NodePrivacyReport({n: shared_claim(Composed(SHARED, 5)) for n in range(4)})
    moved = dataclasses.replace(SHARED, l2_sensitivity=40, l1_sensitivity=120)
    relation = Relation.ADD_OR_REMOVE_ONE
    expected = epsilon([Composed(moved, 5)], delta=1e-4, relation=relation)
    assert report.epsilon_everywhere() == pytest.approx(expected)
    apart = epsilon([Composed(SHARED, 20)], delta=1e-4, relation=relation)
    assert report.epsilon_everywhere() > 1.5 * apart


def test_sums_that_only_some_nodes_were_in_count_for_those():
    other = dataclasses.replace(SHARED, shares=2)
    report = NodePrivacyReport(
        {
            1: shared_claim(Composed(SHARED, 5), Gaussian(30.0)),
            2: shared_claim(Composed(SHARED, 3)),
            3: shared_claim(other),
        }
    )
    twice = dataclasses.replace(SHARED, l2_sensitivity=20, l1_sensitivity=60)
    expected = epsilon(
        [Composed(twice, 5), other, Gaussian(30.0)],
        delta=1e-4,
        relation=Relation.ADD_OR_REMOVE_ONE,
    )
    # Claims of nothing are believed no less than their events cost.
    assert report.epsilon_everywhere() == pytest.approx(expected, rel=1e-6)
