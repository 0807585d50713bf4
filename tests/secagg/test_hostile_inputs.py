"""Every field of every stage, wrong in every way: a clear error or a dropout, never a wrong sum.

10,000 cases: 5,500 of requests that a node gets, 4,500 of replies that a server gets.
"""

import functools
import random

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from dpfl_flower import records
from dpfl_flower.secagg import Refused, RoundAbandoned, SecureSum
from dpfl_flower.secagg.messages import Stage
from dpfl_flower.secagg.secagg_plus import _Exchange
from dpfl_flower.secagg.server import Advertising
from dpfl_flower.secagg.wire import decode_request, encode
from tests.support.contracts.strategy import quiet
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
INTEGERS = (-1, 0, 1, 2, 3, 4, 5, 2**31, 2**63, 2**64 - 1)
BLOBS = (b"", bytes(8), bytes(32), bytes(33), b"\xff" * 33, bytes(64), bytes(94))


def integer(chance):
    return chance.choice((*INTEGERS, chance.randint(-(2**63), 2**64 - 1)))


def blob(chance):
    return chance.choice((*BLOBS, chance.randbytes(chance.randint(0, 100))))


def value(chance):
    """Anything that a ConfigRecord can hold."""
    number = chance.choice((0.0, -1.5, float("nan"), float("inf")))
    some = range(chance.randint(0, 5))
    return chance.choice(
        (
            integer(chance),
            blob(chance),
            number,
            chance.random() < 0.5,
            chance.choice(("", "a", "3")),
            [integer(chance) for _ in some],
            [blob(chance) for _ in some],
            [number for _ in some],
        )
    )


def array(chance):
    """Anything that can stand in an ArrayRecord, readable or not."""
    if chance.random() < 0.6:
        shape = [chance.randint(0, 12) for _ in range(chance.randint(0, 3))]
        return Array(np.ones(shape, chance.choice(("u1", "i1", "i8", "f8", "U3", "?"))))
    start = chance.choice((b"", b"\x93NUMPY\x01\x00v\x00"))
    data = start + chance.randbytes(chance.randint(0, 80))
    stype = chance.choice(("numpy.ndarray", "pickle", ""))
    return Array(dtype="uint8", shape=(8,), stype=stype, data=data)


def change(chance):
    """A change to a message: which field, and what becomes of it."""
    how = chance.choice(
        (
            *("set",) * 5,
            *("flip",) * 4,
            *("shorten", "repeat", "reverse", "empty", "drop", "add", "array", "strip"),
        )
    )
    makers = {"set": value, "add": value, "array": array, "flip": lambda c: c.randint(0, 2000)}
    return chance.randint(0, 20), how, makers.get(how, lambda c: None)(chance)


def batches(cases):
    """Let hypothesis draw batches of changes: its own cost would be most of the work."""
    return lambda test: settings(database=None, deadline=None, max_examples=cases // BATCH)(
        given(st.integers(0, 2**64), st.booleans())(test)
    )


def changed(content, change):
    """Return a copy of a message's records with the change made to it."""
    which, how, value = change
    content = RecordDict(dict(content))
    record = content[records.SECAGG] = ConfigRecord(dict(content.config_records[records.SECAGG]))
    name = sorted(record)[which % len(record)]
    if how == "strip":
        del content[sorted(content)[which % len(content)]]
    elif how == "array":
        content[records.MASKED] = ArrayRecord({records.SUM: value})
    elif how == "add":
        record["unknown"] = value
    elif how == "drop":
        del record[name]
    elif how == "set":
        record[name] = value
    else:
        record[name] = edited(record[name], how, value)
    return content


def edited(field, how, value):
    if isinstance(field, list) and field:
        if how == "flip":
            i = value % len(field)
            return [*field[:i], edited(field[i], how, value), *field[i + 1 :]]
        return {
            "shorten": field[1:],
            "repeat": [*field, field[0]],
            "reverse": field[::-1],
            "empty": [],
        }[how]
    if isinstance(field, bytes):
        if not field:
            return b"\0"
        i = value % len(field) if how == "flip" else 0
        return {"shorten": field[1:], "repeat": field * 2, "reverse": field[::-1]}.get(
            how, field[:i] + bytes([field[i] ^ (1 + i % 255)]) + field[i + 1 :]
        )
    if isinstance(field, int) and not isinstance(field, bool):
        return field ^ 1
    return 7.5


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
