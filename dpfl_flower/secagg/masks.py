"""256-bit keys expanded to masks mod 2^b, added to or taken from a vector in place.

A mask is the keystream of AES-256 in counter mode, cut into little-endian words: each key is used
for one mask and nothing else, so the counter starts at zero. A word of w >= b uniform bits is
uniform mod 2^b.

>>> vector = np.zeros(3, np.uint32)
>>> apply_masks(vector, add=[bytes(32)])
>>> vector
array([2025887196, 2307473570,  346179757], dtype=uint32)
>>> apply_masks(vector, subtract=[bytes(32)])
>>> vector
array([0, 0, 0], dtype=uint32)
"""

from collections.abc import Collection
from typing import Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR

from dpfl_flower.secagg.encoding import Words

__all__ = ["KEY_BYTES", "apply_masks"]

KEY_BYTES: Final = 32
_BLOCK_BYTES: Final = 3 << 16  # a block and its mask stay in cache
_ZEROS: Final = memoryview(bytes(_BLOCK_BYTES))


def apply_masks(
    vector: Words,
    *,
    add: Collection[bytes] = (),
    subtract: Collection[bytes] = (),
) -> None:
    """Add the masks of some keys and subtract those of others, mod 2^(a word's bits) and in place.

    Parameters
    ----------
    vector : array of unsigned words, little-endian, shape ``(width,)``
    add, subtract : collections of bytes
        Keys of 32 uniform bytes, each of which masks one vector only.
    """
    for key in (*add, *subtract):
        if len(key) != KEY_BYTES:
            raise ValueError(f"key of {len(key)} bytes must have {KEY_BYTES}")
    streams = [
        (Cipher(AES256(key), CTR(bytes(16))).encryptor(), combine)
        for keys, combine in ((add, np.add), (subtract, np.subtract))
        for key in keys
    ]
    mask = np.empty(_BLOCK_BYTES // vector.itemsize, vector.dtype)
    mask_bytes = mask.view(np.uint8).data
    # All masks of a block while it is in cache: the vector passes through memory once.
    for start in range(0, vector.size, mask.size):
        block = vector[start : start + mask.size]
        words, zeros, room = mask[: block.size], _ZEROS[: block.nbytes], mask_bytes[: block.nbytes]
        for stream, combine in streams:
            stream.update_into(zeros, room)
            combine(block, words, out=block)
