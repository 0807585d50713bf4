"""Who a peer is: Ed25519 identities, and the roster of those that a node counts on.

The server registers the keys that SuperNodes log in with, so these prove nothing against it. A
roster travels between the operators of the nodes, past the server: a file with one line for each,
as ``ssh-keygen -t ed25519`` writes into its ``.pub`` file.

>>> from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
>>> identity = Identity(Ed25519PrivateKey.generate())
>>> roster = Roster(frozenset({identity.public}))
>>> roster.vouches(identity.public, identity.sign(b"words"), b"words")
True
>>> roster.vouches(identity.public, identity.sign(b"words"), b"other words")
False
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Self, final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from dpfl_flower.secagg.statements import is_signed

__all__ = ["Identity", "Roster"]


@final
@dataclass(frozen=True)
class Identity:
    """A node's own private identity key."""

    key: Ed25519PrivateKey = field(repr=False)

    @property
    def public(self) -> bytes:
        """The 32 bytes that others know it by."""
        return self.key.public_key().public_bytes_raw()

    def sign(self, statement: bytes) -> bytes:
        """Return the 64-byte signature of ``statement``."""
        return self.key.sign(statement)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a private key as ``ssh-keygen -t ed25519 -N ""`` or OpenSSL (PEM) writes it.

        Raises
        ------
        ValueError
            If the file holds no unencrypted Ed25519 private key.
        """
        data = path.read_bytes()
        ssh = b"OPENSSH PRIVATE KEY" in data
        load = serialization.load_ssh_private_key if ssh else serialization.load_pem_private_key
        try:
            key = load(data, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise ValueError(f"{path} must hold an unencrypted Ed25519 private key") from error
        if not isinstance(key, Ed25519PrivateKey):
            raise ValueError(f"{path} must hold an Ed25519 private key, not another kind")
        return cls(key)


@final
@dataclass(frozen=True)
class Roster:
    """The public identity keys, 32 bytes each, of the nodes that this node counts on."""

    members: frozenset[bytes]

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read lines ``ssh-ed25519 KEY [name]``; empty lines and ``#`` comments are skipped.

        Raises
        ------
        ValueError
            If a line is something else, or there is none.
        """
        members = set()
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            try:
                key = serialization.load_ssh_public_key(line.strip().encode())
            except (ValueError, UnsupportedAlgorithm) as error:
                raise ValueError(f"{path}, line {number}, must be an ssh-ed25519 key") from error
            if not isinstance(key, Ed25519PublicKey):
                raise ValueError(f"{path}, line {number}, must be an ssh-ed25519 key")
            members.add(key.public_bytes_raw())
        if not members:
            raise ValueError(f"{path} must name at least one key")
        return cls(frozenset(members))

    def vouches(self, identity: bytes, signature: bytes, statement: bytes) -> bool:
        """Whether a member of this roster, by this identity, signed the statement."""
        return identity in self.members and is_signed(identity, signature, statement)
