"""Integers mod 2^b as digits that an approximate scheme still adds exactly.

CKKS (Cheon et al., ASIACRYPT 2017) adds real numbers up to an error that grows with their size and
their number. So a residue is cut into digits, each small enough that the sum of all parties' digits
stays below `CAPACITY`; below it the error is bounded by `error_bound`, far under the 1/2 that
rounding takes off, and the integers come back exact.

>>> import numpy as np
>>> code = DigitCode(width=2, bits=64, parties=3)
>>> code.digit_bits, code.digits
(30, 3)
>>> slots = sum(code.encode(np.array([n, -(2**61)])) for n in (1, 2, 3))
>>> code.decode(slots, parties=3).tolist() == [6, -3 * 2**61]
True
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dpfl_flower import checks
from dpfl_flower.secagg.encoding import Integers

__all__ = [
    "CAPACITY",
    "LARGEST_ERROR",
    "MOST_PARTIES",
    "RING_DIMENSION",
    "SCALE_BITS",
    "SLOTS",
    "DigitCode",
    "error_bound",
]

RING_DIMENSION: Final = 8192
SLOTS: Final = RING_DIMENSION // 2
SCALE_BITS: Final = 60
CAPACITY: Final = 1 << 32
"""No sum of digits is larger in absolute value."""
MOST_PARTIES: Final = 1 << 20
LARGEST_ERROR: Final = 1 / 4
"""A slot further from an integer than that is no sum of digits."""

_SIGMA: Final = 3.24  # SEAL's centred binomial of 42 bits: sqrt(42 / 4)
_UNIT_ROUNDOFF: Final = 2.0**-53


def error_bound(parties: int) -> float:
    """Return a bound on how far a decrypted slot is from the integer that it stands for.

    The sum of three parts, for ``parties`` ciphertexts and the server's own of zero:

    * the noise of encryption, ``16 sqrt(2/3) sigma N + 6 sigma sqrt(N) + 16 sigma sqrt(h N)`` each,
      and of taking off the special prime, ``sqrt(N/3) (3 + 8 sqrt(h))``, over the scale (Cheon et
      al., ASIACRYPT 2017, Lemmas 1 and 2, for the ternary secrets of SEAL, whose variance is 2/3,
      and h <= N of them not 0). These are six standard deviations, and the scale leaves room for
      1e5 times as much;
    * rounding of the N coefficients to integers: at most ``N / 2`` each, over the scale;
    * the floating point of the transforms of N points: a relative error, in the 2-norm, of at most
      ``8 u log2 N`` each (Higham, Accuracy and Stability of Numerical Algorithms, Theorem 24.2), so
      ``sqrt(N)`` times that of the largest slot, once for encoding and once for decoding.
    """
    checks.positive_int(parties=parties)
    n = RING_DIMENSION
    fresh = 16 * math.sqrt(2 / 3) * _SIGMA * n + 6 * _SIGMA * math.sqrt(n) + 16 * _SIGMA * n
    fresh += math.sqrt(n / 3) * (3 + 8 * math.sqrt(n))
    rounded = n / 2
    transforms = 2 * math.sqrt(n) * 8 * _UNIT_ROUNDOFF * math.log2(n) * CAPACITY
    return (parties + 1) * (fresh + rounded) / 2.0**SCALE_BITS + transforms


@dataclass(frozen=True, kw_only=True)
class DigitCode:
    """How a vector of integers mod 2^bits becomes slots, and their sum the sum of the integers.

    Residues are taken in ``[-2^(bits-1), 2^(bits-1))``. The last digit has the sign, the others
    have none; where one digit is enough it is the integer itself. A 1 beside the vector counts the
    summands.

    Parameters
    ----------
    width : int
        Entries of a vector.
    bits : int
        At most 64.
    parties : int
        The most vectors in a sum, at most `MOST_PARTIES`.

    Raises
    ------
    ValueError
        Naming the argument, its value and the bound.
    """

    width: int
    bits: int
    parties: int

    def __post_init__(self) -> None:
        checks.positive_int(width=self.width, bits=self.bits, parties=self.parties)
        checks.at_most(64, bits=self.bits)
        checks.at_most(MOST_PARTIES, parties=self.parties)

    @property
    def digit_bits(self) -> int:
        """Bits of a digit: as many as keep the sum of all parties' digits below the capacity."""
        return min(self.bits, CAPACITY.bit_length() - 1 - self.parties.bit_length())

    @property
    def digits(self) -> int:
        """Digits of an integer."""
        return -(-self.bits // self.digit_bits)

    @property
    def chunks(self) -> int:
        """Ciphertexts of a vector."""
        return -(-self.digits * (self.width + 1) // SLOTS)

    def encode(self, vector: Integers) -> NDArray[np.float64]:
        """Return the digits of ``vector``, shape ``(width,)``: shape ``(chunks, SLOTS)``."""
        if vector.dtype not in (np.int32, np.int64) or vector.shape != (self.width,):
            raise ValueError(
                f"vector={vector.dtype}{vector.shape} must be int32 or int64({self.width},)"
            )
        centred = self._reduced(vector.astype(np.int64, copy=False))
        slots = np.zeros(self.chunks * SLOTS)
        table = self._table(slots)
        table[0, -1] = 1
        last = self.digits - 1
        mask = np.int64((1 << self.digit_bits) - 1)
        for digit in range(last):
            table[digit, :-1] = (centred >> np.int64(digit * self.digit_bits)) & mask
        table[last, :-1] = centred >> np.int64(last * self.digit_bits)
        return slots.reshape(self.chunks, SLOTS)

    def decode(self, slots: NDArray[np.float64], *, parties: int) -> NDArray[np.int64]:
        """Return the sum of ``parties`` vectors, in ``[-2^(bits-1), 2^(bits-1))``.

        Raises
        ------
        ValueError
            If a slot is too far from an integer or too large for a sum of digits, as it is under
            a wrong key, or if there are not ``parties`` summands.
        """
        if slots.shape != (self.chunks, SLOTS):
            raise ValueError(f"slots={slots.shape} must be {(self.chunks, SLOTS)}")
        largest = parties << self.digit_bits
        if not np.all(np.abs(slots) <= largest + LARGEST_ERROR):  # also where it is no number
            raise ValueError(f"a slot is larger than {largest}, the most of {parties} digits")
        whole = np.rint(slots)
        if not np.all(np.abs(slots - whole) <= LARGEST_ERROR):
            raise ValueError(f"a slot is further than {LARGEST_ERROR} from an integer")
        flat = whole.ravel()
        table = self._table(flat)
        if np.any(flat[table.size :]):
            raise ValueError("slots beyond the vector must be 0")
        counts = table[:, -1]
        if counts[0] != parties or np.any(counts[1:]):
            raise ValueError(f"{counts[0]:.0f} vectors are summed, parties={parties!r} are named")
        total = np.zeros(self.width, np.int64)
        for digit in range(self.digits):  # wraps mod 2^64, as C integers do
            total += table[digit, :-1].astype(np.int64) << np.int64(digit * self.digit_bits)
        return self._reduced(total)

    def _table(self, flat: NDArray[np.float64]) -> NDArray[np.float64]:
        return flat[: self.digits * (self.width + 1)].reshape(self.digits, self.width + 1)

    def _reduced(self, vector: NDArray[np.int64]) -> NDArray[np.int64]:
        unused = np.int64(64 - self.bits)
        return (vector << unused) >> unused
