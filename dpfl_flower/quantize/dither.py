"""The public dither: the same uniform numbers for every unit of a round.

It makes rounding unbiased and protects nobody: the seed is public, known to all before the round.
Entry i of a vector takes number ``i mod PERIOD``: each entry is rounded without bias, and the
numbers stay in a core's cache.

>>> dither(b"round 1", 3)
array([-0.35346276, -0.10766596, -0.3567428 ], dtype=float32)
"""

import hashlib
from typing import Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

__all__ = ["PERIOD", "dither"]

PERIOD: Final = 1 << 17
"""How many numbers there are before they repeat."""


def dither(seed: bytes, dimension: int) -> NDArray[np.float32]:
    """Expand a public seed into numbers in (-1/2, 1/2).

    AES-256-CTR keyed with the seed's SHA-256, so that every node and every version expands it the
    same way. The numbers are the odd multiples of 2^-24: symmetric about 0, and never 1/2, so that
    ``rint(x + u)`` keeps zero at zero.

    Parameters
    ----------
    seed : bytes
        Public. Not empty.
    dimension : int
        Length of the vectors to round.

    Returns
    -------
    float32 array, shape (min(dimension, PERIOD),)
    """
    if not isinstance(seed, bytes) or not seed:
        raise ValueError(f"dither_seed={seed!r} must be a non-empty bytes object")
    key = hashlib.sha256(b"dpfl-flower public dither\0" + seed).digest()
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    size = min(dimension, PERIOD)
    words = np.frombuffer(stream.update(bytes(4 * size)), "<u4")
    odd = ((words >> 8) | 1).astype(np.int32) - (1 << 23)
    return odd.astype(np.float32) * np.float32(2.0**-24)
