"""What nodes with an identity sign, and whether somebody did.

>>> from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
>>> key = Ed25519PrivateKey.generate()
>>> is_signed(key.public_key().public_bytes_raw(), key.sign(b"words"), b"words")
True
>>> is_signed(b"no key", b"no signature", b"words")
False
"""

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from dpfl_flower.secagg.session import Session

__all__ = ["is_signed", "keys_statement", "survivors_statement"]


def keys_statement(session: Session, node_id: int, mask_key: bytes, seal_key: bytes) -> bytes:
    """Return what a node signs about its keys."""
    return session.label("keys", node_id) + mask_key + seal_key


def survivors_statement(session: Session, node_id: int, survivors: bytes) -> bytes:
    """Return what a node signs about its surviving peers."""
    return session.label("survivors", node_id) + survivors


def is_signed(identity: bytes, signature: bytes, statement: bytes) -> bool:
    """Whether whoever has the Ed25519 key ``identity``, 32 bytes, signed the statement."""
    try:
        Ed25519PublicKey.from_public_bytes(identity).verify(signature, statement)
    except (InvalidSignature, ValueError):
        return False
    return True
