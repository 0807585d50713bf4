"""Draw integers from a table of exact probabilities, one 64-bit word a draw.

>>> from dpfl_flower.rng import SeededRandom
>>> third = 2**127 // 3
>>> die = TableSampler([third, third, 2**127 - 2 * third], first=-1)
>>> sorted(set(die.sample(100, SeededRandom(1)).tolist()))
[-1, 0, 1]
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

import numpy as np
from numpy.typing import NDArray

from dpfl_flower import checks
from dpfl_flower.rng import RandomSource

# 127 and not 128, so that sums of probabilities, 1 included, fit in two words.
PROBABILITY_BITS: Final = 127

_Words = NDArray[np.uint64]
_Pair = tuple[_Words, _Words]
_BLOCK_DRAWS: Final = 1 << 14  # what a block computes stays in a 1 MiB cache, tables included
_GUIDE_BITS: Final = 14
_LATE: Final = -(1 << 62)  # marks draws that the guide table does not settle
_REMAINDER: Final = 1 / 400  # the most of the draws that may fall in no block


@final
class TableSampler:
    """Sample ``first + i`` with probability ``probabilities[i] / 2^127``, exactly.

    Inversion with thresholds of 127 bits: a uniform number is compared with the cumulative
    probabilities by its first 64-bit word, and a second word is drawn only where the first ties
    with a threshold's. A guide table, indexed by the first word's leading bits, leaves one
    comparison a draw (Chen and Asau, "On generating random variates from an empirical
    distribution", AIIE Transactions 6, 1974).

    So that the table stays in cache for wide distributions, it is split in two, exactly, in
    integers. Each block of ``B = 2^b`` neighbours gives ``B`` times its least probability to a
    uniform draw over the block: the thresholds then count blocks, not values, and the word's last
    ``b`` bits say where in the block. What is left over, at most 1 in 400, forms a second table
    that is searched as a whole; its total is no power of two, so numbers beyond it are drawn again.

    Parameters
    ----------
    probabilities : sequence of int
        At least 0, with the sum 2^127.
    first : int
        The value that ``probabilities[0]`` belongs to; ``|first| < 2^61``.

    Raises
    ------
    ValueError
        If a probability is negative or the sum is not 2^127.
    """

    def __init__(self, probabilities: Sequence[int], *, first: int) -> None:
        if min(probabilities, default=-1) < 0:
            raise ValueError("probabilities must hold integers >= 0, and at least one")
        total = sum(probabilities)
        if total != 1 << PROBABILITY_BITS:
            raise ValueError(f"sum of probabilities={total!r} must be 2**{PROBABILITY_BITS}")
        checks.at_most((1 << 61) - len(probabilities), first_from_zero=abs(first))
        self._first = int(first)
        cells = _split(probabilities)
        self._block_bits = _choose_block_bits(cells[0])
        self._block = 1 << self._block_bits
        cells = _padded(cells[0], self._block), _padded(cells[1], self._block)
        lowest = _block_minima(cells, self._block)
        high, low = _cumulative(lowest)
        covered = (int(high[-1]) << 64 | int(low[-1])) << self._block_bits
        # No number reaches a threshold of 1, and as 2^128 it would wrap to 0.
        reachable = high < np.uint64(1 << (PROBABILITY_BITS - 64 - self._block_bits))
        # Two words less b bits hold the number that picks a block: twice the scale of the
        # probabilities, then the b bits at the end of the first word that pick the place in it.
        high, low = _shifted((high[reachable], low[reachable]), 1)
        self._blocks = _Thresholds(high << np.uint64(self._block_bits), low)
        self._remainder: _Thresholds | None = None
        if covered < total:
            # One name for all steps: what one has used is freed before the next one allocates.
            cells = _less_block_minima(cells, lowest)
            cells = _cumulative(cells)
            cells = _shifted(cells, 128 - (total - covered).bit_length())
            self._remainder = _Thresholds(*cells)
        self._build_guide()

    def _build_guide(self) -> None:
        shift = np.uint64(64 - _GUIDE_BITS)
        where = (self._blocks.first >> shift).astype(np.int64)
        here = np.bincount(where, minlength=1 << _GUIDE_BITS)
        before = np.cumsum(here) - here
        # The value if the word is not below the bucket's threshold; less a block if it is.
        self._guide_value = self._first + ((before + 1) << self._block_bits)
        late = here > 1
        if self._remainder is not None:
            late |= before + here == len(self._blocks.first)
        self._guide_value[late] = _LATE
        # Without a threshold of its own a bucket takes its end, which no word in it reaches (the
        # last one's wraps to 0, and the difference still reads as negative).
        self._guide_threshold = np.arange(1, (1 << _GUIDE_BITS) + 1, dtype=np.uint64) << shift
        self._guide_threshold[where] = self._blocks.first

    def sample(self, n: int, rng: RandomSource) -> NDArray[np.int64]:
        """Return ``n`` independent draws."""
        checks.non_negative_int(n=n)
        values = np.empty(n, dtype=np.int64)
        late = [np.empty(0, dtype=np.int64)]
        late_words = [np.empty(0, dtype=np.uint64)]
        for start in range(0, n, _BLOCK_DRAWS):
            block = values[start : start + _BLOCK_DRAWS]
            words = rng.uint64(block.size)
            unsettled = self._guided(words, block)
            late.append(unsettled + start)
            late_words.append(words[unsettled])
        values[np.concatenate(late)] = self._searched(np.concatenate(late_words), rng)
        return values

    def _guided(self, words: _Words, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """Fill ``values`` by the guide table; return the places that it does not settle."""
        bucket = words >> np.uint64(64 - _GUIDE_BITS)
        # In range by construction; "clip" only spares NumPy a checking pass and a copy.
        np.take(self._guide_value, bucket.view(np.int64), out=values, mode="clip")
        gap = np.take(self._guide_threshold, bucket.view(np.int64), mode="clip")
        np.subtract(words, gap, out=gap)
        # Word and threshold agree in the leading bits, so the sign of the difference tells which
        # is greater; both agree in all that counts if it is below 2^b.
        tied = bool(gap.min() < self._block)
        unsettled = values < _LATE // 2
        if tied:
            unsettled |= gap < np.uint64(self._block)
        np.bitwise_and(words, np.uint64(self._block - 1), out=bucket)
        values += bucket.view(np.int64)
        below = gap.view(np.int64)
        below >>= 63
        below &= -self._block
        values += below
        return np.flatnonzero(unsettled)

    def _searched(self, words: _Words, rng: RandomSource) -> NDArray[np.int64]:
        """Settle draws by search in the whole table of blocks, then of the remainder."""
        place = words & np.uint64(self._block - 1)
        index = self._blocks.passed(words - place, rng)
        values = self._first + (index << self._block_bits) + place.view(np.int64)
        if self._remainder is not None:
            outside = np.flatnonzero(index == len(self._blocks.first))
            values[outside] = self._first + self._drawn_again(outside.size, rng)
        return values

    def _drawn_again(self, n: int, rng: RandomSource) -> NDArray[np.int64]:
        """Return ``n`` indices by the remainder's own probabilities."""
        assert self._remainder is not None
        index = np.empty(n, dtype=np.int64)
        waiting = np.arange(n)
        while waiting.size:
            index[waiting] = self._remainder.passed(rng.uint64(waiting.size), rng)
            waiting = waiting[index[waiting] == len(self._remainder.first)]
        return index


@dataclass(frozen=True)
class _Thresholds:
    """Ascending 128-bit thresholds in two words; equality of firsts leaves it to the seconds."""

    first: _Words
    second: _Words

    def passed(self, words: _Words, rng: RandomSource) -> NDArray[np.int64]:
        """Count the thresholds at or below numbers of which ``words`` are the first words."""
        counts = np.searchsorted(self.first, words, side="right")
        smaller = np.searchsorted(self.first, words, side="left")
        tied = np.flatnonzero(smaller < counts)
        for i, second in zip(tied, rng.uint64(tied.size), strict=True):
            run = self.second[smaller[i] : counts[i]]
            counts[i] = smaller[i] + np.searchsorted(run, second, side="right")
        return counts


def _choose_block_bits(high: _Words) -> int:
    """Return the largest ``b`` that leaves the remainder at 1 in 400 at most (leading words)."""
    bits = 0
    while True:
        block = 2 << bits
        covered = block * float(
            _padded(high, block).reshape(-1, block).min(axis=1).sum(dtype=np.float64)
        )
        if covered < (1 - _REMAINDER) * 2.0 ** (PROBABILITY_BITS - 64):
            return bits
        bits += 1


# Arithmetic on arrays of two-word integers below 2^128: (high words, low words).


def _split(integers: Sequence[int]) -> _Pair:
    pair = np.empty(len(integers), dtype=np.uint64), np.empty(len(integers), dtype=np.uint64)
    for start in range(0, len(integers), _BLOCK_DRAWS):
        block = slice(start, start + _BLOCK_DRAWS)
        packed = b"".join([value.to_bytes(16, "little") for value in integers[block]])
        pair[1][block], pair[0][block] = np.frombuffer(packed, dtype="<u8").reshape(-1, 2).T
    return pair


def _padded(words: _Words, block: int) -> _Words:
    extra = -len(words) % block
    return np.pad(words, (0, extra)) if extra else words


def _block_minima(pair: _Pair, block: int) -> _Pair:
    """Return per block a pair at most each of its cells: the least high word, the least low."""
    high, low = pair
    return high.reshape(-1, block).min(axis=1), low.reshape(-1, block).min(axis=1)


def _less_block_minima(pair: _Pair, minima: _Pair) -> _Pair:
    blocks = len(minima[0])
    high, low = pair[0].reshape(blocks, -1), pair[1].reshape(blocks, -1)
    least_high, least_low = minima[0][:, None], minima[1][:, None]
    borrow = low < least_low
    return (high - least_high - borrow).ravel(), (low - least_low).ravel()


def _cumulative(pair: _Pair) -> _Pair:
    high, low = np.cumsum(pair[0], dtype=np.uint64), np.cumsum(pair[1], dtype=np.uint64)
    carries = low < pair[1]  # a sum modulo 2^64 wrapped at this term if it is below the term
    high += np.cumsum(carries, dtype=np.uint64)
    return high, low


def _shifted(pair: _Pair, bits: int) -> _Pair:
    """Return the pair times 2^bits, for ``bits`` in [1, 127] and results below 2^128."""
    high, low = pair
    if bits >= 64:
        return low << np.uint64(bits - 64), np.zeros_like(low)
    return high << np.uint64(bits) | low >> np.uint64(64 - bits), low << np.uint64(bits)
