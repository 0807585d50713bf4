"""A public random rotation, after which no coordinate of a vector is much larger than another.

The randomised Walsh-Hadamard transform: random signs, then the normalised Hadamard matrix, after
padding with zeros to a power of two (Kairouz, Liu, Steinke, arXiv 2102.06387, Section 4). It
protects nobody: the seed is public. It makes coordinates of a sum subgaussian, so that few bits
hold them, and it keeps the norm.

>>> rotation = Rotation(3, b"round 1")
>>> rotated = rotation.apply(np.array([3.0, 0.0, 4.0]))
>>> rotated.shape, round(float(rotated @ rotated), 9)
((4,), 25.0)
>>> (rotation.undo(rotated).round(9) + 0.0).tolist()
[3.0, 0.0, 4.0]
"""

import hashlib
import math
from functools import cache
from typing import Final, final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from dpfl_flower import checks

__all__ = ["Rotation", "hadamard", "padded_length"]

_ROW: Final = 64  # these levels by one small matrix product: short butterflies are slow in NumPy
_BLOCK: Final = 1 << 14  # 128 KiB of float64, which stay in cache for all their levels
_COLUMNS: Final = 256


def padded_length(dimension: int) -> int:
    """Return the least power of two that is at least ``dimension``."""
    checks.positive_int(dimension=dimension)
    return 1 << (int(dimension) - 1).bit_length()


def hadamard(vector: NDArray[np.float64]) -> None:
    """Multiply by the Hadamard matrix (Sylvester's, entries 1 and -1), in place.

    In O(d log d), block by block: first the levels inside a block, then, for a few columns at a
    time, those across blocks.

    Parameters
    ----------
    vector : contiguous float64 array, shape (d,)
        ``d`` a power of two.
    """
    size = vector.size
    block = min(size, _BLOCK)
    for start in range(0, size, block):
        part = vector[start : start + block]
        row = min(block, _ROW)
        rows = part.reshape(-1, row)
        rows[:] = rows @ _matrix(row)
        _butterflies(part, row)
    across = vector.reshape(-1, block)
    if len(across) > 1:
        for start in range(0, block, _COLUMNS):
            columns = across[:, start : start + _COLUMNS].copy()
            _butterflies(columns.reshape(-1), columns.shape[1])
            across[:, start : start + _COLUMNS] = columns


def _butterflies(vector: NDArray[np.float64], half: int) -> None:
    """Do the levels of ``half`` entries a side, and all longer ones."""
    while half < vector.size:
        pairs = vector.reshape(-1, 2, half)
        first, second = pairs[:, 0], pairs[:, 1]
        difference = first - second
        first += second
        second[:] = difference
        half *= 2


@cache
def _matrix(size: int) -> NDArray[np.float64]:
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


@final
class Rotation:
    """Random signs and the normalised Walsh-Hadamard transform, fixed by a public seed.

    Parameters
    ----------
    dimension : int
        d, the length of what is rotated.
    seed : bytes
        Public, fresh in every round; not empty. AES-256-CTR keyed with its SHA-256 gives the signs,
        so that every node and every version expands it the same way.

    Raises
    ------
    ValueError
        Naming the argument.
    """

    def __init__(self, dimension: int, seed: bytes) -> None:
        self.dimension = dimension
        self.padded = padded_length(dimension)
        if not isinstance(seed, bytes) or not seed:
            raise ValueError(f"rotation_seed={seed!r} must be a non-empty bytes object")
        key = hashlib.sha256(b"dpfl-flower public rotation\0" + seed).digest()
        stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
        bits = np.frombuffer(stream.update(bytes((dimension + 7) // 8)), np.uint8)
        signs = np.unpackbits(bits, count=dimension).astype(np.float64)
        # Signs and the matrix's factor in one product.
        self._factors = (1 - 2 * signs) / math.sqrt(self.padded)

    def apply(self, vector: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the rotated vector, shape (padded,), of one of shape (dimension,)."""
        if vector.shape != (self.dimension,):
            raise ValueError(f"shape={vector.shape!r} must be ({self.dimension},)")
        rotated = np.zeros(self.padded)
        np.multiply(vector, self._factors, out=rotated[: self.dimension])
        hadamard(rotated)
        return rotated

    def undo(self, rotated: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the vector, shape (dimension,), of a rotated one of shape (padded,).

        The transpose: exact but for rounding in float64, and of any other vector, noise included,
        the part that lies in the first ``dimension`` directions.
        """
        if rotated.shape != (self.padded,):
            raise ValueError(f"shape={rotated.shape!r} must be ({self.padded},)")
        work = np.array(rotated, np.float64)
        hadamard(work)
        return work[: self.dimension] * self._factors
