"""Several entries in a 64-bit word, where no sum can wrap around: fewer bytes of mask and of wire.

A word is ``q_0 + 2^b q_1 + 2^2b q_2 + ...`` mod 2^64, of signed entries. Words are summed mod 2^64,
and as long as every sum of entries is in ``[-2^(b-1), 2^(b-1))`` the sum of words is the word of
the sums, from which each can be read off, lowest first. A sum out of that range spills into the
lanes above it, and out of the last one into bits that no sum of honest entries sets: at least one
bit of each word is kept for that.

>>> lanes = Lanes(bits=21, lanes=3)
>>> words = lanes.words(np.array([5, -3, 7, -1]))
>>> words.size, lanes.packed_bytes(4)
(2, 16)
>>> lanes.signed(words + words)[:4]
array([10, -6, 14, -2])
"""

from dataclasses import dataclass
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

from dpfl_flower import checks
from dpfl_flower.secagg.encoding import WORD64, Encoding, Integers, Words, add_words
from dpfl_flower.secagg.modulus import Modulus, bits_without_wrap, fewest_bits
from dpfl_flower.secagg.split_lanes import (
    SPLIT_BITS,
    SPLIT_LANES,
    SPLIT_PARTIES,
    SplitLanes,
)

__all__ = ["LEAST_WIDTH", "Lanes", "encoding_of", "encoding_without_wrap"]

_USABLE_BITS: Final = 63
_BLOCK: Final = 1 << 17  # words: a megabyte, beside the second-level cache at worst

LEAST_WIDTH: Final = 1 << 12
"""Shorter vectors cost little anyhow, and with an entry a word more bits tell a left mask."""


@final
@dataclass(frozen=True)
class Lanes(Encoding):
    """``lanes`` entries of ``bits`` bits in a word; entry ``i`` of n words is in word ``i mod n``.

    Parameters
    ----------
    bits : int
    lanes : int
        At least 2; ``bits * lanes <= 63``.
    """

    bits: int
    lanes: int

    def __post_init__(self) -> None:
        checks.positive_int(bits=self.bits, lanes=self.lanes)
        if self.lanes < 2 or self.bits * self.lanes > _USABLE_BITS:
            raise ValueError(
                f"lanes={self.lanes!r} must be >= 2 and bits={self.bits!r} times lanes "
                f"<= {_USABLE_BITS}"
            )

    @property
    def word_type(self) -> np.dtype[np.unsignedinteger[Any]]:
        """64-bit words, little-endian."""
        return WORD64

    def packed_bytes(self, width: int) -> int:
        """Return 8 bytes a word."""
        return -(-width // self.lanes) * WORD64.itemsize

    def words(self, vector: Integers) -> Words:
        """Return new words for ``vector``, shape ``(width,)``."""
        size = -(-vector.size // self.lanes)
        words = np.empty(size, WORD64)
        signed = words.view(np.int64)
        for start in range(0, size, _BLOCK):
            block = signed[start : start + _BLOCK]
            first = (self.lanes - 1) * size + start
            top = vector[first : first + block.size]
            block[: top.size] = top
            block[top.size :] = 0
            for lane in reversed(range(self.lanes - 1)):
                np.left_shift(block, self.bits, out=block)
                first = lane * size + start
                # A lane that the vector does not fill stays zero: it has no entry to add.
                entries = vector[first : min(first + block.size, (lane + 1) * size)]
                np.add(block[: entries.size], entries, out=block[: entries.size])
        return words

    def signed(self, words: Words) -> NDArray[np.int64]:
        """Return the entries; the last lane's with the bits that no honest sum sets."""
        rest = words.astype(np.uint64).view(np.int64)
        entries = np.empty((self.lanes, words.size), np.int64)
        unused = 64 - self.bits
        for lane in entries[:-1]:
            np.left_shift(rest, unused, out=lane)
            np.right_shift(lane, unused, out=lane)
            np.subtract(rest, lane, out=rest)
            np.right_shift(rest, self.bits, out=rest)
        entries[-1] = rest
        return entries.reshape(-1)

    def pack(self, words: Words) -> NDArray[np.uint8]:
        """Return the words' own bytes."""
        return words.view(np.uint8)

    def add_packed(self, total: Words, packed: NDArray[np.uint8]) -> None:
        """Add a packed vector in place; ValueError unless uint8 of the length of ``total``."""
        add_words(total, packed)


def encoding_of(bits: int, lanes: int) -> Encoding:
    """Return the encoding of these bits and entries packed together; ValueError if there is none.

    >>> encoding_of(24, 1)
    Modulus(bits=24)
    """
    if (bits, lanes) == (SPLIT_BITS, SPLIT_LANES):
        return SplitLanes()
    return Modulus(bits) if lanes == 1 else Lanes(bits, lanes)


def encoding_without_wrap(largest: int, parties: int, width: int) -> Encoding:
    """Return what takes the fewest bytes for a sum that cannot wrap around.

    Parameters
    ----------
    largest, parties
        As for `bits_without_wrap`; errors too.
    width : int
        Entries of a vector.

    >>> encoding_without_wrap(1 << 14, 20, 1_000_000)
    Lanes(bits=21, lanes=3)
    >>> encoding_without_wrap(1 << 14, 100, 1_000_000)
    SplitLanes(bits=22, lanes=8)
    >>> encoding_without_wrap(1 << 14, 200, 1_000_000)
    Modulus(bits=24)
    """
    needed = fewest_bits(largest, parties)
    plain, lanes = Modulus(bits_without_wrap(largest, parties)), _USABLE_BITS // needed
    if width < LEAST_WIDTH:
        return plain
    if needed == SPLIT_BITS and parties <= SPLIT_PARTIES:
        return SplitLanes()
    packed = Lanes(_USABLE_BITS // lanes, lanes) if lanes >= 3 else plain
    return packed if packed.packed_bytes(width) <= plain.packed_bytes(width) else plain
