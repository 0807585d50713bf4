"""What a node refuses, with which reason: each wrong request beside the right one."""

import dataclasses

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

from dpfl_flower.secagg import Identity, Refusal, Refused, Roster, RoundAbandoned, SecureSum, node
from dpfl_flower.secagg.messages import (
    AcknowledgeRequest,
    AdvertiseRequest,
    SignedSurvivors,
    Stage,
    Token,
    UnmaskRequest,
)
from dpfl_flower.secagg.node_checks import check_cohort
from dpfl_flower.secagg.node_state import NodeRules, Party
from dpfl_flower.secagg.server import Advertising
from dpfl_flower.secagg.session import node_bytes
from tests.support.secagg import Cast, plan, vectors, with_rosters

NODES = (1, 2, 3, 4, 5)


def at(stage_wanted, *, rosters=False, rules=None, dropping=(), **changes):
    """Return a cast of nodes, and the request that node 1 is about to get at a stage."""
    known = rules or (with_rosters(NODES) if rosters else {})
    cast = Cast(vectors(NODES), known)
    stage = Advertising(plan(NODES, rosters=rosters, **changes))
    while not isinstance(stage, SecureSum):
        request = stage.requests[1]
        if request.stage is stage_wanted:
            return cast, request
        gone = dropping if request.stage is Stage.MASK else ()
        stage = stage.receive(cast.answer_all(stage, but=gone))
    raise AssertionError("no such stage")


def refusal(cast, request, **changes):
    """Return why node 1 refuses the request with some fields changed; the right one passes."""
    cast.answer(1, request)
    with pytest.raises(Refused) as refused:
        cast.answer(1, dataclasses.replace(request, **changes))
    return refused.value.reason


@pytest.mark.parametrize(
    "changes",
    [
        {"server_round": 0},
        {"width": 0},
        {"bits": 0},
        {"bits": 65},
        {"seconds": 0.0},
        {"seconds": 1e9},
    ],
)
def test_a_round_out_of_range(changes):
    request = AdvertiseRequest(server_round=1, width=1, bits=1, seconds=1.0)
    party = Party(run_id=1, node_id=1)
    node.advertise(request, party, NodeRules(), now=0.0)
    with pytest.raises(Refused, match="malformed"):
        node.advertise(dataclasses.replace(request, **changes), party, NodeRules(), now=0.0)


def test_fewer_peers_than_its_own_minimum():
    rules = {1: NodeRules(min_cohort=5)}
    cast, request = at(Stage.SHARE, rules=rules)
    assert refusal(cast, request, peers=request.peers[:3]) is Refusal.TOO_FEW_NODES


def test_the_refusal_names_the_key_of_the_node_config():
    with pytest.raises(Refused, match=r"3 nodes .* this node's own secagg-min-cohort=5 must"):
        check_cohort(NodeRules(min_cohort=5), members=(2, 3))


def test_fewer_sharers_or_survivors_than_its_own_minimum():
    rules = {1: NodeRules(min_cohort=5)}
    cast, request = at(Stage.MASK, rules=rules)
    assert refusal(cast, request, sealed=request.sealed[:3]) is Refusal.TOO_FEW_NODES
    cast, request = at(Stage.UNMASK, rules=rules)
    assert refusal(cast, request, survivors=(2, 3, 4), dropped=(5,)) is Refusal.TOO_FEW_NODES


def test_fewer_sharers_or_survivors_than_the_threshold():
    cast, request = at(Stage.MASK)
    assert refusal(cast, request, sealed=request.sealed[:2]) is Refusal.TOO_FEW_NODES
    cast, request = at(Stage.UNMASK)
    assert refusal(cast, request, survivors=(2, 3), dropped=(4, 5)) is Refusal.TOO_FEW_NODES


@pytest.mark.parametrize("threshold", [0, 1, 2])
def test_a_threshold_at_or_below_half_of_the_neighbours(threshold):
    cast, request = at(Stage.SHARE)
    assert len(request.peers) == 4
    assert refusal(cast, request, threshold=threshold) is Refusal.THRESHOLD_TOO_LOW
    assert refusal(cast, request, threshold=5) is Refusal.MALFORMED


def test_a_threshold_that_its_colluders_undo():
    # 2 t > k + c, at k = 4: t = 3 is enough for one colluder, and not for two.
    cast, request = at(Stage.SHARE, rules={1: NodeRules(colluders=1)})
    assert request.threshold == 3
    cast.answer(1, request)
    cast.rules = {1: NodeRules(colluders=2)}
    with pytest.raises(Refused, match="threshold-too-low"):
        cast.answer(1, request)
    cast.answer(1, dataclasses.replace(request, threshold=4))


def test_a_peer_with_two_keys_or_with_anothers():
    cast, request = at(Stage.SHARE)
    two, three = request.peers[:2]
    own = cast.states[1]
    mine = node.KeyPair(own.mask_private).public
    for wrong in (
        dataclasses.replace(three, node_id=2),  # node 2 twice, with two keys
        dataclasses.replace(three, mask_key=two.mask_key),
        dataclasses.replace(three, seal_key=two.mask_key),
        dataclasses.replace(three, seal_key=three.mask_key),
        dataclasses.replace(three, mask_key=mine),
        dataclasses.replace(three, node_id=1),
    ):
        peers = (two, wrong, *request.peers[2:])
        assert refusal(cast, request, peers=peers) is Refusal.PEER_KEY_CHANGED


def test_a_peers_key_that_is_none():
    cast, request = at(Stage.SHARE)
    wrong = dataclasses.replace(request.peers[0], seal_key=bytes(32))
    assert refusal(cast, request, peers=(wrong, *request.peers[1:])) is Refusal.MALFORMED


def test_a_node_named_as_survivor_and_dropped():
    cast, request = at(Stage.UNMASK)
    reason = refusal(cast, request, survivors=(2, 3, 4, 5), dropped=(5,))
    assert reason is Refusal.SURVIVOR_AND_DROPPED


@pytest.mark.parametrize(
    "changes",
    [
        {"survivors": (2, 3, 4)},  # node 5 is neither
        {"survivors": (2, 3, 4, 4)},
        {"survivors": (2, 3, 4, 5, 6)},
        {"survivors": (1, 2, 3, 4, 5)},
        {"survivors": (2, 3, 4, 5), "dropped": (6,)},
    ],
)
def test_survivors_that_are_not_the_peers_that_shared(changes):
    cast, request = at(Stage.UNMASK)
    assert refusal(cast, request, **changes) is Refusal.MALFORMED


def test_a_sender_that_is_no_peer_or_comes_twice():
    cast, request = at(Stage.MASK)
    first = request.sealed[0]
    for wrong in (first, dataclasses.replace(first, node_id=9)):
        assert refusal(cast, request, sealed=(*request.sealed, wrong)) is Refusal.MALFORMED


def test_shares_sealed_for_another_node_or_round_are_not_taken():
    cast, request = at(Stage.MASK)
    other, other_request = at(Stage.MASK)
    state = node.accept_shares(cast.states[1], request, NodeRules())
    assert [item.node_id for item in state.held] == [2, 3, 4, 5]
    stolen = dataclasses.replace(request, sealed=other_request.sealed)
    assert node.accept_shares(cast.states[1], stolen, NodeRules()).held == ()
    swapped = dataclasses.replace(request.sealed[0], sealed=request.sealed[1].sealed)
    mixed = dataclasses.replace(request, sealed=(swapped, *request.sealed[1:]))
    held = node.accept_shares(cast.states[1], mixed, NodeRules()).held
    assert [item.node_id for item in held] == [3, 4, 5]
    del other


def test_a_node_hands_out_one_kind_of_share_for_each_peer():
    cast, request = at(Stage.UNMASK, dropping=(5,))
    assert (request.survivors, request.dropped) == ((2, 3, 4), (5,))
    _, reply = cast.answer(1, request)
    assert [share.node_id for share in reply.seed_shares] == [2, 3, 4]
    assert [share.node_id for share in reply.key_shares] == [5]


# With a roster.


def test_peers_that_are_not_on_the_roster_do_not_count():
    rules = with_rosters(NODES, strangers=(4, 5), min_cohort=3)
    cast, request = at(Stage.SHARE, rules=rules, threshold=1.0)
    state, _ = cast.answer(1, request)
    assert state.members == (2, 3)
    cast.rules = {**rules, 1: dataclasses.replace(rules[1], min_cohort=4)}
    with pytest.raises(Refused, match="too-few-nodes: 3 nodes"):
        cast.answer(1, request)


def test_a_peer_that_is_not_on_the_roster_counts_as_a_colluder():
    rules = with_rosters(NODES, strangers=(4,))
    cast, request = at(Stage.SHARE, rules=rules)
    assert request.threshold == 3
    cast.answer(1, request)  # 6 > 4 + 1
    rules = with_rosters(NODES, strangers=(4, 5))
    cast, request = at(Stage.SHARE, rules=rules)
    with pytest.raises(Refused, match=r"threshold-too-low.* \+ 2 not on the roster"):
        cast.answer(1, request)


def test_keys_that_the_server_put_in_a_members_place():
    cast, request = at(Stage.SHARE, rosters=True)
    two, three = request.peers[:2]
    made_up = node.KeyPair(bytes(31) + b"\2").public
    for wrong in (
        dataclasses.replace(two, mask_key=made_up),
        dataclasses.replace(two, seal_key=made_up),
        dataclasses.replace(two, identity=three.identity, signature=b""),
        dataclasses.replace(two, node_id=77),
        dataclasses.replace(two, signature=bytes(64)),
    ):
        peers = tuple(sorted((wrong, *request.peers[1:]), key=lambda peer: peer.node_id))
        if wrong.identity == three.identity:
            assert refusal(cast, request, peers=peers) is Refusal.PEER_KEY_CHANGED
        else:
            state, _ = cast.answer(1, dataclasses.replace(request, peers=peers))
            assert state.members == (3, 4, 5)


def test_unmasking_needs_confirmations_of_being_a_survivor():
    cast, request = at(Stage.UNMASK, rosters=True)
    acknowledgements = request.acknowledgements
    assert len(acknowledgements) == 4
    first, second = acknowledgements[:2]
    signature = bytes(64)
    for wrong in (
        acknowledgements[:2],  # threshold 3
        (first, first, first, second),
        (first, second, *(dataclasses.replace(a, signature=signature) for a in acknowledgements)),
        tuple(dataclasses.replace(a, survivors=a.survivors[8:]) for a in acknowledgements),
        tuple(dataclasses.replace(a, node_id=9) for a in acknowledgements),
        (),
    ):
        assert refusal(cast, request, acknowledgements=wrong) is Refusal.UNCONFIRMED
    cast.answer(1, dataclasses.replace(request, acknowledgements=acknowledgements[1:]))


def test_a_confirmation_by_a_node_that_is_not_on_the_roster_does_not_count():
    everyone = with_rosters(NODES)
    known = Roster(everyone[5].roster.members - {everyone[5].identity.public})
    rules = {n: dataclasses.replace(everyone[n], roster=known) for n in NODES[:4]}
    cast, request = at(Stage.UNMASK, rules={**rules, 5: everyone[5]}, rosters=True)
    assert cast.states[1].members == (2, 3, 4)
    two, three, four, five = request.acknowledgements
    assert refusal(cast, request, acknowledgements=(two, three, five)) is Refusal.UNCONFIRMED
    cast.answer(1, dataclasses.replace(request, acknowledgements=(two, three, four)))


def test_survivors_other_than_those_that_were_signed():
    cast, request = at(Stage.UNMASK, rosters=True)
    reason = refusal(cast, request, survivors=(2, 3, 4), dropped=(5,))
    assert reason is Refusal.SURVIVOR_AND_DROPPED


def test_unmasking_without_signing_first_where_there_is_a_roster():
    cast, request = at(Stage.ACKNOWLEDGE, rosters=True)
    unmasking, unmask = at(Stage.UNMASK, rosters=False)
    del unmasking
    with pytest.raises(Refused, match="unconfirmed"):
        cast.answer(1, unmask)
    with pytest.raises(Refused, match="no identity"):
        node.acknowledge(cast.states[1], request, NodeRules())


def test_a_survivor_has_to_prove_that_its_mask_with_this_node_is_in_its_vector():
    """The server tells node 2 that node 1 never shared: node 2's vector lacks their mask.

    Without the proof node 1 would hand out its share of node 2's seed, though its own vector need
    not be in the sum for node 2's to come out.
    """
    cast = Cast(vectors(NODES), with_rosters(NODES))
    stage = Advertising(plan(NODES, rosters=True))
    while (request := stage.requests[2]).stage is not Stage.MASK:
        stage = stage.receive(cast.answer_all(stage))
    replies = {}
    for n in NODES:
        asked = stage.requests[n]
        if n == 2:
            kept = tuple(item for item in request.sealed if item.node_id != 1)
            asked = dataclasses.replace(request, sealed=kept)
        cast.states[n], replies[n] = cast.answer(n, asked)
    assert {item.node_id for item in replies[2].tokens} == {3, 4, 5}
    shown = {n: {item.node_id: item.token for item in replies[n].tokens} for n in NODES}
    honest = AcknowledgeRequest(
        server_round=1, survivors=tuple(Token(node_id=n, token=shown[n][1]) for n in (3, 4, 5))
    )
    cast.answer(1, honest)
    for made_up in (b"", bytes(32), shown[2][3], shown[1][2]):
        lie = (*honest.survivors, Token(node_id=2, token=made_up))
        assert refusal(cast, honest, survivors=lie) is Refusal.UNCONFIRMED


def test_a_confirmation_of_another_round_does_not_count():
    rules = with_rosters(NODES)
    cast, request = at(Stage.UNMASK, rules=rules, rosters=True)
    other, old = at(Stage.UNMASK, rules=rules, rosters=True, server_round=2)
    del other
    reason = refusal(cast, request, acknowledgements=old.acknowledgements)
    assert reason is Refusal.UNCONFIRMED


def test_a_server_that_makes_up_peers_without_end_holds_no_node_up(monkeypatch):
    cast, request = at(Stage.SHARE)
    monkeypatch.setattr(node, "_MOST_PEERS", 4)
    cast.answer(1, request)
    monkeypatch.setattr(node, "_MOST_PEERS", 3)
    with pytest.raises(Refused, match="4 neighbours must be <= 3"):
        cast.answer(1, request)


def test_a_roster_that_comes_in_the_middle_of_a_round_makes_no_proof_of_nothing():
    cast, unmask = at(Stage.UNMASK)
    rules, state = with_rosters(NODES)[1], cast.states[1]
    nothing = tuple(Token(node_id=n, token=b"") for n in (2, 3, 4, 5))
    with pytest.raises(Refused, match="unconfirmed"):
        node.acknowledge(state, AcknowledgeRequest(server_round=1, survivors=nothing), rules)
    signed = dataclasses.replace(state, survivors=(2, 3, 4, 5))
    made_up = SignedSurvivors(2, node_bytes(1), bytes(64))
    with pytest.raises(Refused, match="unconfirmed"):
        node.unmask(signed, dataclasses.replace(unmask, acknowledgements=(made_up,)), rules)


def lies(graph, victim, threshold):
    """Tell each node which of its peers to call dropped, so that all neighbours of one fall.

    Nobody is told more than it accepts; a maximum flow finds out who is told what.
    """
    nodes, fallen = sorted(graph), graph[victim]
    source, sink = len(nodes), len(nodes) + 1
    # Holders come before the fallen they lie about: a fallen node is a holder too, so it has its
    # own second place behind the sink.
    places = {n: sink + 1 + i for i, n in enumerate(fallen)}
    capacity = np.zeros((sink + 1 + len(fallen),) * 2, np.int32)
    for holder in nodes:
        capacity[source, holder] = len(graph[holder]) - threshold
        for peer in graph[holder]:
            if peer in places:
                capacity[holder, places[peer]] = 1
    for place in places.values():
        capacity[place, sink] = threshold
    flow = maximum_flow(csr_array(capacity), source, sink)
    assert flow.flow_value == threshold * len(fallen)  # the lie can be told
    told = flow.flow.toarray()
    return {n: {p for p, place in places.items() if told[n, place] > 0} for n in nodes}


@pytest.mark.parametrize("rosters", [False, True])
def test_a_server_that_isolates_one_node_on_a_sparse_graph_needs_nodes_without_rosters(rosters):
    """It asks all neighbours of a node for its seed, and others for all these neighbours' keys.

    Every threshold holds, and no two nodes contradict themselves; only together they do.
    """
    nodes, victim = tuple(range(30)), 0
    cast = Cast(vectors(nodes), with_rosters(nodes) if rosters else {})
    stage = Advertising(plan(nodes, neighbours=12, rosters=rosters))
    while next(iter(stage.requests.values())).stage < Stage.ACKNOWLEDGE:
        stage = stage.receive(cast.answer_all(stage))
    masked = stage.masked
    fallen = lies(masked.peers, victim, masked.threshold)
    told = {n: tuple(p for p in masked.peers[n] if p not in fallen[n]) for n in nodes}
    signed = {}
    if rosters:
        for n in nodes:
            asked = stage.requests[n]
            left = tuple(item for item in asked.survivors if item.node_id in told[n])
            request = dataclasses.replace(asked, survivors=left)
            cast.states[n], reply = cast.answer(n, request)
            signed[n] = SignedSurvivors(
                node_id=n,
                survivors=b"".join(map(node_bytes, told[n])),
                signature=reply.signature,
            )
    seeds, keys = 0, dict.fromkeys(masked.peers[victim], 0)
    for n in nodes:
        request = UnmaskRequest(
            server_round=1,
            survivors=told[n],
            dropped=tuple(fallen[n]),
            acknowledgements=tuple(signed[p] for p in masked.peers[n] if p in signed),
        )
        try:
            _, reply = cast.answer(n, request)
        except Refused as refused:
            assert rosters
            assert refused.reason is Refusal.UNCONFIRMED
            continue
        seeds += victim in {share.node_id for share in reply.seed_shares}
        for share in reply.key_shares:
            keys[share.node_id] += 1
    isolated = seeds >= masked.threshold and min(keys.values()) >= masked.threshold
    assert isolated is not rosters


# Rules of its own.


def test_rules_that_make_no_sense():
    identity = Identity(Ed25519PrivateKey.generate())
    other = Identity(Ed25519PrivateKey.generate())
    roster = Roster(frozenset({other.public}))
    for wrong, match in (
        ({"min_cohort": 1}, "min_cohort=1 must be >= 2"),
        ({"colluders": -1}, "colluders=-1"),
        ({"identity": identity}, "together"),
        ({"roster": roster}, "together"),
        ({"identity": identity, "roster": roster}, "own identity"),
    ):
        with pytest.raises(ValueError, match=match):
            NodeRules(**wrong)


def test_a_vector_of_another_type_or_shape_is_not_masked():
    cast, request = at(Stage.MASK)
    state = node.accept_shares(cast.states[1], request, NodeRules())
    for wrong in (vectors([1], width=4)[1], vectors([1])[1].astype("i2")):
        with pytest.raises(ValueError, match=r"must be int32 or int64\[3\]"):
            node.mask(state, wrong)


def test_a_server_gives_up_where_all_its_nodes_refuse():
    rules = dict.fromkeys(NODES, NodeRules(min_cohort=9))
    cast = Cast(vectors(NODES), rules)
    stage = Advertising(plan(NODES)).receive(cast.answer_all(Advertising(plan(NODES))))
    with pytest.raises(Refused, match="too-few-nodes"):
        cast.answer_all(stage)
    with pytest.raises(RoundAbandoned, match="0 of 5 nodes shared"):
        stage.receive({})
