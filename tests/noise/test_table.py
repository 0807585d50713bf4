from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpfl_flower.noise import rounded_gaussian
from dpfl_flower.noise.table import PROBABILITY_BITS, TableSampler
from dpfl_flower.rng import SeededRandom
from tests.support.goodness import ACCEPT, REJECT, cell_chi_square
from tests.support.scripted_random import CountingRandom, ScriptedRandom

ONE = 1 << PROBABILITY_BITS
LAST = 2**64 - 1


def normalised(weights):
    total = sum(weights)
    cells = [w * ONE // total for w in weights]
    cells[weights.index(max(weights))] += ONE - sum(cells)
    return cells


def geometric(n, ratio=0.7):
    return normalised([int(2**60 * ratio**i) for i in range(n)])


def gaussian_table(scale):
    half = rounded_gaussian.probabilities(scale)
    return half[:0:-1] + half


def thresholds(table, block=1):
    """As integers below 2^128 / block: a word's last bits that tell the place do not count."""
    firsts = table.first // np.uint64(block)
    return [int(a) << 64 | int(b) for a, b in zip(firsts, table.second, strict=True)]


def law(sampler, size):
    """The exact law that a sampler's two searched tables stand for, as fractions."""
    probability = [Fraction(0)] * size
    block = sampler._block
    whole = (1 << 128) // block
    ends = [*thresholds(sampler._blocks, block), whole]
    assert ends == sorted(ends)
    covered = 0
    for index, (start, end) in enumerate(pairwise([0, *ends])):
        mass = Fraction(end - start, whole)
        if sampler._remainder is not None and index == len(ends) - 1:
            rest = [0, *thresholds(sampler._remainder)]
            assert rest == sorted(rest)
            for cell, (a, b) in enumerate(pairwise(rest)):
                if b > a:
                    probability[cell] += mass * Fraction(b - a, rest[-1])
        elif mass:
            for place in range(block):
                probability[index * block + place] += mass / block
        covered += mass
    assert covered == 1
    return probability


CASES = {
    "one value": [ONE],
    "fair coin": [ONE // 2, ONE // 2],
    "uniform 64": [ONE // 64] * 64,
    "uniform but for a hair": [ONE // 64 + 5, *[ONE // 64] * 62, ONE // 64 - 5],
    "uniform 63": normalised([1] * 63),
    "nothing at the ends": [0, 0, ONE - 5, 5, 0, 0, 0],
    "nothing but the end": [0] * 9 + [ONE],
    "a gap": [ONE // 4, 0, 0, ONE // 2, ONE // 4],
    "hair's breadths": [1, 1, 1, ONE - 5, 1, 1],
    "geometric": geometric(40),
    "flat with one spike": normalised([100] * 3000 + [101] + [100] * 3000),
    "flat with one spike, in whole blocks": normalised([100] * 3008 + [101] + [100] * 3071),
    "Gaussian of scale 3": gaussian_table(3),
    "Gaussian in blocks": gaussian_table(700),
}


@pytest.mark.parametrize("name", CASES)
def test_the_tables_hold_exactly_the_stated_law(name):
    cells = CASES[name]
    assert law(TableSampler(cells, first=0), len(cells)) == [Fraction(c, ONE) for c in cells]


@given(st.lists(st.integers(0, 2**70) | st.sampled_from([0, 1, 2**126]), min_size=1, max_size=200))
@settings(max_examples=60, deadline=None)
def test_the_tables_hold_exactly_any_law(weights):
    if sum(weights) == 0:
        weights[0] = 1
    cells = normalised(weights)
    assert law(TableSampler(cells, first=0), len(cells)) == [Fraction(c, ONE) for c in cells]


def test_wide_tables_are_really_split_into_blocks():
    sampler = TableSampler(CASES["Gaussian in blocks"], first=0)
    assert sampler._block >= 2
    assert sampler._remainder is not None
    whole = (1 << 128) // sampler._block
    assert (
        Fraction(399, 400) <= Fraction(thresholds(sampler._blocks, sampler._block)[-1], whole) < 1
    )


@pytest.mark.parametrize("name", CASES)
def test_the_guide_table_agrees_with_the_search(name):
    sampler = TableSampler(CASES[name], first=-3)
    firsts = sampler._blocks.first
    ends = np.arange(1 << 14, dtype=np.uint64) << np.uint64(50)
    edges = np.concatenate([firsts, ends, np.array([0, LAST], dtype=np.uint64)])
    near = [edges + np.uint64(step) for step in (0, 1, sampler._block, 2**64 - 1)]
    words = np.concatenate([*near, SeededRandom(1).uint64(50_000)])
    values = np.empty(words.size, dtype=np.int64)
    late = sampler._guided(words.copy(), values)
    settled = np.setdiff1d(np.arange(words.size), late)
    place = words & np.uint64(sampler._block - 1)
    index = sampler._blocks.passed(words - place, SeededRandom(2))
    expected = -3 + index * sampler._block + place.astype(np.int64)
    assert (values[settled] == expected[settled]).all()
    # Whatever the guide settles is neither a tie nor in the remainder.
    assert not np.isin((words - place)[settled], firsts).any()
    if sampler._remainder is not None:
        assert (index[settled] < firsts.size).all()
    of_the_random = late[late >= words.size - 50_000]
    assert of_the_random.size < 0.05 * 50_000, "the guide settles next to nothing"


def test_a_tie_in_the_first_word_is_decided_by_the_second():
    cells = normalised([3, 1, 4, 1, 5, 9, 2, 6])
    sampler = TableSampler(cells, first=10)
    cumulative = 0
    for i, cell in enumerate(cells[:-1]):
        cumulative += cell
        first, second = divmod(2 * cumulative, 1 << 64)
        assert second not in (0, 1)
        for words, value in (
            ([first - 1], 10 + i),  # no second word is there to be taken
            ([first + 1], 11 + i),
            ([first, second - 1], 10 + i),
            ([first, second], 11 + i),
            ([first, 0], 10 + i),
            ([first, LAST], 11 + i),
        ):
            script = ScriptedRandom(words)
            assert sampler.sample(1, script).tolist() == [value]
            assert script.words_left == 0, "a tie must take a second word"


def test_a_tie_inside_blocks_keeps_the_place_and_takes_a_second_word():
    cells = CASES["Gaussian in blocks"]
    sampler = TableSampler(cells, first=0)
    block = sampler._block
    middle = len(sampler._blocks.first) // 2
    first, second = (int(w[middle]) for w in (sampler._blocks.first, sampler._blocks.second))
    assert first % block == 0
    for place in range(block):
        for word, index in ((second - 1, middle), (second, middle + 1)):
            script = ScriptedRandom([first + place, word])
            assert sampler.sample(1, script).tolist() == [index * block + place]
            assert script.words_left == 0


def test_a_second_word_parts_many_thresholds_that_share_the_first():
    # Seven cells within 2^-64 of each other around one half.
    cells = [ONE // 2 - 300, 100, 100, 200, 1, 1, 98, ONE // 2 - 200]
    sampler = TableSampler(cells, first=0)
    cumulative = np.cumsum(np.array(cells, dtype=object))[:-1] * 2
    assert {int(c) >> 64 for c in cumulative} == {2**63 - 1, 2**63}
    for i, c in enumerate(cumulative):
        for number, value in ((int(c) - 1, i), (int(c), i + 1)):
            script = ScriptedRandom([number >> 64, number & LAST])
            assert sampler.sample(1, script).tolist() == [value]


def test_the_two_outermost_numbers_give_the_two_outermost_values():
    sampler = TableSampler(gaussian_table(3), first=-39)
    assert sampler.sample(1, ScriptedRandom([0, 0])).tolist() == [-39]
    assert sampler.sample(1, ScriptedRandom([LAST, LAST])).tolist() == [39]


def test_one_word_a_draw():
    narrow, wide = CASES["Gaussian of scale 3"], CASES["Gaussian in blocks"]
    for cells, most in ((narrow, 100_000), (wide, 101_000)):
        source = CountingRandom(SeededRandom(1))
        TableSampler(cells, first=0).sample(100_000, source)
        assert 100_000 <= source.bytes_taken / 8 <= most


def test_draws_of_the_remainder_that_miss_it_are_drawn_again():
    sampler = TableSampler(CASES["Gaussian in blocks"], first=0)
    outside = int(sampler._blocks.first[-1]) + sampler._block
    top = int(sampler._remainder.first[-1])
    below = 1 << 63  # the remainder's total is scaled above one half
    script = ScriptedRandom([outside, top + 1, LAST, below])
    value = sampler.sample(1, script)[0]
    assert script.words_left == 0
    assert value == np.searchsorted(sampler._remainder.first, np.uint64(below), side="right")


@pytest.mark.parametrize("name", ["geometric", "Gaussian in blocks", "a gap", "uniform 63"])
def test_draws_follow_the_table(name):
    cells = CASES[name]
    draws = TableSampler(cells, first=-7).sample(1_000_000, SeededRandom(3))
    assert draws.dtype == np.int64
    assert cell_chi_square(draws, -7, [c / ONE for c in cells]) > ACCEPT
    shifted = [c / ONE for c in [*cells[1:], cells[0]]]
    if name not in ("uniform 63", "Gaussian in blocks"):
        assert cell_chi_square(draws, -7, shifted) < REJECT


@pytest.mark.parametrize("n", [0, 1, 16_383, 16_384, 16_385, 100_003])
def test_any_number_of_draws_and_the_same_from_the_same_words(n):
    sampler = TableSampler(CASES["geometric"], first=5)
    draws = sampler.sample(n, SeededRandom(3))
    assert draws.shape == (n,) and draws.dtype == np.int64
    assert (draws >= 5).all()
    assert (draws == sampler.sample(n, SeededRandom(3))).all()


@pytest.mark.parametrize(
    ("cells", "first", "message"),
    [
        ([], 0, "at least one"),
        ([ONE + 1, -1], 0, ">= 0"),
        ([ONE - 1], 0, "sum of probabilities"),
        ([ONE, 1], 0, "sum of probabilities"),
        ([ONE], 1 << 61, "first_from_zero"),
        ([ONE], -(1 << 61), "first_from_zero"),
    ],
)
def test_what_is_no_law_is_refused(cells, first, message):
    with pytest.raises(ValueError, match=message):
        TableSampler(cells, first=first)


def test_a_negative_number_of_draws_is_refused():
    with pytest.raises(ValueError, match="n=-1"):
        TableSampler([ONE], first=0).sample(-1, SeededRandom(1))
