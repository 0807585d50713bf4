"""Eight entries in three 64-bit words, where sums need 22 bits: two and two thirds a word.

Two whole entries leave 20 bits of a word. Of each eight entries six are whole, and two are split
into digits, ``q = low + 2^13 high`` with ``low`` in ``[-2^12, 2^12)``, that take what is left: each
low digit 20 bits, and both high digits together, of 10 bits each, the 20 bits of the third word.
Digits are summed as entries are, and the digits of a sum give it back.

With at most 127 summands, each entry of which times their number is below 2^21, sums of low digits
are at most ``127 * 2^12 < 2^19`` and sums of high digits ``2^21 / 2^13 + 127 < 2^9``: no digit
wraps around.

>>> encoding = SplitLanes()
>>> words = encoding.words(np.arange(-4, 4) * 1000)
>>> words.size, encoding.signed(words + words).tolist()
(3, [-8000, -6000, -4000, -2000, 0, 2000, 4000, 6000])
"""

from dataclasses import dataclass, field
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

from dpfl_flower.secagg.encoding import WORD64, Encoding, Integers, Words, add_words

__all__ = ["SPLIT_BITS", "SPLIT_LANES", "SPLIT_PARTIES", "SplitLanes"]

SPLIT_BITS: Final = 22
SPLIT_LANES: Final = 8
SPLIT_PARTIES: Final = 127
"""The most summands."""

_LOW: Final = 13  # bits of a low digit
_LOW_AT: Final = 2 * SPLIT_BITS
_HIGH_BITS: Final = (64 - _LOW_AT) // 2
_BLOCK: Final = 1 << 12  # words that stay in cache from step to step


@final
@dataclass(frozen=True)
class SplitLanes(Encoding):
    """The vector is cut into eighths: words ``i``, ``n + i`` and ``2 n + i`` hold entry i of each.

    The last eighths are filled up with zeros.
    """

    bits: int = field(default=SPLIT_BITS, init=False)
    lanes: int = field(default=SPLIT_LANES, init=False)

    @property
    def word_type(self) -> np.dtype[np.unsignedinteger[Any]]:
        """64-bit words, little-endian."""
        return WORD64

    def word_count(self, width: int) -> int:
        """Return three words for each eight entries, the last ones filled up."""
        return 3 * -(-width // SPLIT_LANES)

    def packed_bytes(self, width: int) -> int:
        """Return 8 bytes a word: 3 an entry."""
        return self.word_count(width) * WORD64.itemsize

    def words(self, vector: Integers) -> Words:
        """Return new words for ``vector``, shape ``(width,)``."""
        size = -(-vector.size // SPLIT_LANES)
        words = np.empty(3 * size, WORD64)
        first, middle, last = words.view(np.int64).reshape(3, size)
        scratch = np.empty((2, _BLOCK), vector.dtype)
        for start in range(0, size, _BLOCK):
            stop = min(size, start + _BLOCK)
            e = [_eighth(vector, size, i, start, stop) for i in range(SPLIT_LANES)]
            high, low = scratch[:, : stop - start]
            middle_block = middle[start:stop]
            # Highest lane first, then shift and add the next.
            _split(e[7], high, low)
            last[start:stop] = low
            np.left_shift(high, _HIGH_BITS, out=middle_block)
            _split(e[6], high, low)
            first[start:stop] = low
            np.add(middle_block, high, out=middle_block)
            for word, lower, upper in (
                (first[start:stop], e[0], e[1]),
                (middle_block, e[2], e[3]),
                (last[start:stop], e[4], e[5]),
            ):
                for entries in (upper, lower):
                    np.left_shift(word, SPLIT_BITS, out=word)
                    np.add(word, entries, out=word)
        return words

    def signed(self, words: Words) -> NDArray[np.int64]:
        """Return the entries; those that were split with more bits than an honest sum sets."""
        size = words.size // 3
        rests = words.astype(np.uint64).view(np.int64).reshape(3, size)
        entries = np.empty((SPLIT_LANES, size), np.int64)
        for i, rest in enumerate(rests):
            _take(rest, SPLIT_BITS, entries[2 * i])
            _take(rest, SPLIT_BITS, entries[2 * i + 1])
        # What is left of the words: a low digit, both high digits, the other low digit.
        _take(rests[1], _HIGH_BITS, entries[6])
        entries[7] = rests[1]
        for split, low in ((entries[6], rests[0]), (entries[7], rests[2])):
            np.left_shift(split, _LOW, out=split)
            np.add(split, low, out=split)
        return entries.reshape(-1)

    def pack(self, words: Words) -> NDArray[np.uint8]:
        """Return the words' own bytes."""
        return words.view(np.uint8)

    def add_packed(self, total: Words, packed: NDArray[np.uint8]) -> None:
        """Add a packed vector in place; ValueError unless uint8 of the length of ``total``."""
        add_words(total, packed)


def _eighth(vector: Integers, size: int, index: int, start: int, stop: int) -> Integers:
    found = vector[index * size + start : index * size + stop]
    if found.size == stop - start:
        return found
    filled = np.zeros(stop - start, vector.dtype)
    filled[: found.size] = found
    return filled


def _split(entries: Integers, high: Integers, low: Integers) -> None:
    """Write the digits of the entries."""
    np.add(entries, 1 << (_LOW - 1), out=high)
    np.right_shift(high, _LOW, out=high)
    np.left_shift(high, _LOW, out=low)
    np.subtract(entries, low, out=low)


def _take(rest: NDArray[np.int64], bits: int, lane: NDArray[np.int64]) -> None:
    """Move the lowest signed lane of ``rest`` to ``lane``."""
    np.left_shift(rest, 64 - bits, out=lane)
    np.right_shift(lane, 64 - bits, out=lane)
    np.subtract(rest, lane, out=rest)
    np.right_shift(rest, bits, out=rest)
