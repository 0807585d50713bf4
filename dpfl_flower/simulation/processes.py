"""Find and stop what a command left running, by process id and never by name.

Flower's SuperLink detaches itself and its children, and Ray's daemons outlive a parent that was
killed. Every process started for one run inherits a mark in its environment; whoever carries the
mark, or descends from one who does, belongs to the run.

>>> marked_processes(new_mark())
set()
"""

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Final

__all__ = ["MARK", "marked_processes", "new_mark", "stop_marked"]

MARK: Final = "DPFL_FLOWER_RUN"
"""The environment variable that tells which run a process belongs to."""

_PROC: Final = Path("/proc")
_POLL_SECONDS: Final = 0.1


def new_mark() -> str:
    """Return a value for :data:`MARK` that no other run has."""
    return uuid.uuid4().hex


def marked_processes(mark: str, *, roots: tuple[int, ...] = ()) -> set[int]:
    """Return the ids of the living processes that belong to the run ``mark``.

    Parameters
    ----------
    mark
        The value of :data:`MARK` in the run's processes.
    roots
        Processes known to belong to the run. Where the environment of a process cannot be read
        (no ``/proc``), they and their descendants are all that is found.
    """
    parents, marked = (
        _table_from_proc(mark) if (_PROC / "self" / "stat").exists() else _table_from_ps()
    )
    found = marked | (set(roots) & parents.keys())
    # Ray overwrites the environment block of its workers with a title: follow the parents too.
    while grown := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= grown
    return found - {os.getpid()}


def stop_marked(mark: str, *, roots: tuple[int, ...] = (), grace_seconds: float = 10.0) -> None:
    """Ask the run's processes to end, wait, and kill those that did not.

    Raises
    ------
    RuntimeError
        A process survived ``SIGKILL`` for ``grace_seconds``.
    """
    for number in (signal.SIGTERM, signal.SIGKILL):
        known: set[int] = set()
        deadline = time.monotonic() + grace_seconds
        while alive := marked_processes(mark, roots=tuple({*roots, *known})):
            for pid in alive - known:
                _signal(pid, number)
            known |= alive
            if time.monotonic() > deadline:
                break
            time.sleep(_POLL_SECONDS)
        else:
            return
    raise RuntimeError(f"processes {sorted(alive)} survived SIGKILL")


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _table_from_proc(mark: str) -> tuple[Mapping[int, int], set[int]]:
    """Return each living process's parent, and who carries the mark, from Linux's /proc."""
    wanted = f"{MARK}={mark}".encode()
    parents: dict[int, int] = {}
    marked: set[int] = set()
    for folder in _PROC.iterdir():
        if not folder.name.isdigit():
            continue
        try:
            # proc(5): the name, in parentheses, may hold spaces; then the state, then the parent.
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            environment = (folder / "environ").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        except PermissionError:
            environment = b""
        if state == "Z":
            continue
        parents[int(folder.name)] = int(parent)
        if wanted in environment.split(b"\0"):
            marked.add(int(folder.name))
    return parents, marked


def _table_from_ps() -> tuple[Mapping[int, int], set[int]]:
    """Return each living process's parent from POSIX's ps, which does not tell marks."""
    listing = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid=,stat="], capture_output=True, text=True, check=True
    ).stdout
    rows = [line.split() for line in listing.splitlines()]
    return {int(pid): int(parent) for pid, parent, state in rows if state[0] != "Z"}, set()
