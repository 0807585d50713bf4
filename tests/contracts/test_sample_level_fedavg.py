"""Nodes that noise for themselves: what the strategy in front of them must still not give away."""

import functools

import numpy as np
import pytest
from flwr.app import ConfigRecord

from dpfl_flower.accounting import Composed, Gaussian, PoissonSampled, epsilon, events_to_json
from dpfl_strategies import SampleLevelFedAvg
from tests.support.contracts import sentinel
from tests.support.contracts.leakage import PLACES
from tests.support.contracts.sentinel import NUMBER, WORD
from tests.support.contracts.strategy import flat, quiet
from tests.support.recording_grid import adding, record
from tests.support.scripted_grid import ScriptedGrid

NODES = 3
# Where a DP-SGD node has nothing private: its arrays are noised, its weight is a public constant.
UNNOISED = [
    place for place in PLACES if place not in {"update", "one entry", "beside a missing value"}
]


def event(releases):
    return Composed(PoissonSampled(0.1, Gaussian(1.0)), releases)


@functools.cache  # nodes answer by the dozen
def spent(releases):
    return epsilon([event(releases)], delta=1e-5, relation="add-or-remove-one")


def claim(releases=10, **changes):
    fields = {
        "epsilon": spent(releases),
        "delta": 1e-5,
        "unit": "example",
        "relation": "add-or-remove-one",
        "dataset": "heart",
        "durable": True,
        "events": events_to_json([event(releases)]),
    }
    return ConfigRecord(fields | changes)


def claiming(message, **changes):
    content = adding(0.01)(message)
    content["privacy"] = claim(**changes)
    return content


def strategy(**settings):
    return SampleLevelFedAvg(population=NODES, wait_seconds=0.0, **settings)


@pytest.mark.parametrize("place", UNNOISED)
def test_a_sentinel_is_found_nowhere(place, tmp_path, caplog, capfd):
    caplog.set_level(0)

    def client(message):
        first = message.metadata.dst_node_id == 100
        return PLACES[place](message) if first else claiming(message)

    grid = ScriptedGrid(client, NODES)
    start = record(np.zeros((2, 3), np.float32), np.zeros(2), np.array(3))
    result = strategy(checkpoint_dir=tmp_path).start(grid, start, num_rounds=2)
    sentinel.require_absent_from_messages(grid.pushed, "a message")
    sentinel.require_absent_from_logs(caplog)
    sentinel.require_absent("".join(capfd.readouterr()), "what was printed")
    sentinel.require_absent_from_directory(tmp_path)
    sentinel.require_absent_from_object(result, "the result")


GAUSSIAN = '"event":{"kind":"gaussian","noise_multiplier":1.0}'
HOSTILE_CLAIMS = {
    "not json": {"events": WORD},
    "a number": {"events": "1"},
    "deep": {"events": "[" * 100_000},
    "huge count": {"events": f'[{{"kind":"composed","count":{10**30},"event":{{}}}}]'},
    "unknown event": {"events": '[{"kind":"free"}]'},
    "negative epsilon": {"epsilon": -1.0},
    "nan epsilon": {"epsilon": float("nan")},
    "delta of 1": {"delta": 1.0},
    "delta is a list": {"delta": [1e-5]},
    "relation": {"relation": WORD},
    "unit": {"unit": WORD},
    "bytes": {"events": b"\xff\xfe"},
    "infinite number": {"events": '[{"kind":"gaussian","noise_multiplier":1e999}]'},
    "negative noise": {"events": '[{"kind":"gaussian","noise_multiplier":-1}]'},
}


@pytest.mark.parametrize("kind", list(HOSTILE_CLAIMS))
def test_a_claim_that_cannot_be_read_costs_its_node_the_round_and_nobody_else(kind, caplog):
    caplog.set_level(0)

    def client(message):
        first = message.metadata.dst_node_id == 100
        return claiming(message, **(HOSTILE_CLAIMS[kind] if first else {}))

    result = strategy().start(ScriptedGrid(client, NODES), record(np.zeros(3)), num_rounds=1)
    assert set(result.node_privacy.claims) == {101, 102}
    np.testing.assert_allclose(flat(result.arrays), 0.01)
    sentinel.require_absent_from_logs(caplog)


HOSTILE_EVENTS = {
    "more releases than a float holds": f'[{{"kind":"composed","count":{10**400},{GAUSSIAN}}}]',
    "next to no noise": '[{"kind":"gaussian","noise_multiplier":1e-300}]',
    "next to no noise, often": f'[{{"kind":"composed","count":{10**18},{GAUSSIAN}}}]'.replace(
        ":1.0", ":1e-300"
    ),
    "a rate of next to nothing": (
        f'[{{"kind":"poisson-sampled","rate":1e-300,{GAUSSIAN}}}]'.replace(":1.0", ":1e-3")
    ),
}


@pytest.mark.parametrize("kind", list(HOSTILE_EVENTS))
def test_a_claim_that_cannot_be_priced_does_not_end_the_run(kind):
    def client(message):
        first = message.metadata.dst_node_id == 100
        return claiming(message, **({"events": HOSTILE_EVENTS[kind]} if first else {}))

    with quiet():
        result = strategy().start(ScriptedGrid(client, NODES), record(np.zeros(3)), num_rounds=1)
    assert {101, 102} <= set(result.node_privacy.claims)
    assert result.node_privacy.worst.epsilon >= claim()["epsilon"]
    assert str(result)


@pytest.mark.parametrize("value", [np.nan, np.inf, NUMBER])
def test_a_model_that_is_not_finite_does_not_spoil_the_average(value):
    def client(message):
        content = claiming(message)
        if message.metadata.dst_node_id == 100 and value != NUMBER:
            content["arrays"] = record(np.full(3, value))
        return content

    with quiet():
        result = strategy().start(ScriptedGrid(client, NODES), record(np.zeros(3)), num_rounds=1)
    assert np.isfinite(flat(result.arrays)).all()


def test_a_claim_is_at_least_what_its_events_cost():
    def client(message):
        return claiming(message, epsilon=0.001)

    with quiet():
        result = strategy().start(ScriptedGrid(client, NODES), record(np.zeros(3)), num_rounds=1)
    assert result.node_privacy.worst.epsilon >= spent(10) * (1 - 1e-9)


def test_what_a_node_has_spent_is_still_reported_after_the_server_was_restarted(tmp_path):
    def spends_and_leaves(message):
        leaves = message.metadata.dst_node_id == 100
        if leaves and message.content["config"]["server-round"] > 1:
            return None
        return claiming(message, releases=500 if leaves else 10)

    for rounds in (1, 2):
        with quiet():
            result = strategy(checkpoint_dir=tmp_path).start(
                ScriptedGrid(spends_and_leaves, NODES), record(np.zeros(3)), num_rounds=rounds
            )
    assert result.node_privacy.worst.epsilon >= spent(500) * (1 - 1e-9)
