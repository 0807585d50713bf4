"""The one door for the randomness that protects people: coins, noise, masks, keys.

Torch, NumPy and Python's ``random`` follow a seed, so their noise can be reproduced and
subtracted; nothing that protects people may come from them. What comes from here is the keystream
of AES-256 in counter mode, keyed by the operating system.

>>> rng = secure()
>>> rng.protects
True
>>> len(rng.sample(range(1000), 10))
10
>>> SeededRandom(7).below(100) == SeededRandom(7).below(100)
True
"""

import hashlib
import math
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from typing import Final, TypeVar, final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from numpy.typing import NDArray

from dpfl_flower import checks
from dpfl_flower.lazily import lazily

special = lazily("scipy.special")

T = TypeVar("T")

_BLOCK_WORDS: Final = 8192  # 64 KiB: a block, and what is computed from it, stays in cache
_ZEROS: Final = bytes(8 * _BLOCK_WORDS)
# A distinguisher's advantage against b blocks under one key is about b^2 / 2^129 (the keystream
# never repeats a block): 2^22 blocks, 64 MiB, keep it below 2^-84.
_BYTES_PER_KEY: Final = 1 << 26


class RandomSource(ABC):
    """Random bytes and the few draws that privacy needs, all made from those bytes.

    Subclasses supply ``random_bytes`` and say with ``protects`` whether anybody could know them.
    Every draw is exact given uniform bytes, except :meth:`gaussian`.
    """

    @property
    @abstractmethod
    def protects(self) -> bool:
        """Whether nobody can predict the bytes: only then may a run report an epsilon."""

    @abstractmethod
    def random_bytes(self, n: int) -> bytes:
        """Return ``n`` independent, uniform bytes."""

    @final
    def uint64(self, n: int) -> NDArray[np.uint64]:
        """Return ``n`` independent integers, uniform on [0, 2^64)."""
        checks.non_negative_int(n=n)
        words = np.empty(n, dtype=np.uint64)
        for start in range(0, n, _BLOCK_WORDS):
            block = words[start : start + _BLOCK_WORDS]
            block[:] = np.frombuffer(self.random_bytes(8 * block.size), dtype="<u8")
        return words

    @final
    def below(self, bound: int) -> int:
        """Return an integer uniform on [0, bound), by rejection: no bias, any size of bound."""
        checks.positive_int(bound=bound)
        bits = (int(bound) - 1).bit_length()
        size = (bits + 7) // 8
        while True:
            draw = int.from_bytes(self.random_bytes(size), "little") >> (8 * size - bits)
            if draw < bound:
                return draw

    @final
    def coins(self, probability: float, n: int) -> NDArray[np.bool_]:
        """Return ``n`` independent coins, each True with the stated probability.

        The probability that holds is ``floor(probability * 2^64) / 2^64``: never above the one
        stated, equal to it at 0, at 1 and wherever 64 binary digits suffice, else below it by
        less than 2^-64.

        Raises
        ------
        ValueError
            If ``probability`` is not in [0, 1].
        """
        checks.non_negative(probability=probability)
        checks.at_most(1, probability=probability)
        threshold = math.floor(math.ldexp(float(probability), 64))  # both steps are exact
        words = self.uint64(n)
        if threshold == 1 << 64:
            return np.ones(n, dtype=np.bool_)
        return words < np.uint64(threshold)

    @final
    def sample(self, population: Sequence[T], k: int) -> list[T]:
        """Return ``k`` distinct positions' items: every ordered choice is equally likely.

        ``sample(items, len(items))`` shuffles. The first ``j`` of the ``k`` are a uniform sample
        of size ``j``. Time and memory are O(k). Fisher and Yates' shuffle, stopped after k steps.

        Raises
        ------
        ValueError
            If ``k`` is not in [0, len(population)].
        """
        checks.non_negative_int(k=k)
        size = len(population)
        if k > size:
            raise ValueError(f"k={k!r} must be <= {size!r}, the size of the population")
        bounds = np.arange(size, size - k, -1, dtype=np.uint64)
        words = self.uint64(k)
        offsets = words % bounds
        # Words under 2^64 mod bound would favour small offsets: those are drawn again.
        for biased in np.flatnonzero(words < (np.uint64(0) - bounds) % bounds):
            offsets[biased] = self.below(int(bounds[biased]))
        moved: dict[int, int] = {}
        chosen = []
        for step, offset in enumerate(offsets.tolist()):
            pick = step + offset
            chosen.append(population[moved.get(pick, pick)])
            moved[pick] = moved.get(step, step)
        return chosen

    @final
    def gaussian(self, n: int) -> NDArray[np.float64]:
        """Return ``n`` standard normal draws in *floating point*, by the inverse of the CDF.

        Each is ``Phi^-1`` of one of 2^53 equally likely points, symmetric about 1/2, the largest
        8.29. Floating-point draws leave traces in their low bits (Mironov, "On significance of
        the least significant bits for differential privacy", CCS 2012), so no sum may leave with
        the low bits of a draw in it: DP-SGD rounds its noisy sums to a grid of 2^-14 standard
        deviations. Whatever can be an integer sum takes integers from :mod:`dpfl_flower.noise`.
        """
        checks.non_negative_int(n=n)
        draws = np.empty(n, dtype=np.float64)
        for start in range(0, n, _BLOCK_WORDS):
            # Not by torch: its threads (MKL's too, from 2,048 numbers on) hang after a fork.
            block = draws[start : start + _BLOCK_WORDS]
            signed = (self.uint64(block.size).view(np.int64) >> 11) + 0.5  # within +-2^52
            signed *= 2.0**-53
            np.subtract(0.5, np.abs(signed), out=block)  # exact, as are the steps before
            special.ndtri(block, out=block)
            np.copysign(block, signed, out=block)
        return draws


class _Keystream:
    """The keystream of AES-256-CTR under one key, handed out in order to any thread."""

    def __init__(self, key: bytes) -> None:
        # Each key is used for one stream only, so the counter may start at zero.
        self._encryptor = Cipher(AES256(key), CTR(bytes(16))).encryptor()
        self._lock = threading.RLock()  # a signal handler may draw while its thread does
        self.taken = 0
        self.birthplace = _birthplace()

    def take(self, n: int) -> bytes:
        """Return the next ``n`` bytes, at most 64 KiB."""
        with self._lock:
            self.taken += n
            return self._encryptor.update(_ZEROS[:n])


def _in_blocks(take: Callable[[int], bytes], n: int) -> bytes:
    checks.non_negative_int(n=n)
    if n <= len(_ZEROS):
        return take(n)
    sizes = (min(len(_ZEROS), n - start) for start in range(0, n, len(_ZEROS)))
    return b"".join(map(take, sizes))


_forks = 0


def _count_fork() -> None:
    global _forks  # noqa: PLW0603  (one counter per process is the point)
    _forks += 1


os.register_at_fork(after_in_child=_count_fork)


def _birthplace() -> tuple[int, int]:
    """Tell processes apart: by id, where Python was not told of a fork, and by counted forks,
    where an id came round again.
    """  # noqa: D205
    return os.getpid(), _forks


@final
class SecureRandom(RandomSource):
    """AES-256-CTR keyed from ``os.urandom``; one object may be shared by all threads.

    A new key is drawn in every forked child before its first byte, so that parent and child never
    share a stream, and after every 64 MiB.
    """

    def __init__(self) -> None:
        self._keystream = _Keystream(os.urandom(32))

    @property
    def protects(self) -> bool:
        """Always True."""
        return True

    def random_bytes(self, n: int) -> bytes:
        """Return ``n`` independent, uniform bytes that nobody can predict."""
        return _in_blocks(self._take, n)

    def _take(self, n: int) -> bytes:
        keystream = self._keystream
        if keystream.taken >= _BYTES_PER_KEY or keystream.birthplace != _birthplace():
            # Replaced whole, never locked: another thread may have held the lock at the fork.
            # Threads that arrive together may each put one in place; every one is fresh.
            keystream = self._keystream = _Keystream(os.urandom(32))
        return keystream.take(n)

    def __reduce__(self) -> tuple[type["SecureRandom"], tuple[()]]:
        """Pickle as a new generator: a key never travels."""
        return SecureRandom, ()


@final
class SeededRandom(RandomSource):
    """The same generator keyed by a seed: reproducible, so it protects nobody.

    For tests and reproductions. A run whose noise came from here reports no epsilon. A forked
    child repeats its parent's stream.

    Parameters
    ----------
    seed : int
        At least 0, any size.
    """

    def __init__(self, seed: int) -> None:
        checks.non_negative_int(seed=seed)
        self._keystream = _Keystream(hashlib.sha256(f"dpfl-flower seed {seed:d}".encode()).digest())

    @property
    def protects(self) -> bool:
        """Always False."""
        return False

    def random_bytes(self, n: int) -> bytes:
        """Return the next ``n`` bytes of the stream that the seed fixes."""
        return _in_blocks(self._keystream.take, n)


@cache
def secure() -> SecureRandom:
    """Return the process-wide :class:`SecureRandom`."""
    return SecureRandom()
