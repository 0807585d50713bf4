"""Nodes that add their own noise, under masks: what leaves them, and what no reply can break."""

import random
import secrets

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from dpfl_flower import records
from dpfl_flower.accounting import Gaussian, events_to_json
from dpfl_flower.client import NODE_LOGGER, local_noise_mod, secure_aggregation_mod
from dpfl_flower.clipping import FixedClipping
from dpfl_flower.secagg import SecAggPlus
from dpfl_flower.secagg.messages import Stage
from dpfl_flower.simulation import InProcessGrid
from dpfl_strategies import LocalDPFedAvg, SampleLevelFedAvg
from tests.support.contracts import sentinel
from tests.support.contracts.leakage import PLACES, start_arrays
from tests.support.contracts.strategy import quiet
from tests.support.corrupted import change, changed, value
from tests.support.recording_grid import adding

NODES = 5
CLAIM = {
    "epsilon": 0.1,
    "delta": 1e-5,
    "unit": "example",
    "relation": "add-or-remove-one",
    "dataset": "heart",
    "durable": True,
    "events": events_to_json([Gaussian(9.0)]),
}
# Where a DP-SGD node has nothing private: its arrays are noised, its weight is a public constant.
UNNOISED = [
    place for place in PLACES if place not in {"update", "one entry", "beside a missing value"}
]


def sample_level(**settings):
    made = SampleLevelFedAvg(
        population=NODES,
        secure_aggregation=SecAggPlus(threshold=0.51),
        max_update_norm=10.0,
        wait_seconds=0.0,
        **settings,
    )
    return made, []


def local(**settings):
    made = LocalDPFedAvg(
        noise_multiplier=1.0,
        delta=1e-5,
        clipping=FixedClipping(0.5),
        num_nodes=NODES,
        secure_aggregation=SecAggPlus(threshold=0.51),
        wait_seconds=0.0,
        max_inflation=1.2,
        **settings,
    )
    return made, [local_noise_mod(dataset="x")]


STRATEGIES = {"sample-level": sample_level, "local": local}


class Watched(InProcessGrid):
    """Keeps all that goes to the nodes and comes from them."""

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.seen: list[Message] = []

    def push_messages(self, messages):
        sent = list(messages)
        self.seen += sent
        return super().push_messages(sent)

    def pull_messages(self, message_ids):
        found = list(super().pull_messages(message_ids))
        self.seen += found
        return found


def answering(first, *, claims):
    """Return a train function: the first node answers ``first(question)``, the others honestly."""

    def train(question, ctx):
        answered = (first if ctx.node_config["partition-id"] == 0 else adding(0.01))(question)
        if isinstance(answered, Error):
            return Message(answered, reply_to=question)
        if claims and records.PRIVACY not in answered:
            answered[records.PRIVACY] = ConfigRecord(CLAIM | {"patients": sentinel.COUNT})
        return Message(answered, reply_to=question)

    return train


@pytest.mark.parametrize(
    ("kind", "place"),
    [("sample-level", place) for place in UNNOISED]
    + [("local", place) for place in PLACES if place != "exception"],
)
def test_a_sentinel_is_in_nothing_that_leaves_a_node(kind, place, tmp_path, caplog, capfd):
    caplog.set_level(0)
    made, inside = STRATEGIES[kind](checkpoint_dir=tmp_path)
    app = ClientApp()
    app.train(mods=[secure_aggregation_mod, *inside])(
        answering(PLACES[place], claims=kind == "sample-level")
    )
    with Watched(app, num_supernodes=NODES) as grid:
        result = made.start(grid, start_arrays(), num_rounds=2)
    assert result.rounds == 2
    assert len(result.node_privacy.claims) >= NODES - 1
    sentinel.require_absent_from_messages(grid.seen, "a message")
    sentinel.require_absent_from_logs(caplog, but_for=(NODE_LOGGER,))
    sentinel.require_absent_from_directory(tmp_path)
    sentinel.require_absent_from_object(result, "the result")


def corrupted(content, chance):
    """Return a masked reply with something wrong in it, or in the claim beside it."""
    if chance.random() < 0.5:
        return changed(content, change(chance))
    content = RecordDict(dict(content))
    claim = dict(content[records.PRIVACY])
    name = chance.choice([*sorted(claim), "unknown"])
    if chance.random() < 0.2:
        claim.pop(name, None)
    else:
        claim[name] = value(chance)
    content[records.PRIVACY] = chance.choice(
        [ConfigRecord(claim)] * 8 + [MetricRecord({"epsilon": 1.0}), ArrayRecord({})]
    )
    return content


@pytest.mark.parametrize("kind", list(STRATEGIES))
def test_no_masked_reply_that_a_node_makes_up_ends_a_run(kind):
    """Through mod, Grid and strategy; the good nodes' rounds go on."""
    rounds, seed = 40, secrets.randbits(64)
    print(f"seed={seed} repeats these replies")
    chance, made_up = random.Random(seed), []

    def lying(received, ctx, call_next):
        stage = received.content[records.SECAGG]["stage"]
        reply = call_next(received, ctx)
        first = ctx.node_config["partition-id"] == 0
        if first and stage == int(Stage.MASK) and reply.has_content():
            reply.content = corrupted(reply.content, chance)
            made_up.append(reply)
        return reply

    made, inside = STRATEGIES[kind](give_up_after=None)
    app = ClientApp()
    app.train(mods=[lying, secure_aggregation_mod, *inside])(
        answering(adding(0.01), claims=kind == "sample-level")
    )
    start = ArrayRecord({"w": Array(np.zeros(20, np.float32))})
    with quiet(), InProcessGrid(app, num_supernodes=NODES) as grid:
        result = made.start(grid, start, num_rounds=rounds)
        assert str(result)
    assert result.rounds == rounds == len(made_up)
    assert {1001, 1002, 1003, 1004} <= set(result.node_privacy.claims)
    weights = result.arrays["w"].numpy()
    assert np.isfinite(weights).all() and np.any(weights)
