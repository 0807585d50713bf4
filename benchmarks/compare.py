"""Time rivals side by side: interleaved in one run, medians, one ratio against one bar.

A benchmark module builds its callables, hands them to :func:`compare` and ends with
:func:`report`, whose last line reads ``ratio <value> bar <value>``.
"""

import gc
import os
import platform
import signal
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_LIBRARIES = ("torch", "numpy", "flwr", "opacus", "dp-accounting")


@dataclass(frozen=True)
class Timing:
    """What one callable took.

    Attributes
    ----------
    name : str
    seconds : tuple of float
        One figure per interleaved repeat, in order.
    peak_bytes : int or None
        How far resident memory rose above its level at the start of one call, timed separately;
        None where it was not asked for or the system does not tell.
    """

    name: str
    seconds: tuple[float, ...]
    peak_bytes: int | None = None

    @property
    def median(self) -> float:
        """The median of ``seconds``."""
        return statistics.median(self.seconds)


def one_thread() -> None:
    """Hold this process, and those it starts, to one computing thread.

    Torch obeys at once. NumPy's linear algebra reads the environment when it is first imported,
    so a benchmark that multiplies matrices in NumPy also sets ``OMP_NUM_THREADS=1`` outside.
    """
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"
    torch.set_num_threads(1)


def stop_on_sigterm() -> None:
    """Let SIGTERM unwind this process, so that what it has started is stopped."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)


def compare(
    candidates: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 7,
    warmups: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    memory: bool = False,
) -> list[Timing]:
    """Call every candidate ``repeats`` times, taking turns, and time each call.

    The order rotates from repeat to repeat, so that a disturbance or a warm cache favours nobody.
    The garbage collector runs between calls, never inside one.

    Parameters
    ----------
    candidates : mapping of name to callable without arguments
    repeats : int
        Timed calls of each.
    warmups : int
        Untimed calls of each beforehand; 0 to time cold starts.
    clock : callable
        ``time.perf_counter`` (wall clock) or ``time.process_time`` (CPU of this process).
    memory : bool
        Also measure the peak resident memory of one further, untimed call of each.

    Returns
    -------
    list of Timing
        In the order of ``candidates``.
    """
    names = list(candidates)
    for _ in range(warmups):
        for name in names:
            candidates[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    try:
        for turn in range(repeats):
            start = turn % len(names)
            for name in names[start:] + names[:start]:
                gc.collect()
                gc.disable()
                began = clock()
                result = candidates[name]()
                seconds[name].append(clock() - began)
                gc.enable()
                del result
    finally:
        (gc.enable if collecting else gc.disable)()
    peaks = {name: peak_memory(candidates[name]) if memory else None for name in names}
    return [Timing(name, tuple(seconds[name]), peaks[name]) for name in names]


def peak_memory(work: Callable[[], object]) -> int | None:
    """Bytes by which resident memory rose at its highest during ``work()``; None off Linux.

    Memory that the process already held and reuses is not counted, so call it early or compare
    like with like.
    """
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)
        before = _status_bytes("VmRSS")
        work()
        return max(0, _status_bytes("VmHWM") - before)
    except OSError:
        return None


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def machine() -> str:
    """One line on the processor, the threads in use and the versions that were timed."""
    parts = [_processor(), f"{os.cpu_count()} cores, torch threads {torch.get_num_threads()}"]
    parts.append(f"python {platform.python_version()}")
    for library in _LIBRARIES:
        try:
            parts.append(f"{library} {version(library)}")
        except PackageNotFoundError:
            continue
    return "; ".join(parts)


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print aligned columns: the first to the left, the others to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for index, line in enumerate(lines):
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        print("  ".join(cells).rstrip())
        if index == 0:
            print("  ".join("-" * width for width in widths))


def report(timings: Sequence[Timing], *, ours: str, theirs: str, bar: float, title: str) -> float:
    """Print the table of ``timings`` and, last, ``ratio <ours / theirs> bar <bar>``.

    Returns
    -------
    float
        The ratio of the two medians.
    """
    by_name = {timing.name: timing for timing in timings}
    with_memory = any(timing.peak_bytes is not None for timing in timings)
    print(title)
    print(machine())
    repeats = len(timings[0].seconds)
    header = ["", f"median of {repeats} (ms)", "fastest (ms)", f"x {theirs}"]
    rows = []
    for timing in timings:
        row = [
            timing.name,
            f"{1e3 * timing.median:.2f}",
            f"{1e3 * min(timing.seconds):.2f}",
            f"{timing.median / by_name[theirs].median:.3f}",
        ]
        if with_memory:
            peak = timing.peak_bytes
            row.append("-" if peak is None else f"{peak / 2**20:.1f}")
        rows.append(row)
    print_table(header + (["peak memory (MiB)"] if with_memory else []), rows)
    ratio = by_name[ours].median / by_name[theirs].median
    print_ratio(ratio, bar=bar)
    return ratio


def print_ratio(ratio: float, *, bar: float) -> None:
    """Print the line that a benchmark ends with."""
    print(f"ratio {ratio:.3f} bar {bar:g}")
