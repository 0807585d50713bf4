"""The keys of CKKS: one secret that all nodes share, and what the server needs to add.

The key ceremony: one operator runs `make_key` on a machine that is not the server's and hands
``nodes.ckks`` to the other operators by a way that the server cannot read: in person, or encrypted
to each of them. Everybody compares the fingerprint by telephone. The server gets ``server.ckks``,
with which it can add and encrypt, and not decrypt. The key of a run that has ended is destroyed on
all nodes.

Whoever holds ``nodes.ckks`` can read *any* single node's ciphertext. So all nodes trust each other
not to hand it, or what they decrypt, to the server, and the server not to hand ciphertexts to them:
one node that works with the server gives it everything.

Keys and the noise of encryption are drawn by Microsoft SEAL inside TenSEAL, from the operating
system, and not by `dpfl_flower.rng`. The ring has dimension 8192 and a modulus of 180 bits, inside
the 218 of the Homomorphic Encryption Standard for 128 bits of security.

What CKKS decrypts to tells something of the key (Li and Micciancio, EUROCRYPT 2021). Nodes answer
whole numbers, in which nothing of the error is left.

>>> import tempfile
>>> with tempfile.TemporaryDirectory() as directory:
...     files = make_key(Path(directory))
...     public, secret = PublicKey.load(files.server), SecretKey.load(files.nodes)
>>> public.fingerprint == secret.fingerprint
True
"""

import hashlib
import importlib
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self, final

import numpy as np
from numpy.typing import NDArray

from dpfl_flower.secagg.digits import RING_DIMENSION, SCALE_BITS, SLOTS

__all__ = ["KeyFiles", "PublicKey", "SecretKey", "make_key"]

_MODULUS_BITS: Final = (60, 60, 60)
_FINGERPRINT_BYTES: Final = 32
_MOST_BYTES: Final = 1 << 19  # a fresh ciphertext takes 262,292


@dataclass(frozen=True)
class KeyFiles:
    """Where the two halves of a key are.

    Attributes
    ----------
    nodes : Path
        With the secret key; for the nodes' operators and nobody else.
    server : Path
        Without it.
    """

    nodes: Path
    server: Path


def make_key(directory: Path) -> KeyFiles:
    """Make a key: ``nodes.ckks`` and ``server.ckks`` in ``directory``, readable by their owner.

    Raises
    ------
    FileExistsError
        If one of them is there: keys are not overwritten.
    ImportError
        Without the extra ``ckks``.
    """
    tenseal = _tenseal()
    context = tenseal.context(
        tenseal.SCHEME_TYPE.CKKS,
        poly_modulus_degree=RING_DIMENSION,
        coeff_mod_bit_sizes=list(_MODULUS_BITS),
        n_threads=1,
    )
    context.global_scale = 2.0**SCALE_BITS
    public = _bytes_of(context, secret=False)
    files = KeyFiles(directory / "nodes.ckks", directory / "server.ckks")
    for path in (files.nodes, files.server):
        if path.exists():
            raise FileExistsError(f"{path} must not exist: a key is not overwritten")
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    _write(files.nodes, hashlib.sha256(public).digest() + _bytes_of(context, secret=True))
    _write(files.server, public)
    return files


@final
@dataclass(frozen=True)
class PublicKey:
    """What the server holds: it can add ciphertexts, and not read them.

    Attributes
    ----------
    fingerprint : bytes
        SHA-256 of the file.
    """

    fingerprint: bytes
    _context: Any = field(repr=False, compare=False)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read ``server.ckks``.

        Raises
        ------
        ValueError
            If the file is no key, or holds the secret key.
        OSError, ImportError
        """
        data = path.read_bytes()
        context = _context_from(data, path)
        if context.has_secret_key():
            raise ValueError(f"{path} holds the secret key, which the server must not have")
        return cls(hashlib.sha256(data).digest(), context)

    def zeros(self, chunks: int) -> list[Any]:
        """Return fresh ciphertexts of zero, to which others are added."""
        return [_tenseal().ckks_vector(self._context, [0.0] * SLOTS) for _ in range(chunks)]

    def read(self, data: bytes) -> Any:
        """Return the ciphertext in ``data``; ValueError where it is none of `SLOTS` slots."""
        return _read(self._context, data)


@final
@dataclass(frozen=True)
class SecretKey:
    """What every node holds.

    Attributes
    ----------
    fingerprint : bytes
        SHA-256 of the server's half.
    """

    fingerprint: bytes
    _context: Any = field(repr=False, compare=False)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read ``nodes.ckks``.

        Raises
        ------
        ValueError
            If the file is no key, lacks the secret, or can be read by others than its owner.
        OSError, ImportError
        """
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            raise ValueError(f"{path} has mode {mode:04o}, must be 0600: it reads every node's sum")
        data = path.read_bytes()
        context = _context_from(data[_FINGERPRINT_BYTES:], path)
        if not context.has_secret_key():
            raise ValueError(f"{path} holds no secret key: nodes need nodes.ckks")
        return cls(data[:_FINGERPRINT_BYTES], context)

    def encrypt(self, slots: NDArray[np.float64]) -> list[bytes]:
        """Return a ciphertext for each row of ``slots``, shape ``(chunks, SLOTS)``."""
        vector = _tenseal().ckks_vector
        return [bytes(vector(self._context, row.tolist()).serialize()) for row in slots]

    def decrypt(self, ciphertexts: Sequence[bytes]) -> NDArray[np.float64]:
        """Return what the ciphertexts hold, shape ``(len(ciphertexts), SLOTS)``.

        Raises
        ------
        ValueError
            If one is no ciphertext of `SLOTS` slots.
        """
        slots = np.empty((len(ciphertexts), SLOTS))
        for row, data in zip(slots, ciphertexts, strict=True):
            row[:] = _read(self._context, data).decrypt()
        return slots


def _tenseal() -> Any:
    try:
        return importlib.import_module("tenseal")
    except ImportError as error:
        raise ImportError("CKKS needs TenSEAL: pip install 'dpfl-flower[ckks]'") from error


def _bytes_of(context: Any, *, secret: bool) -> bytes:
    return bytes(
        context.serialize(save_secret_key=secret, save_galois_keys=False, save_relin_keys=False)
    )


def _context_from(data: bytes, path: Path) -> Any:
    try:
        context = _tenseal().context_from(data, n_threads=1)
        scale = context.global_scale
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no key of CKKS that make_key wrote") from error
    if scale != 2.0**SCALE_BITS:
        raise ValueError(f"{path}: scale={scale!r} must be 2**{SCALE_BITS}, as make_key sets it")
    return context


def _read(context: Any, data: bytes) -> Any:
    if not 0 < len(data) <= _MOST_BYTES:
        raise ValueError(f"ciphertext of {len(data)} bytes must have 1 to {_MOST_BYTES}")
    try:
        vector = _tenseal().ckks_vector_from(context, data)
        slots, parts = vector.size(), len(vector.ciphertext())
    except (RuntimeError, TypeError) as error:
        raise ValueError("the bytes are no ciphertext of this key's parameters") from error
    if (slots, parts) != (SLOTS, 1):
        raise ValueError(f"{slots} slots in {parts} ciphertexts must be {SLOTS} in one")
    return vector


def _write(path: Path, data: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with open(os.open(path, flags, 0o600), "wb") as file:  # noqa: PTH123
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
