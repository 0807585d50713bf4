"""Run the app as a user would, through ``flwr run``, and print what came of it.

``python -m apps.medical.demo`` from the repository's root, in an environment where
``dpfl-flower[apps]`` is installed. Exits 0 only if the run completed and left a result.
"""

import argparse
import re
import signal
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Final

from apps.medical.medical.patients import HOSPITALS
from apps.medical.medical.report import Report
from dpfl_flower.simulation import FlowerRunError, RunConfig, run_flower_app

APP: Final = Path(__file__).parent

_LINE: Final = re.compile(r"^(?:\(\w+ pid=\d+\) )?(?P<level>INFO|WARNING|ERROR) : +(?P<text>.+)$")
"""A line of Flower's log; Ray puts the worker's number before it."""

_PROGRESS: Final = re.compile(r"\[ROUND |Run directory: |NOT PRIVATE: ")
_CHATTER: Final = re.compile(r"Since flwr 1\.32|Manually terminating")
_REFUSAL: Final = re.compile(r"\bNodeError: (?P<text>.+)$")
"""Why a hospital refused: in the simulation the hospitals' own logs are here too."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo and return the exit code."""
    options = _parse(arguments)
    run_dir = (options.run_dir or _fresh_run_dir()).absolute()
    overrides: dict[str, str | int] = {"run-dir": str(run_dir)}
    if options.rounds is not None:
        overrides["num-server-rounds"] = options.rounds
    if options.split_seed is not None:
        overrides["split-seed"] = options.split_seed
    print(f"flwr run {APP}: {len(HOSPITALS)} simulated hospitals, log in {run_dir / 'flower.log'}")
    return run_and_report(APP, run_dir, overrides, timeout_seconds=options.timeout)


def run_and_report(
    app: Path, run_dir: Path, overrides: RunConfig, *, timeout_seconds: float
) -> int:
    """Run ``app``, print its report, and return 0 only if there is one of this run."""
    try:
        run = run_flower_app(
            app,
            num_supernodes=len(HOSPITALS),
            num_cpus=1,  # a second process takes longer to start than a hospital to train
            log_path=run_dir / "flower.log",
            run_config=overrides,
            on_line=_Progress().show,
            timeout_seconds=timeout_seconds,
        )
    except (FlowerRunError, TimeoutError) as error:
        return _failed(str(error))
    except KeyboardInterrupt:
        return _failed("interrupted; everything that was started has been stopped")
    if not run.completed:
        return _failed(f"the run {run.outcome}: {run.details}\nSee {run.log_path}")
    try:
        report = Report.load(run_dir)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return _failed(f"the run completed without a result that can be read: {error}")
    if report.run_id != run.run_id:
        return _failed(f"the result in {run_dir} is of run {report.run_id}, not {run.run_id}")
    print(f"\n{report.table()}\n\nResult, log and ledgers: {run_dir}")
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m apps.medical.demo", description=__doc__)
    parser.add_argument(
        "--run-dir",
        type=Path,
        help="where result, log and ledgers go; a directory used before has its budget spent "
        "(default: a fresh one under runs/medical)",
    )
    parser.add_argument("--rounds", type=int, help="default: the app's")
    parser.add_argument("--split-seed", type=int, help="who is held out; default: the app's")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for everything")
    return parser.parse_args(arguments)


def _fresh_run_dir() -> Path:
    return Path("runs") / "medical" / datetime.now().strftime("%Y%m%d-%H%M%S-%f")


class _Progress:
    """Prints what a user wants to see of a run's log, each thing once."""

    def __init__(self) -> None:
        self._shown: set[str] = set()

    def show(self, line: str) -> None:
        """Print the line, or nothing."""
        text = self._worth_showing(line)
        if text is not None and text not in self._shown:
            self._shown.add(text)
            print(text, flush=True)

    @staticmethod
    def _worth_showing(line: str) -> str | None:
        if refusal := _REFUSAL.search(line):
            return f"A hospital refuses: {refusal['text']}"
        found = _LINE.match(line)
        if found is None or _CHATTER.search(line):
            return None
        if found["level"] == "INFO" and not _PROGRESS.match(found["text"]):
            return None
        return found["text"]


def _failed(why: str) -> int:
    print(f"FAILED: {why}", file=sys.stderr, flush=True)
    return 1


def _as_exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _as_exit)  # so that what was started is stopped
    sys.exit(main())
