"""Run functions in forks of a process that has imported everything once.

Starting Python with torch and Flower takes seconds, a fork milliseconds. The server that forks has
drawn nothing random: what its forks share is only what a program's workers would.
"""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.support.preloaded"])
_ROOT = Path(__file__).resolve().parents[2]


def run_forked(function: Callable[..., object], *arguments: Any, timeout: float = 120.0) -> int:
    """Call ``function(*arguments)`` in a fork; return its exit code, -9 where it was killed.

    The function is named, not sent: it must be importable.

    Raises
    ------
    AssertionError
        If it raised (with its traceback), or did not end in time.
    """
    with tempfile.NamedTemporaryFile("w+", suffix=".txt") as report:
        process = _CONTEXT.Process(target=_call, args=(report.name, function, arguments))
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_ROOT), before]))
        try:
            process.start()
        finally:
            if before is None:
                del os.environ["PYTHONPATH"]
            else:
                os.environ["PYTHONPATH"] = before
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise AssertionError(f"{function.__qualname__} did not end in {timeout} s")
        code = process.exitcode
        process.close()
        if code > 0:
            raise AssertionError(report.read())
        return code


def fork_and_wait(function: Callable[..., object], *arguments: Any) -> int:
    """Call ``function(*arguments)`` in a plain fork of this process, itself a fork of the server.

    Returns
    -------
    int
        0 when it returned, -9 when it was killed.

    Raises
    ------
    AssertionError
        If it raised, with its traceback.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            function(*arguments)
        except BaseException:
            os.write(writing, traceback.format_exc()[-60_000:].encode())
            os._exit(1)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        report = pipe.read().decode()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code > 0:
        raise AssertionError(report)
    return code


def _call(report: str, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    try:
        function(*arguments)
    except BaseException:
        Path(report).write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)
