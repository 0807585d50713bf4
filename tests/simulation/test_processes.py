"""What a command left running is found by its mark and stopped, whatever it does."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpfl_flower.simulation import processes
from dpfl_flower.simulation.processes import MARK, marked_processes, new_mark, stop_marked

IGNORES_SIGTERM = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
FORKS_AND_LEAVES = """
import os, time
if os.fork() == 0:
    os.setsid()
    time.sleep(600)
print("ready", flush=True)
"""


@pytest.fixture
def mark() -> Iterator[str]:
    value = new_mark()
    yield value
    stop_marked(value)


def start(mark: str, code: str) -> subprocess.Popen[str]:
    """Start marked Python code and wait for the line it prints."""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, MARK: mark},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.stdout.close()
    return process


def test_an_orphan_in_a_session_of_its_own_is_found_and_stopped(mark: str) -> None:
    start(mark, FORKS_AND_LEAVES).wait()
    (orphan,) = marked_processes(mark)
    stop_marked(mark)
    assert marked_processes(mark) == set()
    stat = Path(f"/proc/{orphan}/stat")
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_process_that_ignores_the_request_is_killed(mark: str) -> None:
    process = start(mark, IGNORES_SIGTERM + "print('ready', flush=True); time.sleep(600)")
    stop_marked(mark, grace_seconds=0.3)
    assert process.wait(timeout=10) == -9


def test_a_child_that_dropped_the_mark_is_found_through_its_parent(mark: str) -> None:
    code = (
        "import subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], env={})\n"
        "print('ready', flush=True); time.sleep(600)"
    )
    process = start(mark, code)
    assert len(marked_processes(mark)) == 2
    stop_marked(mark)
    process.wait(timeout=10)


def test_without_proc_the_descendants_of_the_roots_are_found(
    mark: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code = "import os, time\nprint('ready', flush=True)\nos.fork()\ntime.sleep(600)"
    process = start(mark, code)
    deadline = time.monotonic() + 30
    while len(marked_processes(mark)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    both = marked_processes(mark)
    monkeypatch.setattr(processes, "_PROC", tmp_path)
    assert marked_processes(mark, roots=(process.pid,)) == both
    stop_marked(mark, roots=(process.pid,))
    process.wait(timeout=10)


def test_other_processes_are_left_alone(mark: str) -> None:
    other = new_mark()
    bystander = start(other, "import time; print('ready', flush=True); time.sleep(600)")
    start(mark, FORKS_AND_LEAVES).wait()
    stop_marked(mark)
    assert bystander.poll() is None
    stop_marked(other)
    bystander.wait(timeout=10)
