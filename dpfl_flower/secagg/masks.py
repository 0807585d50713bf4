"""A 256-bit key expanded to a mask mod 2^b, added to or taken from a vector in place.

The mask is the keystream of AES-256 in counter mode, cut into little-endian words: each key is used
for one mask and nothing else, so the counter starts at zero. A word of w >= b uniform bits is
uniform mod 2^b.

>>> vector = Modulus(32).zeros(3)
>>> apply_mask(vector, bytes(32), Modulus(32))
>>> vector
array([2025887196, 2307473570,  346179757], dtype=uint32)
>>> apply_mask(vector, bytes(32), Modulus(32), subtract=True)
>>> vector
array([0, 0, 0], dtype=uint32)
"""

from typing import Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR

from dpfl_flower.secagg.modulus import Modulus, Words

__all__ = ["KEY_BYTES", "apply_mask"]

KEY_BYTES: Final = 32
_BLOCK_BYTES: Final = 1 << 17  # a block and its mask stay in cache
_ZEROS: Final = memoryview(bytes(_BLOCK_BYTES))


def apply_mask(vector: Words, key: bytes, modulus: Modulus, *, subtract: bool = False) -> None:
    """Add the mask that ``key`` expands to, or subtract it, mod 2^word_bits and in place.

    Parameters
    ----------
    vector : array of ``modulus.word_type``, shape ``(width,)``
    key : bytes
        32 uniform bytes that mask one vector only.
    modulus : Modulus
    subtract : bool
    """
    if len(key) != KEY_BYTES:
        raise ValueError(f"key of {len(key)} bytes must have {KEY_BYTES}")
    stream = Cipher(AES256(key), CTR(bytes(16))).encryptor()
    combine = np.subtract if subtract else np.add
    mask = np.empty(_BLOCK_BYTES // vector.itemsize, modulus.word_type)
    mask_bytes = mask.view(np.uint8).data
    for start in range(0, vector.size, mask.size):
        block = vector[start : start + mask.size]
        stream.update_into(_ZEROS[: block.nbytes], mask_bytes[: block.nbytes])
        combine(block, mask[: block.size], out=block)
