"""The masked sum is the plain integer sum whoever drops out when, or the round is abandoned."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpfl_flower.secagg import RoundAbandoned, SecureSum
from dpfl_flower.secagg.keys import PUBLIC_KEY_BYTES
from dpfl_flower.secagg.lanes import encoding_without_wrap
from dpfl_flower.secagg.messages import Stage, UnmaskRequest
from dpfl_flower.secagg.modulus import Modulus
from dpfl_flower.secagg.node_state import NodeRules, NodeState
from dpfl_flower.secagg.sealing import OVERHEAD_BYTES
from dpfl_flower.secagg.server import Advertising
from dpfl_flower.secagg.shamir import SHARE_BYTES
from dpfl_flower.secagg.wire import (
    decode_reply,
    decode_request,
    encode,
    from_bytes,
    from_config,
    to_bytes,
    to_config,
)
from tests.support.dropouts import EVERY_WAY, STAGES, survives
from tests.support.node import all_bytes
from tests.support.secagg import Cast, plain_sum, plan, vectors, with_rosters

SIX = (11, 22, 33, 44, 55, 2**63 + 66)


def test_nobody_drops_and_the_sum_is_exact():
    parts = vectors(SIX, width=1000, most=2**20)
    result = Cast(parts).run(plan(SIX, width=1000))
    assert result.survivors == SIX
    np.testing.assert_array_equal(result.total, plain_sum(parts, SIX))


def subsets(items):
    items = sorted(items)
    return itertools.chain.from_iterable(
        itertools.combinations(items, size) for size in range(len(items) + 1)
    )


@pytest.mark.parametrize(("bits", "lanes"), [(32, 1), (21, 3), (22, 8)])
def test_every_way_of_six_nodes_to_drop_out_at_every_stage(bits, lanes):
    parts = vectors(SIX, width=2)
    seen = {True: 0, False: 0}

    def explore(stage, states, answered):
        cast = Cast(parts, states=states)
        replies = cast.answer_all(stage)
        for there in subsets(replies):
            now = (*answered, frozenset(there))
            try:
                following = stage.receive({node: replies[node] for node in there})
            except RoundAbandoned:
                # Even if everybody had stayed from here on, it could not have been saved.
                assert not survives((*now, *[now[-1]] * (len(STAGES) - len(now))))
                seen[False] += 1
                continue
            if isinstance(following, SecureSum):
                assert survives(now)
                assert set(following.survivors) == now[2]
                np.testing.assert_array_equal(following.total, plain_sum(parts, now[2]))
                seen[True] += 1
            else:
                explore(following, {n: cast.states[n] for n in there}, now)

    explore(Advertising(plan(SIX, width=2, bits=bits, lanes=lanes)), {}, ())
    # Of the 5^6 ways to drop out, those that keep the threshold; counted independently.
    assert seen[True] == len(EVERY_WAY) == 465


@st.composite
def rounds(draw):
    count = draw(st.integers(3, 24))
    neighbours = draw(st.sampled_from([None, 4, 6, 10]))
    nodes = [1000 - 7 * i for i in range(count)]
    dropping = draw(
        st.dictionaries(st.sampled_from(nodes), st.sampled_from(Stage), max_size=count // 2)
    )
    return nodes, neighbours, dropping


@given(
    rounds(),
    st.sampled_from([(16, 1), (24, 1), (32, 1), (64, 1), (21, 3), (12, 5), (22, 8)]),
    st.booleans(),
    st.sampled_from([0.51, 2 / 3]),
    st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_any_graph_of_more_nodes_gives_the_exact_sum_or_is_abandoned(
    drawn, packing, rosters, threshold, seed
):
    nodes, neighbours, dropping = drawn
    bits, lanes = packing
    parts = vectors(nodes, width=4, most=2 ** (bits - 7), seed=seed)
    rules = with_rosters(nodes) if rosters else {}
    round_plan = plan(
        nodes,
        width=4,
        bits=bits,
        lanes=lanes,
        neighbours=neighbours,
        rosters=rosters,
        threshold=threshold,
    )
    try:
        result = Cast(parts, rules).run(round_plan, dropping=dropping)
    except RoundAbandoned:
        assert dropping
        return
    gone = {n for n, stage in dropping.items() if stage <= Stage.MASK}
    assert not gone.intersection(result.survivors)
    np.testing.assert_array_equal(result.total, plain_sum(parts, result.survivors))


def test_with_rosters_nodes_drop_between_signing_and_unmasking():
    parts = vectors(SIX)
    result = Cast(parts, with_rosters(SIX)).run(
        plan(SIX, rosters=True), dropping={11: Stage.ACKNOWLEDGE, 22: Stage.UNMASK}
    )
    assert result.survivors == SIX
    np.testing.assert_array_equal(result.total, plain_sum(parts, SIX))


def test_a_sum_that_leaves_the_modulus_wraps_and_says_so_by_its_sign():
    nodes = SIX[:3]
    parts = {n: np.array([100, -100, 5], np.int64) for n in nodes}
    result = Cast(parts).run(plan(nodes, bits=8))
    assert result.total.tolist() == [300 - 256, 256 - 300, 15]


def test_what_the_sum_reveals_is_who_is_in_it_and_nothing_else_travels():
    parts = vectors(SIX, width=5)
    lengths = []

    def watch(stage, replies):
        lengths.extend(reply.vector.size for reply in replies.values() if reply.stage is Stage.MASK)

    Cast(parts).run(plan(SIX, width=5, bits=24), watch=watch)
    assert lengths == [5 * 3] * 6


# Too few.


def test_fewer_nodes_than_the_minimum_are_never_summed():
    for dropping in ({}, {11: Stage.MASK}, {11: Stage.SHARE}):
        with pytest.raises(RoundAbandoned, match="min_cohort=6"):
            Cast(vectors(SIX[:5])).run(plan(SIX[:5], min_cohort=6), dropping=dropping)
    rules = {n: NodeRules(min_cohort=2) for n in SIX}
    assert Cast(vectors(SIX), rules).run(plan(SIX[:2], min_cohort=2)).survivors == SIX[:2]


def test_where_nobody_knows_the_protocol_the_mod_is_asked_for():
    asked = Advertising(plan(SIX))
    hint = r"0 of 6 nodes .* must: do the apps have mods=\[secure_aggregation_mod\]\?$"
    with pytest.raises(RoundAbandoned, match=hint):
        asked.receive({})
    some = Cast(vectors(SIX[:2])).answer_all(Advertising(plan(SIX[:2])))
    with pytest.raises(RoundAbandoned, match=r"^2 of 6 nodes .* must$"):
        asked.receive(some)


def test_colluders_raise_the_threshold_or_stop_the_round():
    assert plan(SIX).threshold_of(5) == 3
    assert plan(SIX, colluders=2).threshold_of(5) == 4
    assert plan(SIX, threshold=2 / 3).threshold_of(5) == 4
    for count in range(1, 60):
        for colluders in range(5):
            try:
                threshold = plan(SIX, colluders=colluders).threshold_of(count)
            except RoundAbandoned:
                assert count <= colluders
            else:
                assert 2 * threshold > count + colluders
                assert math.ceil(0.51 * count) <= threshold <= count


# One wrong share among more than enough costs nothing; wrong secrets never make a wrong sum.


def garbled(share):
    return type(share)(node_id=share.node_id, share=bytes(33))


def test_a_wrong_share_is_got_past_where_others_are_left():
    parts = vectors(SIX)
    cast = Cast(parts)

    def lie(stage, replies):
        if replies[11].stage is Stage.UNMASK:
            seeds = tuple(map(garbled, replies[11].seed_shares))
            replies[11] = type(replies[11])(seed_shares=seeds, key_shares=())

    result = cast.run(plan(SIX), watch=lie)
    np.testing.assert_array_equal(result.total, plain_sum(parts, SIX))


def test_wrong_shares_of_too_many_abandon_the_round():
    def lie(stage, replies):
        for node in (11, 22, 33):
            if node in replies and replies[node].stage is Stage.UNMASK:
                seeds = tuple(map(garbled, replies[node].seed_shares))
                keys = tuple(map(garbled, replies[node].key_shares))
                replies[node] = type(replies[node])(seed_shares=seeds, key_shares=keys)

    for dropping in ({}, {55: Stage.MASK}):
        with pytest.raises(RoundAbandoned, match=r"do not give|shares of a secret"):
            Cast(vectors(SIX)).run(plan(SIX), watch=lie, dropping=dropping)


def test_a_key_that_nobody_can_agree_on_costs_its_own_node_only():
    def lie(stage, replies):
        if 11 in replies and replies[11].stage is Stage.ADVERTISE:
            replies[11] = type(replies[11])(mask_key=bytes(32), seal_key=replies[11].seal_key)
            replies[33] = replies[22]  # of two nodes with one key only the first goes on

    parts = vectors(SIX)
    result = Cast(parts).run(plan(SIX), watch=lie)
    left = tuple(n for n in SIX if n not in (11, 33))
    assert result.survivors == left
    np.testing.assert_array_equal(result.total, plain_sum(parts, left))


# On the wire.


@pytest.mark.parametrize("wrong", [-1, 2**64, True, 1.0, "1", b"1"])
def test_what_is_no_id_of_64_bits_is_refused_alone_and_in_a_list(wrong):
    good = UnmaskRequest(server_round=1, survivors=(2, 3), dropped=(4,))
    with pytest.raises(ValueError, match="survivors"):
        from_config(UnmaskRequest, dict(to_config(good)) | {"survivors": [2, wrong]})
    with pytest.raises(ValueError, match="server_round"):
        from_config(UnmaskRequest, dict(to_config(good)) | {"server_round": wrong})


def test_every_message_and_state_survives_its_records():
    kinds = set()

    def watch(stage, replies):
        for request in stage.requests.values():
            assert decode_request(encode(request)) == request
        for reply in replies.values():
            kinds.add(type(reply).__name__)
            again = decode_reply(encode(reply))
            if reply.stage is Stage.MASK:
                np.testing.assert_array_equal(again.vector, reply.vector)
                assert again.tokens == reply.tokens
            else:
                assert again == reply
        for state in cast.states.values():
            assert from_config(type(state), dict(to_config(state))) == state
            assert from_bytes(type(state), to_bytes(state)) == state

    cast = Cast(vectors(SIX), with_rosters(SIX))
    cast.run(plan(SIX, rosters=True), watch=watch, dropping={11: Stage.MASK})
    assert kinds == {"Advertised", "SharedKeys", "Masked", "Acknowledged", "Unmasked"}


def test_secrets_are_forgotten_once_they_are_of_no_more_use():
    def watch(stage, replies):
        for state in cast.states.values():
            if next(iter(stage.requests.values())).stage >= Stage.MASK:
                assert state.seed == state.mask_private == state.seal_private == b""
                assert all(peer.mask_key == b"" for peer in state.peers)

    cast = Cast(vectors(SIX))
    cast.run(plan(SIX), watch=watch)


def test_what_a_survivor_adds_a_dropped_peer_is_subtracted():
    # The pairwise masks of two nodes cancel whichever of the two has the larger id.
    for gone in SIX:
        parts = vectors(SIX, width=4)
        result = Cast(parts).run(plan(SIX, width=4, bits=64), dropping={gone: Stage.MASK})
        np.testing.assert_array_equal(result.total, plain_sum(parts, set(SIX) - {gone}))
    assert Modulus(64).signed(Modulus(64).zeros(1)).tolist() == [0]


@pytest.mark.parametrize(
    "damaged", [b"", b"[]", b"{}", b'{"server_round": 1}', b"\xff", b"null", b'{"bits": "x"}']
)
def test_a_state_that_is_damaged_is_an_error(damaged):
    with pytest.raises(ValueError):
        from_bytes(NodeState, damaged)


@pytest.mark.parametrize(
    ("threshold", "neighbours", "expected"),
    [
        *(
            (2 / 3, 6, 4),
            (2 / 3, 5, 4),
            (0.51, 6, 4),
            (1.0, 6, 6),
            (1, 6, 6),
            (4, 6, 4),
            (np.int64(4), 5, 4),
        ),
        # A majority is needed in any case, and a threshold that nobody has ends a round.
        *((4, 10, 6), (2, 3, 2), (4, 3, None)),
    ],
)
def test_a_threshold_is_a_share_of_the_neighbours_or_a_number_of_them(
    threshold, neighbours, expected
):
    made = plan((1, 2, 3), threshold=threshold)
    if expected is None:
        with pytest.raises(RoundAbandoned, match="threshold=4"):
            made.threshold_of(neighbours)
    else:
        assert made.threshold_of(neighbours) == expected


@pytest.mark.parametrize(("count", "neighbours"), [(20, None), (40, 20)])
def test_a_node_sends_its_masked_vector_keys_and_shares_and_hardly_a_byte_more(count, neighbours):
    nodes, width, most = range(1, count + 1), 50_000, 1 << 14
    encoding = encoding_without_wrap(most, count, width)
    sent = []

    def watch(_, replies):
        sent.append(len(all_bytes(encode(replies[1]))))

    parts = dict.fromkeys(nodes, np.full(width, most // count, np.int64))
    asked = plan(
        nodes,
        width=width,
        bits=encoding.bits,
        lanes=encoding.lanes,
        threshold=2 / 3,
        neighbours=neighbours,
    )
    Cast(parts).run(asked, watch=watch)
    peers = neighbours or count - 1
    entries = 3 * width  # 20 and 21 bits an entry in whole bytes
    keys_and_shares = 2 * PUBLIC_KEY_BYTES + peers * (2 * SHARE_BYTES + OVERHEAD_BYTES) + 32
    unmasking = peers * SHARE_BYTES
    assert sum(sent) <= 1.05 * (entries + keys_and_shares + unmasking)
    assert max(sent) <= 1.01 * entries


def test_a_node_that_names_anothers_identity_drops_out_itself():
    rules = with_rosters(SIX)
    parts = vectors(SIX)
    cast = Cast(parts, rules)
    stage = Advertising(plan(SIX, rosters=True, threshold=2 / 3))
    replies = cast.answer_all(stage)
    victim, impostor = SIX[4], SIX[0]
    for signature in (bytes(64), replies[victim].signature, b"short", bytes(5_000_000)):
        stolen = dataclasses.replace(
            replies[impostor], identity=rules[victim].identity.public, signature=signature
        )
        assert set(stage.receive(replies | {impostor: stolen}).keys) == set(SIX) - {impostor}
    endless = dataclasses.replace(replies[impostor], identity=bytes(5_000_000))
    following = stage.receive(replies | {impostor: endless})
    while not isinstance(following, SecureSum):
        following = following.receive(cast.answer_all(following))
    assert following.survivors == SIX[1:]
    np.testing.assert_array_equal(following.total, plain_sum(parts, SIX[1:]))
