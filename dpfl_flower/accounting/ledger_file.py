"""The file under a ledger: lines that are only ever appended, and a sidecar that counts them.

Each line is a JSON object whose ``prev`` is the SHA-256 of all the bytes before it. A line that a
crash cut short has no newline; it is closed with a mark and stays, and what it may have been is the
ledger's business. ``PATH.head`` holds the length and hash that were last confirmed, so that a file
that lost its end is refused.

>>> chain = Chain()
>>> _ = chain.extend(chain.line({"kind": "header"}))
>>> chain.position.length, chain.extends(LedgerPosition(0, "an older head"))
(92, False)
"""

import fcntl
import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from dpfl_flower.accounting.errors import LedgerError, LedgerLocked, LedgerTampered

# Ends a line that a crash cut short. No JSON object ends in it.
TORN_MARK = b"#torn\n"
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class LedgerPosition:
    """How long a ledger is, in bytes, and the SHA-256 of all of them."""

    length: int
    head: str


@dataclass(frozen=True)
class Entry:
    """One line: its record, or None where a crash cut it short."""

    record: dict[str, Any] | None


class Chain:
    """The verified lines of a ledger, in memory."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self._length = 0
        self._hash = hashlib.sha256()
        self._heads = {0: self._hash.hexdigest()}

    @property
    def position(self) -> LedgerPosition:
        """Where the chain ends."""
        return LedgerPosition(self._length, self._heads[self._length])

    def extends(self, position: LedgerPosition) -> bool:
        """Return whether ``position`` is one this chain has been at."""
        head = self._heads.get(position.length)
        return head is not None and head == position.head

    def line(self, record: dict[str, Any]) -> bytes:
        """Return the bytes of the next line."""
        full = {**record, "prev": self.position.head}
        return json.dumps(full, separators=(",", ":")).encode() + b"\n"

    def extend(self, line: bytes) -> Entry:
        """Verify one whole line against the chain and take it in."""
        if line.endswith(TORN_MARK):
            entry = Entry(None)
        else:
            try:
                record = json.loads(line)
            except ValueError as error:
                raise LedgerTampered(f"is not JSON ({error})") from None
            if not isinstance(record, dict) or record.get("prev") != self.position.head:
                raise LedgerTampered("does not follow from the lines before it")
            if line != self.line({k: v for k, v in record.items() if k != "prev"}):
                raise LedgerTampered("is not as it was written")
            entry = Entry(record)
        self.entries.append(entry)
        self._hash.update(line)
        self._length += len(line)
        self._heads[self._length] = self._hash.hexdigest()
        return entry

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Return the chain of all whole lines in ``data``.

        Raises
        ------
        LedgerTampered
            If a whole line does not parse or does not follow from those before it.
        """
        chain = cls()
        *lines, _ = data.split(b"\n")
        for number, line in enumerate(lines, start=1):
            try:
                chain.extend(line + b"\n")
            except LedgerTampered as error:
                raise LedgerTampered(f"was edited: line {number} {error}") from None
        return chain


class LedgerFile:
    """An exclusively locked append-only file with its sidecar."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor
        self._process = os.getpid()
        self._length = os.fstat(descriptor).st_size
        self._broken = False

    @classmethod
    def lock(cls, path: Path, *, wait_seconds: float = 0.0) -> Self:
        """Open ``path``, creating it with mode 0600, and lock it against everyone else.

        Raises
        ------
        LedgerLocked
            If it is still locked after ``wait_seconds``.
        """
        _make_directory(path.parent)
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            _flock(descriptor, path, wait_seconds)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(path, descriptor)

    @property
    def sidecar(self) -> Path:
        """The file that remembers the confirmed length and hash."""
        return self.path.with_name(self.path.name + ".head")

    def read(self) -> bytes:
        """Return all bytes of the file."""
        parts = []
        offset = 0
        while part := os.pread(self._descriptor, 1 << 20, offset):
            parts.append(part)
            offset += len(part)
        return b"".join(parts)

    def confirmed(self) -> LedgerPosition | None:
        """Return what the sidecar remembers, None where there is no sidecar."""
        try:
            content = self.sidecar.read_bytes()
        except FileNotFoundError:
            return None
        try:
            found = json.loads(content)
            return LedgerPosition(length=int(found["length"]), head=str(found["head"]))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise LedgerTampered(
                f"{self.sidecar} is not a ledger's sidecar but {content[:80]!r}: put it back"
            ) from None

    def without_head(self, name: str) -> LedgerTampered:
        """Return the error for a ledger of this name whose sidecar is missing."""
        return LedgerTampered(
            f"{name} has no sidecar {self.sidecar}, so nothing says that its end "
            "is still there. Put the sidecar back; or, if you know that the ledger is "
            "complete, open it once with accept_missing_head=True"
        )

    def append(self, line: bytes) -> None:
        """Write and fsync ``line``; once this fails, nothing more until the file is reopened."""
        self._check()
        self._broken = True
        written = 0
        while written < len(line):
            written += os.write(self._descriptor, line[written:])
        os.fsync(self._descriptor)
        self._length += len(line)
        self._broken = False

    def truncate(self) -> None:
        """Empty a file in which not even the first line is whole."""
        self._check()
        os.ftruncate(self._descriptor, 0)
        os.fsync(self._descriptor)
        self._length = 0

    def confirm(self, position: LedgerPosition) -> None:
        """Replace the sidecar atomically, and fsync it and its directory."""
        self._broken = True
        content = json.dumps({"length": position.length, "head": position.head}).encode() + b"\n"
        temporary = self.sidecar.with_name(self.sidecar.name + ".tmp")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        descriptor = os.open(temporary, flags, 0o600)
        try:
            os.write(descriptor, content)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.replace(self.sidecar)
        _fsync_directory(self.path.parent)
        self._broken = False

    def close(self) -> None:
        """Release the lock."""
        if self._descriptor >= 0:
            if os.getpid() == self._process:  # a forked child shares the lock, and must not drop it
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            os.close(self._descriptor)
            self._descriptor = -1

    def _check(self) -> None:
        """Refuse to write unless the file is still the one that was read."""
        if self._descriptor < 0:
            raise LedgerError(f"ledger {self.path} is closed")
        if os.getpid() != self._process:
            raise LedgerError(f"ledger {self.path} was opened by process {self._process}")
        if self._broken:
            raise LedgerError(f"ledger {self.path} failed to write a line: open it again")
        here = os.fstat(self._descriptor)
        try:
            there = self.path.stat()
        except FileNotFoundError:
            raise LedgerTampered(f"ledger {self.path} was removed while it was open") from None
        if (here.st_dev, here.st_ino) != (there.st_dev, there.st_ino):
            raise LedgerTampered(f"ledger {self.path} was replaced while it was open")
        if here.st_size != self._length:
            raise LedgerTampered(
                f"ledger {self.path} has {here.st_size} bytes, it was left with {self._length}"
            )


def _flock(descriptor: int, path: Path, wait_seconds: float) -> None:
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise LedgerLocked(
                    f"ledger {path} is open elsewhere: one writer at a time, or a budget is spent "
                    "twice"
                ) from None
            time.sleep(_POLL_SECONDS)
        else:
            return


def _make_directory(directory: Path) -> None:
    """Create a directory so that a power failure does not take it, and the ledger, away again."""
    if not directory.is_dir():
        _make_directory(directory.parent)
        directory.mkdir(exist_ok=True)
        _fsync_directory(directory.parent)


def _fsync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
