"""A round of 100 clients with a million parameters who train nothing: what the framework takes.

``python -m benchmarks.flower_round``. Ours in this process (a node for each client), ours under
``flwr run`` with the clients as users inside two nodes, and Flower's own server-side
fixed-clipping wrapper around FedAvg under ``flwr run``. The same app folder, noise and clip norm;
all engines may use both cores. Timed inside the ServerApp, from the end of a round to the end of
the next; each run's first round, in which workers start, is left out. The runs take turns.
"""

import argparse
import json
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks import compare, results
from dpfl_flower.simulation import run_app
from dpfl_flower.simulation.flower_run import simulation_superlink
from dpfl_flower.simulation.flwr_command import Deadline, FlwrCommand, to_toml

APP = Path(__file__).parent / "flower_round_app"
CLIENTS, NODES = 100, 2
IN_PROCESS, USERS, FLOWER = "dpfl-flower, in-process", "dpfl-flower, users in 2 nodes", "Flower"
BAR = 1.0
"""Ours must not be slower; the figures say by how much it is faster."""
_TIMEOUT_SECONDS = 7200.0


def in_process(run_dir: Path, rounds: int) -> None:
    """Run the app in this process."""
    config = {"rival": "nodes", "rounds": rounds, "run-dir": str(run_dir)}
    run = run_app(APP, num_supernodes=CLIENTS, run_config=config)
    if not run.completed:
        raise RuntimeError(run.details)


def under_flower(flwr: FlwrCommand, rival: str, nodes: int, run_dir: Path, rounds: int) -> None:
    """Run the app by ``flwr run``."""
    config = run_dir / "run-config.toml"
    config.write_text(
        to_toml({"rival": rival, "rounds": rounds, "run-dir": str(run_dir)}), encoding="utf-8"
    )
    run = flwr.run(
        APP,
        config_file=config,
        federation_config=f"num-supernodes={nodes} client-resources-num-cpus=1",
        log_path=run_dir / "run.log",
    )
    if not run.completed:
        raise RuntimeError(f"flwr run {run.outcome}: {run.details}")


def timed(runs: dict[str, Callable[[Path], None]], *, repeats: int) -> list[compare.Timing]:
    """Let the rivals take turns; return the time of each of their rounds but every run's first."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(repeats):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            with tempfile.TemporaryDirectory(prefix="dpfl-bench-") as folder:
                runs[name](Path(folder))
                seconds[name] += json.loads((Path(folder) / "seconds.json").read_text())[1:]
    return [compare.Timing(name, tuple(found)) for name, found in seconds.items()]


def main() -> None:
    """Print the table and the ratio, and write both down."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.flower_round")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each (default: 3)")
    parser.add_argument("--rounds", type=int, default=6, help="of each run (default: 6)")
    arguments = parser.parse_args()
    rounds = arguments.rounds
    logging.getLogger("flwr").setLevel(logging.WARNING)
    with simulation_superlink(Deadline(_TIMEOUT_SECONDS)) as flwr:
        timings = timed(
            {
                IN_PROCESS: lambda folder: in_process(folder, rounds),
                USERS: lambda folder: under_flower(flwr, "users", NODES, folder, rounds),
                FLOWER: lambda folder: under_flower(flwr, "flower", CLIENTS, folder, rounds),
            },
            repeats=arguments.repeats,
        )
    ratio = compare.report(
        timings,
        ours=IN_PROCESS,
        theirs=FLOWER,
        bar=BAR,
        title=f"round of {CLIENTS} clients x 1,000,000 parameters, no-op training, wall clock",
    )
    results.save(
        "flower_round",
        {
            "ratio": ratio,
            "bar": BAR,
            "seconds": {timing.name: list(timing.seconds) for timing in timings},
        },
    )


if __name__ == "__main__":
    compare.stop_on_sigterm()
    main()
