"""A number and a word that belong to one record, and every place where they might turn up."""

import logging
import pickle
import struct
from pathlib import Path

import pytest
from flwr.app import Message

from tests.support.node import all_bytes

WORD = "patient-zq7"
NUMBER = 8675309.25  # exact in float32 and float64
COUNT = 8675309


def needles() -> dict[str, bytes]:
    """Return the bytes that would give the record away, by what they are."""
    found = {"the word": WORD.encode(), "the count in text": str(COUNT).encode()}
    for order, name in (("<", "little"), (">", "big")):
        found[f"the number as {name}-endian float64"] = struct.pack(f"{order}d", NUMBER)
        found[f"the number as {name}-endian float32"] = struct.pack(f"{order}f", NUMBER)
        found[f"the count as {name}-endian int64"] = struct.pack(f"{order}q", COUNT)
        found[f"the count as {name}-endian float64"] = struct.pack(f"{order}d", COUNT)
    found["the count as a varint"] = _varint(COUNT)
    found["the count as a signed varint"] = _varint(2 * COUNT)
    return found


def _varint(number: int) -> bytes:
    """Return ``number`` as protobuf writes it."""
    parts = []
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes([*parts, number])


def require_absent(data: bytes | str, where: str) -> None:
    """Require that ``data`` holds no trace of the record."""
    haystack = data.encode() if isinstance(data, str) else data
    for what, needle in needles().items():
        at = haystack.find(needle)
        assert at < 0, f"{what} is in {where}: ...{haystack[max(0, at - 60) : at + 60]!r}..."


def require_absent_from_messages(messages: list[Message], where: str) -> None:
    """Require that no message holds a trace, in its bytes, its metadata or its error."""
    for message in messages:
        require_absent(repr(message.metadata), f"the metadata of {where}")
        if message.has_error():
            require_absent(f"{message.error.code} {message.error.reason}", f"the error of {where}")
        else:
            require_absent(all_bytes(message.content), where)


def require_absent_from_directory(directory: Path) -> None:
    """Require that no file below ``directory`` holds a trace, in its name or its bytes."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    for path in files:
        require_absent(str(path.relative_to(directory)), "the name of a file")
        require_absent(path.read_bytes(), f"the file {path.name}")


def require_absent_from_logs(
    caplog: pytest.LogCaptureFixture, *, but_for: tuple[str, ...] = ()
) -> None:
    """Require that no logger but those ``but_for`` (a node's own) said anything of the record."""
    formatter = logging.Formatter("%(message)s")
    for record in caplog.records:
        if record.name not in but_for:
            where = f"the log of {record.name}"
            require_absent(f"{formatter.format(record)} {record.args!r}", where)


def require_absent_from_object(thing: object, where: str) -> None:
    """Require that neither the text nor the pickled contents of ``thing`` hold a trace."""
    require_absent(f"{thing!r} {thing}", f"the text of {where}")
    require_absent(pickle.dumps(thing), where)
