"""Every field of every stage, wrong in every way: a clear error or a dropout, never a wrong sum.

10,000 cases: 5,500 of requests that a node gets, 4,500 of replies that a server gets.
"""

import functools
import random
import secrets

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given, settings
from hypothesis import strategies as st

from dpfl_flower import records
from dpfl_flower.accounting import EveryoneSampling
from dpfl_flower.client import secure_aggregation_mod
from dpfl_flower.clipping import FixedClipping
from dpfl_flower.secagg import Refused, RoundAbandoned, SecAggPlus, SecureSum
from dpfl_flower.secagg.messages import Stage
from dpfl_flower.secagg.secagg_plus import _Exchange
from dpfl_flower.secagg.server import Advertising
from dpfl_flower.secagg.wire import decode_request, encode
from dpfl_flower.simulation import InProcessGrid
from dpfl_strategies import DPFedAvg
from tests.support import secure_run
from tests.support.contracts.strategy import quiet
from tests.support.corrupted import change, changed
from tests.support.secagg import Cast, plain_sum, plan, vectors, with_rosters

NODES = (1, 2, 3, 4)
CASES = {
    Stage.ADVERTISE: (1000, 400),
    Stage.SHARE: (1500, 600),
    Stage.MASK: (1000, 700),
    Stage.ACKNOWLEDGE: (500, 400),
    Stage.UNMASK: (1500, 2400),
}
assert sum(map(sum, CASES.values())) == 10_000
PARTS = vectors(NODES, width=2)
BATCH = 20


def batches(cases):
    """Let hypothesis draw batches of changes: its own cost would be most of the work."""
    return lambda test: settings(database=None, deadline=None, max_examples=cases // BATCH)(
        given(st.integers(0, 2**64), st.booleans())(test)
    )


@functools.cache
def story(rosters):
    """Return, by stage, the server's stage and the nodes' states before it, of an honest round."""
    cast = Cast(PARTS, with_rosters(NODES) if rosters else {})
    stage, told = Advertising(plan(NODES, width=2, rosters=rosters, largest=1000)), {}
    while not isinstance(stage, SecureSum):
        number = next(iter(stage.requests.values())).stage
        before = dict(cast.states)
        # Node 4 drops out with its masked vector, so that there are shares of both kinds.
        replies = cast.answer_all(stage, but={4} if number is Stage.MASK else ())
        told[number] = (stage, before, replies)
        stage = stage.receive(replies)
    np.testing.assert_array_equal(stage.total, plain_sum(PARTS, stage.survivors))
    return cast.rules, told


@pytest.mark.parametrize("stage", Stage)
def test_a_node_refuses_or_answers_whatever_it_is_asked(stage):
    def ask(rosters, made):
        rules, told = story(rosters)
        server, states, _ = told[stage]
        try:
            request = decode_request(changed(encode(server.requests[1]), made))
        except ValueError:
            return  # which the mod answers with MALFORMED_REQUEST
        if request.stage is not stage:
            return  # which the journal refuses
        try:
            _, reply = Cast(PARTS, rules, dict(states)).answer(1, request)
        except Refused:
            return
        if stage is Stage.UNMASK:  # whatever it was asked: one kind of share of each peer, once
            named = [share.node_id for share in (*reply.seed_shares, *reply.key_shares)]
            assert len(named) == len(set(named)) == 3

    @batches(CASES[stage][0])
    def ask_many(seed, rosters):
        chance = random.Random(seed)
        for _ in range(BATCH):
            ask(rosters or stage is Stage.ACKNOWLEDGE, change(chance))

    ask_many()


@pytest.mark.parametrize("stage", Stage)
def test_a_server_ends_with_the_sum_of_its_survivors_or_gives_up(stage):
    def answer(rosters, made, liar):
        rules, told = story(rosters)
        server, states, replies = told[stage]
        if stage is not Stage.UNMASK:  # what the nodes know must fit what the server goes on with
            states = told[min(later for later in told if later > stage)][1]
        cast = Cast(PARTS, rules, dict(states))
        contents = {n: encode(reply) for n, reply in replies.items()}
        contents[liar] = changed(contents[liar], made)
        try:
            following = _Exchange(server).receive(contents)
            following = getattr(following, "inner", following)
            while not isinstance(following, SecureSum):
                answers = {}
                for n, request in following.requests.items():
                    try:
                        cast.states[n], answers[n] = cast.answer(n, request)
                    except (Refused, KeyError):
                        cast.states.pop(n, None)
                following = following.receive(answers)
        except RoundAbandoned:
            return
        if stage is Stage.MASK and made[1] == "array" and liar in following.survivors:
            return  # it had the type and size of a masked vector: that node's vector is another
        np.testing.assert_array_equal(following.total, plain_sum(PARTS, following.survivors))

    @batches(CASES[stage][1])
    def answer_many(seed, rosters):
        chance = random.Random(seed)
        for _ in range(BATCH):
            answer(rosters or stage is Stage.ACKNOWLEDGE, change(chance), chance.choice(NODES[:3]))

    with quiet():
        answer_many()


def test_replies_of_another_stage_and_of_strangers_are_no_replies():
    _, told = story(False)
    for stage, (server, _, replies) in told.items():
        for other, (_, _, wrong) in told.items():
            if other is not stage:
                with pytest.raises(RoundAbandoned):
                    server.receive(wrong)
        strangers = {n + 100: reply for n, reply in replies.items()}
        with pytest.raises(RoundAbandoned):
            server.receive(strangers)


def test_a_record_is_refused_by_the_name_of_its_field():
    _, told = story(False)
    content = encode(told[Stage.SHARE][0].requests[1])
    record = content.config_records[records.SECAGG]
    for name in list(record):
        left = ConfigRecord({key: value for key, value in record.items() if key != name})
        with pytest.raises(ValueError, match=name):
            decode_request(RecordDict({records.SECAGG: left}))
    with pytest.raises(ValueError, match="must be there"):
        decode_request(RecordDict())


@pytest.mark.parametrize("stage", [s for s in Stage if s is not Stage.ACKNOWLEDGE])
def test_no_reply_that_a_node_makes_up_ends_a_run(stage):
    """Through mod, Grid and strategy; the good nodes' rounds go on."""
    rounds, chance = 25, random.Random(secrets.randbits(64))
    made_up = []

    def lying(message, context, call_next):
        asked = message.content[records.SECAGG]["stage"]
        reply = call_next(message, context)
        if context.node_config["partition-id"] == 0 and asked == int(stage) and reply.has_content():
            made_up.append(change(chance))
            reply.content = changed(reply.content, made_up[-1])
        return reply

    app = ClientApp()
    app.train(mods=[lying, secure_aggregation_mod])(secure_run.train)
    strategy = DPFedAvg(
        noise_multiplier=0.5,
        relation="zero-out",
        sampling=EveryoneSampling(5),
        clipping=FixedClipping(0.5),
        secure_aggregation=SecAggPlus(threshold=0.51),
        give_up_after=None,
        wait_seconds=0.0,
    )
    with quiet(), InProcessGrid(app, num_supernodes=5) as grid:
        start = ArrayRecord({"w": Array(np.zeros(secure_run.WIDTH, np.float32))})
        result = strategy.start(grid, start, num_rounds=rounds)
    assert result.rounds == rounds == len(made_up), made_up
    assert 0 < result.privacy.releases <= rounds, made_up
    assert np.isfinite(result.arrays["w"].numpy()).all()
