"""Shares on their way through the server: AES-256-GCM under a key for one direction of one pair.

>>> from dpfl_flower.rng import secure
>>> sealed = seal(bytes(32), b"shares", b"run, round, sender, receiver", secure())
>>> unseal(bytes(32), sealed, b"run, round, sender, receiver")
b'shares'
"""

from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from dpfl_flower.rng import RandomSource

__all__ = ["OVERHEAD_BYTES", "seal", "unseal"]

_NONCE_BYTES: Final = 12
OVERHEAD_BYTES: Final = _NONCE_BYTES + 16


def seal(key: bytes, plain: bytes, associated: bytes, rng: RandomSource) -> bytes:
    """Return nonce, ciphertext and tag of ``plain``, bound to the ``associated`` data."""
    nonce = rng.random_bytes(_NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, plain, associated)


def unseal(key: bytes, sealed: bytes, associated: bytes) -> bytes:
    """Return what was sealed.

    Raises
    ------
    ValueError
        If anything was changed, or belongs to another run, round, sender or receiver.
    """
    nonce, rest = sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:]
    try:
        return AESGCM(key).decrypt(nonce, rest, associated)
    except InvalidTag:
        raise ValueError("sealed shares do not open: changed, or meant for another") from None
