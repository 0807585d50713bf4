"""Solved calibrations on disk, so that the same question is answered in milliseconds.

One small file per question in ``$XDG_CACHE_HOME/dpfl-flower`` (``~/.cache/dpfl-flower``), replaced
atomically. A file that is damaged, or that another version of the libraries wrote, is ignored.
``DPFL_CACHE=0`` turns the cache off.

>>> sorted(versions())
['dp-accounting', 'dpfl-flower', 'numpy', 'scipy']
"""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy
import scipy

from dpfl_flower.accounting.budget import PrivacyBudget
from dpfl_flower.accounting.events import Event, count_events

# Raised whenever the search or the accountant changes what it answers.
_ALGORITHM = 1


@cache
def versions() -> dict[str, str]:
    """Return the versions of everything an answer depends on."""
    found = {"numpy": numpy.__version__, "scipy": scipy.__version__}
    for name in ("dpfl-flower", "dp-accounting"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def enabled() -> bool:
    """Return whether the cache is on."""
    return os.environ.get("DPFL_CACHE", "1") != "0"


def directory() -> Path:
    """Return where answers are kept."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "dpfl-flower"


def remembered(
    question: Sequence[Any],
    solve: Callable[[], float],
    *,
    proof: Callable[[float], Event] | None = None,
) -> float:
    """Return the answer to ``question`` from disk, or solve it and keep the answer.

    Parameters
    ----------
    question : sequence
        Names, numbers, budgets, events, and sequences of events: all that the answer depends on.
    solve : callable
        Returns the answer, a finite number.
    proof : callable, optional
        Returns the event an answer is true of. It is stored, and an answer whose event has become
        another is not used.
    """
    if not enabled():
        return solve()
    key = json.dumps([_ALGORITHM, versions(), [_plain(part) for part in question]], sort_keys=True)
    path = directory() / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
    answer = _read(path, key, proof)
    if answer is None:
        answer = solve()
        _write(path, key, answer, None if proof is None else proof(answer).to_json())
    return answer


def _plain(part: Any) -> Any:
    """Return ``part`` as JSON-able data that is equal for equal questions."""
    if isinstance(part, PrivacyBudget):
        return [part.epsilon, part.delta, part.relation.value]
    if isinstance(part, Event):
        return part.to_json()
    if isinstance(part, (list, tuple)):
        counts = count_events(part)
        return sorted([json.dumps(e.to_json(), sort_keys=True), n] for e, n in counts.items())
    return part


def _checksum(content: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read(path: Path, key: str, proof: Callable[[float], Event] | None) -> float | None:
    """Return the answer that ``path`` holds for ``key``, None if it holds none that can be used."""
    try:
        found = json.loads(path.read_text())
        answer, event = float(found["answer"]), found["event"]
        intact = found["checksum"] == _checksum([key, found["answer"], event])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not (intact and math.isfinite(answer)):
        return None
    if proof is not None and proof(answer).to_json() != event:
        return None
    return answer


def _write(path: Path, key: str, answer: float, event: dict[str, Any] | None) -> None:
    """Keep an answer; a disk that cannot take it only costs time."""
    content = {"answer": answer, "event": event, "checksum": _checksum([key, answer, event])}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(descriptor, "w") as file:
                json.dump(content, file)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError:
        return
