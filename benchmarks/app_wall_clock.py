"""The medical app from start to end: ``dpfl run`` against ``flwr run``, wall clock, taking turns.

``python -m benchmarks.app_wall_clock`` (bar 0.25). Both are timed as a user waits for them, from
the command to its last line, a fresh process each time. Flower's SuperLink is up before its clock
starts: a second ``flwr run`` finds it there, too. Every run has a fresh run directory and so a
fresh budget; both engines run the same folder, rounds and hospitals.
"""

import argparse
import subprocess
import sys
import tempfile
from itertools import count
from pathlib import Path

from benchmarks import compare, results
from dpfl_flower.simulation.flower_run import simulation_superlink
from dpfl_flower.simulation.flwr_command import Deadline, FlwrCommand, to_toml

BAR = 0.25
OURS, THEIRS = "dpfl run", "flwr run"
ROOT = Path(__file__).parents[1]
APP = ROOT / "apps" / "medical"
HOSPITALS = 4
_TIMEOUT_SECONDS = 3600.0


class Runs:
    """Runs the app on either engine, each time in a run directory of its own."""

    def __init__(self, scratch: Path, flwr: FlwrCommand, rounds: int) -> None:
        self._scratch, self._flwr, self._rounds = scratch, flwr, rounds
        self._number = count()

    def ours(self) -> None:
        """``dpfl run`` in this process's place: a new one."""
        directory = self._directory()
        subprocess.run(
            [
                *(sys.executable, "-m", "dpfl_flower.cli", "run", str(APP)),
                *("--num-supernodes", str(HOSPITALS), "--run-dir", str(directory)),
                *("--run-config", f"num-server-rounds={self._rounds}"),
            ],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=True,
        )
        require_result(directory)

    def theirs(self) -> None:
        """``flwr run``, its log streamed until the run has ended."""
        directory = self._directory()
        directory.mkdir()
        config = directory / "run-config.toml"
        overrides = {"run-dir": str(directory), "num-server-rounds": self._rounds}
        config.write_text(to_toml(overrides), encoding="utf-8")
        run = self._flwr.run(
            APP,
            config_file=config,
            federation_config=f"num-supernodes={HOSPITALS} client-resources-num-cpus=1",
            log_path=directory / "run.log",
        )
        if not run.completed:
            raise RuntimeError(f"flwr run {run.outcome}: {run.details}")
        require_result(directory)

    def _directory(self) -> Path:
        return self._scratch / f"run-{next(self._number)}"


def require_result(directory: Path) -> None:
    """Raise where a run left no report: its time would be nobody's."""
    if not (directory / "result.json").is_file():
        raise RuntimeError(f"{directory} holds no result.json")


def main() -> None:
    """Print the table and the ratio, and write both down."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.app_wall_clock")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each (default: 5)")
    parser.add_argument("--rounds", type=int, default=30, help="of each run (default: the app's)")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="dpfl-bench-") as scratch,
        simulation_superlink(Deadline(_TIMEOUT_SECONDS)) as flwr,
    ):
        runs = Runs(Path(scratch), flwr, arguments.rounds)
        timings = compare.compare(
            {OURS: runs.ours, THEIRS: runs.theirs}, repeats=arguments.repeats, warmups=1
        )
    ratio = compare.report(
        timings,
        ours=OURS,
        theirs=THEIRS,
        bar=BAR,
        title=f"apps/medical from start to end, {arguments.rounds} rounds, wall clock",
    )
    results.save(
        "app_wall_clock",
        {
            "ratio": ratio,
            "bar": BAR,
            "rounds": arguments.rounds,
            "seconds": {timing.name: list(timing.seconds) for timing in timings},
        },
    )


if __name__ == "__main__":
    compare.stop_on_sigterm()
    main()
