"""Large bytes on their way to worker processes: written once for all, into memory that they share.

A round's messages hold the same global arrays. Pickled one by one, they would be copied through a
pipe for every node; here they are written once into an anonymous file in memory, and each message
says where they lie. The file has no name, so nothing stays behind, however the processes end.

>>> memory = SharedMemory()
>>> shipment = memory.ship([{"a": b"x" * 100_000}, {"a": b"y"}])
>>> reader = Reader(memory.fileno())
>>> [len(reader.read(shipment.number, shipment.start, one)["a"]) for one in shipment.pickles]
[100000, 1]
>>> memory.close()
"""

import io
import os
import pickle
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, final

__all__ = ["Reader", "SharedMemory", "Shipment"]

_LEAST_BYTES: Final = 1 << 16
"""Smaller bytes travel with the message."""


@dataclass(eq=False)
class Shipment:
    """Objects of which the large bytes lie in shared memory.

    Attributes
    ----------
    number : int
        Tells shipments apart.
    start, size : int
        Where in the file its bytes lie.
    pickles : list of bytes
        One for each object.
    in_use : int
        How many of its objects are still to be read; at 0 the memory may be used again.
    """

    number: int
    start: int
    size: int
    pickles: list[bytes]
    in_use: int

    def done_with_one(self) -> None:
        """Say that one of its objects has been read, or never will be."""
        self.in_use -= 1


@final
class SharedMemory:
    """The writing side."""

    def __init__(self) -> None:
        self._file = _anonymous_file()
        self._shipments: list[Shipment] = []
        self._count = 0

    def fileno(self) -> int:
        """Return the file's descriptor, for processes to inherit."""
        return self._file.fileno()

    def close(self) -> None:
        """Let go of the memory; it is free when the readers have, too."""
        self._file.close()

    def ship(self, objects: Sequence[object]) -> Shipment:
        """Write the objects' large bytes, each once, and return where they are."""
        writer = _Writer()
        pickles = [writer.pickled(one) for one in objects]
        self._count += 1
        start = self._place(writer.size)
        for blob, offset in writer.blobs:
            _write(self.fileno(), blob, start + offset)
        shipment = Shipment(self._count, start, writer.size, pickles, in_use=len(pickles))
        self._shipments.append(shipment)
        return shipment

    def _place(self, size: int) -> int:
        """Return where ``size`` bytes are free: before, between or behind shipments in use."""
        self._shipments = sorted(
            (one for one in self._shipments if one.in_use), key=lambda one: one.start
        )
        start = 0
        for one in self._shipments:
            if one.start - start >= size:
                break
            start = max(start, one.start + one.size)
        return start


@final
class Reader:
    """The reading side, in another process that has inherited the descriptor."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._shipment = 0
        self._seen: dict[int, bytes] = {}

    def read(self, number: int, start: int, pickled: bytes) -> Any:
        """Return an object of the shipment; bytes that its objects share are read once."""
        if number != self._shipment:
            self._shipment, self._seen = number, {}

        class Unpickler(pickle.Unpickler):
            def persistent_load(_, place: tuple[int, int]) -> bytes:  # noqa: N805
                offset, size = place
                if offset not in self._seen:
                    self._seen[offset] = _read(self._descriptor, size, start + offset)
                return self._seen[offset]

        # From the process that started this one.
        return Unpickler(io.BytesIO(pickled)).load()


@final
class _Writer:
    """Pickles objects and takes their large bytes out, each once."""

    def __init__(self) -> None:
        self.blobs: list[tuple[bytes, int]] = []
        self.size = 0
        self._offsets: dict[int, int] = {}  # by identity; blobs keeps them alive

    def pickled(self, one: object) -> bytes:
        buffer = io.BytesIO()
        pickler = _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL)
        pickler.writer = self
        pickler.dump(one)
        return buffer.getvalue()

    def place(self, blob: bytes) -> tuple[int, int]:
        if id(blob) not in self._offsets:
            self._offsets[id(blob)] = self.size
            self.blobs.append((blob, self.size))
            self.size += len(blob)
        return self._offsets[id(blob)], len(blob)


class _Pickler(pickle.Pickler):
    writer: _Writer

    def persistent_id(self, one: object) -> tuple[int, int] | None:
        if type(one) is bytes and len(one) >= _LEAST_BYTES:
            return self.writer.place(one)
        return None


def _anonymous_file() -> io.FileIO:
    if hasattr(os, "memfd_create"):
        return io.FileIO(os.memfd_create("dpfl"), "r+")
    with tempfile.TemporaryFile() as named_nowhere:
        return io.FileIO(os.dup(named_nowhere.fileno()), "r+")


def _write(descriptor: int, blob: bytes, offset: int) -> None:
    rest = memoryview(blob)
    while rest:
        written = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[written:], offset + written


def _read(descriptor: int, size: int, offset: int) -> bytes:
    parts = []
    while size:
        part = os.pread(descriptor, size, offset)
        if not part:
            raise EOFError(f"{size} bytes are missing at {offset}")
        parts.append(part)
        size, offset = size - len(part), offset + len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
