"""How a vector of integers becomes words that masks are added to, and bytes on the wire.

Whatever the encoding, words add up as the vectors do, mod a power of two: what the sum of words
shows is a function of the sum of the vectors, and of nothing else. One that is chosen badly spoils
the sum; it shows no more.

>>> from dpfl_flower.secagg.modulus import Modulus
>>> isinstance(Modulus(32), Encoding)
True
"""

from abc import ABC, abstractmethod
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["WORD64", "Encoding", "Integers", "Words", "add_words"]

WORD64: Final = np.dtype(np.uint64).newbyteorder("<")

Integers = NDArray[np.int32] | NDArray[np.int64]
"""What nodes add up."""

Words = NDArray[np.uint16] | NDArray[np.uint32] | NDArray[np.uint64]
"""Machine words, little-endian; each is masked mod 2^(its width)."""


class Encoding(ABC):
    """Words for a vector, bytes for words, and back.

    Attributes
    ----------
    bits : int
        Sums of entries are known mod 2^bits.
    lanes : int
        Entries that are packed together.
    """

    bits: int
    lanes: int

    @property
    @abstractmethod
    def word_type(self) -> np.dtype[np.unsignedinteger[Any]]:
        """The numpy type of a word, little-endian, so that masks are the same anywhere."""

    @abstractmethod
    def packed_bytes(self, width: int) -> int:
        """Return how many bytes a packed vector of ``width`` entries takes."""

    @abstractmethod
    def words(self, vector: Integers) -> Words:
        """Return new words for ``vector``, shape ``(width,)``."""

    @abstractmethod
    def signed(self, words: Words) -> NDArray[np.int64]:
        """Return the entries of a sum as int64; those past the vector's width mean nothing."""

    @abstractmethod
    def pack(self, words: Words) -> NDArray[np.uint8]:
        """Return what travels; it may be the words' own memory."""

    @abstractmethod
    def add_packed(self, total: Words, packed: NDArray[np.uint8]) -> None:
        """Add a packed vector to ``total`` in place; ValueError for another type or length."""

    def zeros(self, width: int) -> Words:
        """Return the words of ``width`` zeros."""
        zeros: Words = np.zeros(self.word_count(width), self.word_type)
        return zeros

    def word_count(self, width: int) -> int:
        """Return how many words ``width`` entries take."""
        return -(-width // self.lanes)


def add_words(total: Words, packed: NDArray[np.uint8]) -> None:
    """Add 64-bit words that travel as they are to ``total`` in place.

    Raises
    ------
    ValueError
        Unless ``packed`` is uint8 of the length that ``total`` has.
    """
    if packed.dtype != np.uint8 or packed.shape != (total.nbytes,):
        raise ValueError(f"packed={packed.dtype}{list(packed.shape)} must be uint8[{total.nbytes}]")
    np.add(total, np.ascontiguousarray(packed).view(WORD64), out=total)
