"""Integers mod 2^b: as words that masks are added to, and as the fewest whole bytes on the wire.

>>> import numpy as np
>>> modulus = Modulus(24)
>>> words = modulus.words(np.array([5, -3]))
>>> modulus.signed(words)
array([ 5, -3])
>>> packed = modulus.pack(words)
>>> packed.size, modulus.packed_bytes(2)
(6, 6)
>>> total = modulus.zeros(2)
>>> modulus.add_packed(total, packed)
>>> modulus.signed(total)
array([ 5, -3])
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from dpfl_flower import checks
from dpfl_flower.secagg.encoding import Encoding, Integers, Words

__all__ = ["MAX_BITS", "Modulus", "bits_without_wrap", "fewest_bits"]

MAX_BITS = 64
_BLOCK = 1 << 14  # words that stay in cache from step to step

_WORDS: dict[int, type[np.unsignedinteger[Any]]] = {16: np.uint16, 32: np.uint32, 64: np.uint64}
_SIGNED: dict[int, type[np.signedinteger[Any]]] = {16: np.int16, 32: np.int32, 64: np.int64}


def bits_without_wrap(largest: int, parties: int) -> int:
    """Return the fewest bits, in whole bytes, in which ``parties`` summands cannot wrap around.

    Parameters and errors as for `fewest_bits`.
    """
    return -(-fewest_bits(largest, parties) // 8) * 8


def fewest_bits(largest: int, parties: int) -> int:
    """Return the fewest bits in which ``parties`` summands cannot wrap around.

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
    return bits


@final
@dataclass(frozen=True)
class Modulus(Encoding):
    """The integers mod 2^bits, each in a word whose bits above the modulus carry nothing.

    Parameters
    ----------
    bits : int
        From 1 to 64. A masked vector travels in ``ceil(bits / 8)`` bytes an entry.
    """

    bits: int
    lanes: int = field(default=1, init=False, repr=False)

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
        """Return the length of a packed vector: a whole number of bytes an entry."""
        return self.entry_bytes * width

    def words(self, vector: Integers) -> Words:
        """Return a new array of the residues of ``vector``, shape ``(width,)``."""
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
        """Return the residues in as few whole bytes an entry as hold them.

        Plane by plane: the lowest 1, 2, 4 or 8 bytes of all entries, then what is above them. For
        24 bits that is the lowest two bytes of each entry, and after all of them the third of each.
        """
        packed = np.empty(self.packed_bytes(words.size), np.uint8)
        for low, plane in self._planes(packed, words.size):
            plane[:] = words.view(plane.dtype)[
                low // plane.itemsize :: words.itemsize // plane.itemsize
            ]
        if self.bits % 8:
            *_, (low, top) = self._planes(packed, words.size)
            top &= top.dtype.type((1 << self.bits - 8 * low) - 1)
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
        for low, plane in self._planes(np.ascontiguousarray(packed), total.size):
            for start in range(0, total.size, _BLOCK):
                block = total[start : start + _BLOCK]
                part = plane[start : start + _BLOCK]
                if low:
                    part = part.astype(total.dtype)
                    part <<= total.dtype.type(8 * low)
                np.add(block, part, out=block)

    def _planes(
        self, packed: NDArray[np.uint8], size: int
    ) -> Iterator[tuple[int, NDArray[np.unsignedinteger[Any]]]]:
        """Yield each plane of a packed vector, and how many bytes of an entry are below it."""
        low = 0
        for plane_bytes in (8, 4, 2, 1):
            if self.entry_bytes & plane_bytes:
                stop = size * (low + plane_bytes)
                yield low, packed[size * low : stop].view(f"<u{plane_bytes}")
                low += plane_bytes
