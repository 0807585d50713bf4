"""Several entries under one mask: the sum is exact to the last entry that fits, and checked."""

import dataclasses

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dpfl_flower.client.contribution import SumBound
from dpfl_flower.secagg import (
    RoundAbandoned,
    bits_without_wrap,
    encoding_of,
    encoding_without_wrap,
    fewest_bits,
    node,
)
from dpfl_flower.secagg.lanes import LEAST_WIDTH, Lanes
from dpfl_flower.secagg.messages import AdvertiseRequest, Stage
from dpfl_flower.secagg.modulus import Modulus
from dpfl_flower.secagg.node_state import NodeRules, Party
from dpfl_flower.secagg.server import Advertising
from dpfl_flower.secagg.split_lanes import SPLIT_PARTIES, SplitLanes
from tests.support.secagg import Cast, plain_sum, plan

PACKINGS = [(21, 3), (15, 4), (12, 5), (9, 7), (30, 2), (22, 8)]
NODES = (1, 2, 3, 4)


def summed(encoding, parts):
    """Return the sum of vectors, through words and bytes."""
    width = parts.shape[1]
    total = encoding.zeros(width)
    for part in parts:
        packed = encoding.pack(encoding.words(part))
        assert packed.size == encoding.packed_bytes(width)
        encoding.add_packed(total, packed)
    return encoding.signed(total)[:width]


@pytest.mark.parametrize(
    "encoding",
    [*(encoding_of(*p) for p in PACKINGS), Modulus(16), Modulus(24), Modulus(40), Modulus(64)],
)
@pytest.mark.parametrize("width", [1, 24, 30_001])
def test_a_vector_of_half_the_bytes_makes_the_same_words(encoding, width):
    largest = (1 << (min(encoding.bits, 32) - 1)) - 1
    vector = np.random.default_rng(0).integers(-largest, largest + 1, width)
    short = encoding.words(vector.astype(np.int32))
    np.testing.assert_array_equal(short, encoding.words(vector))
    np.testing.assert_array_equal(encoding.signed(short)[:width], vector)


@given(
    st.sampled_from(PACKINGS),
    st.integers(1, 60),
    st.integers(1, SPLIT_PARTIES),
    st.integers(0, 2**32),
)
@example((22, 8), 24, SPLIT_PARTIES, 0)
@example((21, 3), 3, 3, 0)
@settings(max_examples=150, deadline=None)
def test_sums_are_exact_up_to_the_largest_entries_that_fit(packing, width, parties, seed):
    bits, lanes = packing
    largest = ((1 << (bits - 1)) - 1) // parties
    if not largest:
        return
    rng = np.random.default_rng(seed)
    parts = rng.integers(-largest, largest + 1, (parties, width))
    # All at once at either end, where lanes and digits are fullest; and just past a digit's edge.
    parts[:, rng.random(width) < 0.4] = largest
    parts[:, rng.random(width) < 0.4] = -largest
    parts[:, rng.random(width) < 0.2] = min(largest, (1 << 12) - 1)
    parts[:, rng.random(width) < 0.2] = -min(largest, 1 << 12)
    np.testing.assert_array_equal(summed(encoding_of(bits, lanes), parts), parts.sum(0))


def test_more_than_a_block_of_words_is_the_same():
    rng = np.random.default_rng(1)
    for width in (100_003, 3 * (1 << 13) + 1, 8 * (1 << 12) + 1):
        parts = rng.integers(-(1 << 14), (1 << 14) + 1, (3, width))
        for bits, lanes in ((21, 3), (22, 8)):
            np.testing.assert_array_equal(summed(encoding_of(bits, lanes), parts), parts.sum(0))


@given(st.integers(1, 2**40), st.integers(1, 2**10), st.integers(1, 10**6))
@settings(max_examples=300, deadline=None)
@example(1 << 14, 63, 10**6)
@example(1 << 14, 64, 10**6)
@example(1 << 14, 127, 10**6)
@example(1 << 13, 128, 10**6)
def test_the_packing_that_is_chosen_holds_the_sum_in_no_more_bytes(largest, parties, width):
    encoding = encoding_without_wrap(largest, parties, width)
    assert largest * parties < 2 ** (encoding.bits - 1)
    if isinstance(encoding, SplitLanes):
        assert parties <= SPLIT_PARTIES
    plain = Modulus(bits_without_wrap(largest, parties))
    # An entry of three bytes has eighths to fill up.
    assert encoding.packed_bytes(width) <= plain.packed_bytes(width) + 7 * 3
    SumBound(largest=largest, parties=parties).check(encoding.bits, encoding.lanes)
    assert width >= LEAST_WIDTH or encoding == plain
    assert encoding_of(encoding.bits, encoding.lanes) == encoding


def test_the_usual_packings():
    def chosen(parties):
        return encoding_without_wrap(1 << 14, parties, 10**6)

    assert [chosen(n) for n in (63, 64, 127)] == [Lanes(21, 3), SplitLanes(), SplitLanes()]
    assert chosen(128) == Modulus(24)
    assert encoding_without_wrap(1 << 13, 128, 10**6) == Modulus(24)
    assert fewest_bits(1 << 13, 128) == 22


def test_a_node_holds_the_packing_to_the_bound_that_it_is_told():
    with pytest.raises(ValueError, match="bits=21 must be >= 22"):
        SumBound(largest=1 << 14, parties=64).check(21, 3)
    with pytest.raises(ValueError, match="parties=128 must be <= 127"):
        SumBound(largest=1, parties=128).check(22, 8)
    SumBound(largest=1 << 14, parties=63).check(21, 3)


@pytest.mark.parametrize(("bits", "lanes"), [(32, 2), (22, 3), (21, 0), (65, 1), (8, 8), (16, 4)])
def test_a_packing_that_cannot_be_is_refused_by_nodes(bits, lanes):
    request = AdvertiseRequest(server_round=1, width=4, bits=bits, lanes=lanes, seconds=60.0)
    with pytest.raises(node.Refused, match=r"lanes|bits"):
        node.advertise(request, Party(1, 1), NodeRules(), now=0.0)


@pytest.mark.parametrize(("bits", "lanes"), [(21, 3), (22, 8)])
def test_packed_bytes_of_another_length_or_type_are_refused(bits, lanes):
    encoding = encoding_of(bits, lanes)
    size = encoding.packed_bytes(9)
    for wrong in (np.zeros(size - 8, np.uint8), np.zeros(size, np.int8)):
        with pytest.raises(ValueError, match="must be uint8"):
            encoding.add_packed(encoding.zeros(9), wrong)


def round_of(parts, spoil, *, bits, lanes, largest):
    """Return the sum of a round in which node 1's masked words are changed by ``spoil``."""
    width = parts[1].size
    cast = Cast(parts)
    stage = Advertising(plan(NODES, width=width, bits=bits, lanes=lanes, largest=largest))
    while not hasattr(stage, "total"):
        replies = cast.answer_all(stage)
        if stage.requests[1].stage is Stage.MASK:
            words = replies[1].vector.view("<u8").copy()
            spoil(words)
            replies[1] = dataclasses.replace(replies[1], vector=words.view(np.uint8))
        stage = stage.receive(replies)
    return stage.total


@pytest.mark.parametrize(("bits", "lanes"), [(21, 3), (22, 8)])
def test_a_mask_that_is_left_or_an_entry_out_of_range_gives_no_sum(bits, lanes):
    # As large as fits: the check has the least to go by.
    largest = ((1 << (bits - 1)) - 1) // len(NODES)
    width = LEAST_WIDTH
    parts = {n: np.full(width, largest if n % 2 else -largest, np.int64) for n in NODES}
    settings_ = {"bits": bits, "lanes": lanes, "largest": largest}
    honest = round_of(parts, lambda words: None, **settings_)
    np.testing.assert_array_equal(honest, plain_sum(parts, NODES))

    def left(words):
        words += np.random.default_rng(5).integers(0, 2**64, words.size, np.uint64)

    with pytest.raises(RoundAbandoned, match="a mask is left"):
        round_of(parts, left, **settings_)
    full = {n: np.full(width, largest, np.int64) for n in NODES}
    for entry in (0, width // 2, width - 1):
        wrong = {**full, 1: full[1].copy()}
        wrong[1][entry] += len(NODES)
        with pytest.raises(RoundAbandoned, match="a mask is left"):
            round_of(wrong, lambda words: None, **settings_)
