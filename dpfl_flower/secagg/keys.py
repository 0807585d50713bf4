"""Key agreement: X25519 (RFC 7748), then HKDF-SHA256 (RFC 5869) bound to purpose and parties.

>>> from dpfl_flower.rng import secure
>>> ours, theirs = (KeyPair.generate(secure()) for _ in range(2))
>>> ours.agree(theirs.public, b"label") == theirs.agree(ours.public, b"label")
True
"""

from dataclasses import dataclass, field
from typing import Self, final

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256, Hash
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from dpfl_flower.rng import RandomSource

__all__ = ["PUBLIC_KEY_BYTES", "KeyPair", "commitment", "is_usable"]

PUBLIC_KEY_BYTES = 32
_ANY_PRIVATE_KEY = bytes(31) + b"\1"  # which keys agree on zero does not depend on it


@final
@dataclass(frozen=True)
class KeyPair:
    """An X25519 key pair for one round.

    Parameters
    ----------
    private : bytes
        32 uniform bytes.
    public : bytes, optional
        The public key that belongs to it, where it is known: to work it out takes as long as to
        agree on a key.
    """

    private: bytes = field(repr=False)
    public: bytes = b""
    _key: X25519PrivateKey = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        key = X25519PrivateKey.from_private_bytes(self.private)
        object.__setattr__(self, "_key", key)
        if not self.public:
            object.__setattr__(self, "public", key.public_key().public_bytes_raw())

    @classmethod
    def generate(cls, rng: RandomSource) -> Self:
        """Return a fresh pair."""
        return cls(rng.random_bytes(32))

    def agree(self, public: bytes, label: bytes, *, length: int = 32) -> bytes:
        """Return ``length`` bytes that both ends derive, and nobody else can; fewer are a prefix.

        Raises
        ------
        ValueError
            If ``public`` is no key, or one of the few that every private key agrees with on zero.
        """
        secret = self._key.exchange(X25519PublicKey.from_public_bytes(public))
        ends = b"".join(sorted((self.public, public)))
        return HKDF(SHA256(), length=length, salt=None, info=label + ends).derive(secret)


def is_usable(public: bytes) -> bool:
    """Whether another node can agree on a key with ``public``."""
    try:
        X25519PrivateKey.from_private_bytes(_ANY_PRIVATE_KEY).exchange(
            X25519PublicKey.from_public_bytes(public)
        )
    except ValueError:
        return False
    return True


def commitment(seed: bytes, label: bytes) -> bytes:
    """Return a hash of a 256-bit seed, by which a put-together one is known to be the right one."""
    digest = Hash(SHA256())
    digest.update(label + seed)
    return digest.finalize()
