"""What the server sees of one node is uniform mod 2^b; a vector with a mask missing is not.

Pearson's chi-square over the residues, by the top 8 bits and by the low 8 bits of each entry. The
vector is as plain as can be, so that whatever structure it has would show.
"""

import numpy as np
import pytest
from scipy import stats

from dpfl_flower.secagg import encoding_of, node
from dpfl_flower.secagg.masks import apply_masks
from dpfl_flower.secagg.messages import Stage
from dpfl_flower.secagg.modulus import Modulus
from dpfl_flower.secagg.node_state import NodeRules
from dpfl_flower.secagg.sealing import unseal
from dpfl_flower.secagg.server import Advertising
from tests.support.secagg import Cast, plan, with_rosters

WIDTH = 1 << 18
NODES = (1, 2, 3, 4)
FALSE_ALARM = 1e-7


def p_value(packed, bits):
    """Return the smaller p-value of the two tests, Bonferroni-corrected."""
    modulus = Modulus(bits)
    words = modulus.zeros(WIDTH)
    modulus.add_packed(words, packed)
    residues = modulus.signed(words).astype(np.uint64) & np.uint64((1 << bits) - 1)
    found = [
        stats.chisquare(np.bincount((residues >> np.uint64(shift)) & np.uint64(255), minlength=256))
        for shift in (0, bits - 8)
    ]
    return min(1.0, 2 * min(test.pvalue for test in found))


def masked_by_node_1(bits, *, plain, skip=()):
    """Return what node 1 sends, without some of its masks."""
    cast = Cast(dict.fromkeys(NODES, plain))
    stage = Advertising(plan(NODES, width=WIDTH, bits=bits))
    while (request := stage.requests[1]).stage is not Stage.MASK:
        stage = stage.receive(cast.answer_all(stage))
    state = node.accept_shares(cast.states[1], request, NodeRules())
    words = Modulus(bits).words(plain)
    packed = node.mask(state, plain)[1].vector
    Modulus(bits).add_packed(words := Modulus(bits).zeros(WIDTH), packed)
    keys = {"own": state.seed} | {
        peer.node_id: node.KeyPair(state.mask_private).agree(
            peer.mask_key, state.session.pair_label("mask", 1, peer.node_id)
        )
        for peer in state.peers
    }
    for name in skip:
        # Node 1 has the smallest id: it subtracted the masks of its peers.
        side = "subtract" if name == "own" else "add"
        apply_masks(words, **{side: [keys[name]]})
    return Modulus(bits).pack(words)


@pytest.mark.parametrize("bits", [16, 24, 32, 40, 64])
@pytest.mark.parametrize("plain", ["zeros", "ones", "ramp"])
def test_a_masked_vector_is_uniform(bits, plain):
    vector = {
        "zeros": np.zeros(WIDTH, np.int64),
        "ones": np.ones(WIDTH, np.int64),
        "ramp": np.arange(WIDTH) % 200 - 100,
    }[plain]
    assert p_value(masked_by_node_1(bits, plain=vector), bits) > FALSE_ALARM


@pytest.mark.parametrize("skip", [("own", 2), ("own", 2, 3)])
def test_any_one_mask_that_is_left_hides_it(skip):
    # What colluding peers, who know their masks with it, take off leaves it uniform.
    vector = np.ones(WIDTH, np.int64)
    assert p_value(masked_by_node_1(32, plain=vector, skip=skip), 32) > FALSE_ALARM


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_an_unmasked_vector_is_seen_at_once(bits):
    vector = np.arange(WIDTH) % 200 - 100
    skip = ("own", 2, 3, 4)
    assert p_value(masked_by_node_1(bits, plain=vector, skip=skip), bits) < FALSE_ALARM


def test_a_vector_of_which_half_the_entries_or_half_the_bits_are_masked_is_seen():
    masked = masked_by_node_1(32, plain=np.ones(WIDTH, np.int64)).reshape(-1, 4)
    half_entries = masked.copy()
    half_entries[WIDTH // 2 :] = (1, 0, 0, 0)
    low_bits, high_bits = masked.copy(), masked.copy()
    low_bits[:, 2:] = 0
    high_bits[:, :2] = (1, 0)
    for wrong in (half_entries, low_bits, high_bits):
        assert p_value(wrong.ravel(), 32) < FALSE_ALARM


def test_a_tenth_of_a_quarter_of_the_entries_moved_would_be_seen():
    # The power of one test: the non-central chi-square of the least bias that it must see.
    cells = 256
    shift = np.zeros(cells)
    shift[:64], shift[64:128] = -0.1 / cells, 0.1 / cells
    critical = stats.chi2.isf(FALSE_ALARM / 2, cells - 1)
    assert stats.ncx2.cdf(critical, cells - 1, WIDTH * cells * np.sum(shift**2)) < 1e-9


def test_masks_of_two_rounds_and_two_peers_have_nothing_in_common():
    first, second = (masked_by_node_1(32, plain=np.zeros(WIDTH, np.int64)) for _ in range(2))
    difference = Modulus(32).zeros(WIDTH)
    Modulus(32).add_packed(difference, first)
    other = Modulus(32).zeros(WIDTH)
    Modulus(32).add_packed(other, second)
    assert p_value(Modulus(32).pack(difference - other), 32) > FALSE_ALARM


def secrets_of_a_round(server_round):
    """Return every secret that any node made or agreed on, and what they are put together from."""
    found = []
    cast = Cast(dict.fromkeys(NODES, np.zeros(2, np.int64)))

    def watch(stage, replies):
        for n in NODES:
            state, reply = cast.states[n], replies[n]
            if reply.stage is Stage.ADVERTISE:
                found.extend((state.mask_private, state.seal_private))
            if reply.stage is Stage.SHARE:
                found.extend((state.seed, *(item.key for item in state.opening)))
            if reply.stage is Stage.MASK:
                found.extend(item.seed_share for item in state.held)
                found.extend(item.key_share for item in state.held)

    cast.run(plan(NODES, width=2, server_round=server_round), watch=watch)
    return found


def test_no_secret_serves_two_nodes_or_two_rounds():
    # A seed is known to the server once its round is over: in a second one it would hide nothing.
    rounds = [secrets_of_a_round(server_round) for server_round in (1, 2, 2)]
    each = 3 * len(NODES) + 3 * len(NODES) * (len(NODES) - 1)
    assert [len(found) for found in rounds] == [each] * 3
    together = {secret for found in rounds for secret in found}
    assert len(together) == 3 * each
    assert min(map(len, together)) == 32


@pytest.mark.parametrize(("bits", "lanes"), [(21, 3), (22, 8)])
def test_words_of_several_entries_are_uniform_under_a_mask_and_not_without(bits, lanes):
    plain = np.arange(3 * WIDTH) % 200 - 100
    cast = Cast(dict.fromkeys(NODES, plain))
    stage = Advertising(plan(NODES, width=plain.size, bits=bits, lanes=lanes))
    while (request := stage.requests[1]).stage is not Stage.MASK:
        stage = stage.receive(cast.answer_all(stage))
    state = node.accept_shares(cast.states[1], request, NodeRules())
    seen = node.mask(state, plain)[1].vector.view("<u8")[:WIDTH]
    bare = encoding_of(bits, lanes).words(plain)[:WIDTH]
    assert seen.size == bare.size == WIDTH
    assert p_value(seen.view(np.uint8), 64) > FALSE_ALARM
    assert p_value(bare.view(np.uint8), 64) < FALSE_ALARM


def test_tokens_which_the_server_sees_open_nothing_and_are_no_key():
    cast = Cast(dict.fromkeys(NODES, np.zeros(2, np.int64)), with_rosters(NODES))
    keys, tokens, sealed = set(), set(), []

    def watch(stage, replies):
        for n, reply in replies.items():
            state = cast.states[n]
            if reply.stage is Stage.SHARE:
                keys.update(item.key for item in state.opening)
                keys.update((state.seed, state.mask_private))
                sealed.extend((n, item.node_id, item.sealed) for item in reply.sealed)
                assert {item.token for item in state.shown}.isdisjoint(
                    item.token for item in state.expected
                )
            if reply.stage is Stage.MASK:
                tokens.update(item.token for item in reply.tokens)

    cast.run(plan(NODES, width=2, rosters=True), watch=watch)
    pairs = len(NODES) * (len(NODES) - 1)
    assert len(tokens) == len(sealed) == pairs and all(len(token) == 32 for token in tokens)
    assert tokens.isdisjoint(keys)
    session = plan(NODES, width=2, rosters=True).bound_session
    for sender, receiver, box in sealed:
        label = session.label("seal", sender, receiver)
        for token in tokens:
            with pytest.raises(ValueError):
                unseal(token, box, label)
