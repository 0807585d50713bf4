"""Integers mod 2^b: as words that masks are added to, and as the fewest whole bytes on the wire.

>>> import numpy as np
>>> modulus = Modulus(24)
>>> words = modulus.words(np.array([5, -3]))
>>> modulus.signed(words)
array([ 5, -3])
>>> packed = modulus.pack(words)
>>> packed.size, modulus.packed_bytes(2)
(7, 7)
>>> total = modulus.zeros(2)
>>> modulus.add_packed(total, packed)
>>> modulus.signed(total)
array([ 5, -3])
"""

from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from dpfl_flower import checks

__all__ = ["MAX_BITS", "Modulus", "Words", "bits_without_wrap"]

MAX_BITS = 64

Words = NDArray[np.uint16] | NDArray[np.uint32] | NDArray[np.uint64]
"""Residues in machine words; bits above the modulus carry nothing and are dropped at the end."""

_WORDS: dict[int, type[np.unsignedinteger[Any]]] = {16: np.uint16, 32: np.uint32, 64: np.uint64}
_SIGNED: dict[int, type[np.signedinteger[Any]]] = {16: np.int16, 32: np.int32, 64: np.int64}


def bits_without_wrap(largest: int, parties: int) -> int:
    """Return the fewest bits, in whole bytes, in which ``parties`` summands cannot wrap around.

    Parameters
    ----------
    largest : int
        No entry of a summand is larger in absolute value.
    parties : int
        The most summands there can be.

    Raises
    ------
    ValueError
        If ``parties * largest < 2^63`` does not hold.
    """
    checks.positive_int(largest=largest, parties=parties)
    bits = (int(largest) * int(parties)).bit_length() + 1
    if bits > MAX_BITS:
        raise ValueError(
            f"parties={parties!r} times largest={largest!r} must be < 2**63: a sum that wraps "
            "around would move by more than its sensitivity"
        )
    return -(-bits // 8) * 8


@final
@dataclass(frozen=True)
class Modulus:
    """The integers mod 2^bits.

    Parameters
    ----------
    bits : int
        From 1 to 64. A masked vector travels in ``ceil(bits / 8)`` bytes an entry.
    """

    bits: int

    def __post_init__(self) -> None:
        checks.positive_int(bits=self.bits)
        checks.at_most(MAX_BITS, bits=self.bits)

    @property
    def word_bits(self) -> int:
        """The width of the words that are computed with: 16, 32 or 64."""
        return next(width for width in _WORDS if self.bits <= width)

    @property
    def word_type(self) -> np.dtype[np.unsignedinteger[Any]]:
        """The numpy type of those words, little-endian, so that masks are the same anywhere."""
        return np.dtype(_WORDS[self.word_bits]).newbyteorder("<")

    @property
    def entry_bytes(self) -> int:
        """Bytes an entry takes on the wire."""
        return -(-self.bits // 8)

    def packed_bytes(self, width: int) -> int:
        """Return the length of a packed vector: its entries, and what a last whole word needs."""
        return self.entry_bytes * width + self.word_bits // 8 - self.entry_bytes

    def zeros(self, width: int) -> Words:
        """Return ``width`` zeros."""
        zeros: Words = np.zeros(width, self.word_type)
        return zeros

    def words(self, vector: NDArray[np.int64]) -> Words:
        """Return a new array of the residues of ``vector``, int64, shape ``(width,)``."""
        words: Words = vector.astype(self.word_type)  # wraps mod 2^word_bits, as C casts do
        return words

    def signed(self, words: Words) -> NDArray[np.int64]:
        """Return the residues as int64 in ``[-2^(bits-1), 2^(bits-1))``, a new array."""
        unused = self.word_bits - self.bits
        signed = words.astype(_WORDS[self.word_bits]).view(_SIGNED[self.word_bits])
        signed <<= unused
        signed >>= unused
        return signed.astype(np.int64)

    def pack(self, words: Words) -> NDArray[np.uint8]:
        """Return the residues in as few whole bytes an entry as hold them; see `packed_bytes`."""
        size, entry, word = words.size, self.entry_bytes, self.word_bits // 8
        if entry == word:
            packed = words.view(np.uint8).copy()
        else:
            # Whole words, one every entry_bytes, each over the end of the one before: first every
            # other one, then those between, whose ends then cover beginnings, which are mended.
            packed = np.zeros(self.packed_bytes(size), np.uint8)
            for first in (0, 1):
                count = (size + 1 - first) // 2
                if count:
                    np.ndarray(
                        (count,),
                        self.word_type,
                        buffer=packed.data,
                        offset=first * entry,
                        strides=(2 * entry,),
                    )[:] = words[first::2]
            bytes_ = words.view(np.uint8)
            for byte in range(min(entry, word - entry)):
                packed[byte : size * entry : 2 * entry] = bytes_[byte :: 2 * word]
            packed[size * entry :] = 0
        if self.bits % 8:
            packed[entry - 1 : size * entry : entry] &= (1 << self.bits % 8) - 1
        return packed

    def add_packed(self, total: Words, packed: NDArray[np.uint8]) -> None:
        """Add a packed vector to ``total`` in place.

        Raises
        ------
        ValueError
            Unless ``packed`` is uint8 of the length that ``total.size`` entries take.
        """
        expected = (self.packed_bytes(total.size),)
        if packed.dtype != np.uint8 or packed.shape != expected:
            raise ValueError(
                f"packed={packed.dtype}{list(packed.shape)} must be uint8{list(expected)}"
            )
        # Overlapping words, one every entry_bytes: what each has too much is above the modulus.
        windows: Words = np.ndarray(
            total.shape,
            self.word_type,
            buffer=np.ascontiguousarray(packed).data,
            strides=(self.entry_bytes,),
        )
        np.add(total, windows, out=total)
