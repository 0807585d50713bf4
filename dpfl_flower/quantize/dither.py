"""The public dither: the same uniform numbers for every unit of a round.

It makes rounding unbiased and protects nobody: the seed is public, known to all before the round.

>>> dither(b"round 1", 3)
array([0.14653724, 0.39233404, 0.1432572 ], dtype=float32)
"""

import hashlib

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

__all__ = ["dither"]

_CHUNK = 1 << 16


def dither(seed: bytes, size: int) -> NDArray[np.float32]:
    """Expand a public seed into numbers in (0, 1).

    AES-256-CTR keyed with the seed's SHA-256, so that every node and every version expands it the
    same way. The numbers are the odd multiples of 2^-24: symmetric about 1/2, and never 0, so
    that ``floor(x + u)`` keeps zero at zero.

    Parameters
    ----------
    seed : bytes
        Public. Not empty.
    size : int

    Returns
    -------
    float32 array, shape (size,)
    """
    if not isinstance(seed, bytes) or not seed:
        raise ValueError(f"dither_seed={seed!r} must be a non-empty bytes object")
    key = hashlib.sha256(b"dpfl-flower public dither\0" + seed).digest()
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    numbers = np.empty(size, np.float32)
    for start in range(0, size, _CHUNK):
        block = numbers[start : start + _CHUNK]
        words = np.frombuffer(stream.update(bytes(4 * block.size)), "<u4")
        np.multiply((words >> 8) | 1, np.float32(2.0**-24), out=block, casting="same_kind")
    return numbers
