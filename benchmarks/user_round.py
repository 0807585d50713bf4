"""A round of user-level DP-FedAvg against pfl 0.6.0 and a plain loop: one node, many users.

``python -m benchmarks.user_round --model cnn`` (bar 0.70 x pfl) or ``--model mlp`` (bar 0.12).
1000 users of 50 records, 50 of them in a round, one local epoch in batches of 10, clip norm 0.4,
the same noise. What is timed is the whole round: draw the cohort, train each user from the global
model, clip, sum, add the noise, step. One process and one thread each; pfl, which needs an older
dp-accounting, runs in an environment of its own. The rivals take turns, never at once.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import compare, results
from benchmarks.peer_environment import peer_python

BARS = {"cnn": 0.70, "mlp": 0.12}
REPEATS = {"cnn": 9, "mlp": 41}
OURS, PLAIN, PFL = "dpfl-flower", "plain PyTorch", "pfl"


class Worker:
    """A rival's process; calling it runs one round."""

    def __init__(self, rival: str, model: str, python: str | Path) -> None:
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "PFL_PYTORCH_DEVICE": "cpu",
            "PYTHONWARNINGS": "ignore",
        }
        self._process = subprocess.Popen(
            [str(python), "-m", "benchmarks.user_round_rivals", rival, model],
            cwd=Path(__file__).parents[1],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.about = self._read()
        self.rounds: list[dict[str, float]] = []

    def __call__(self) -> None:
        """Run one round."""
        assert self._process.stdin is not None
        self._process.stdin.write("round\n")
        self._process.stdin.flush()
        self.rounds.append(self._read())

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a rival ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def clock_of(workers: dict[str, Worker], kind: str) -> Callable[[], float]:
    """Return a clock that runs only while a worker is in a round: its CPU or its wall time."""
    return lambda: sum(spent[kind] for worker in workers.values() for spent in worker.rounds)


def main() -> None:
    """Print the table and the ratio, and write both down."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.user_round", description=__doc__)
    parser.add_argument("--model", choices=list(BARS), default="cnn")
    parser.add_argument("--repeats", type=int, help="rounds of each rival (default: 9 or 41)")
    arguments = parser.parse_args()
    model, repeats = arguments.model, arguments.repeats or REPEATS[arguments.model]
    compare.one_thread()
    torch_version = torch.__version__.split("+")[0]
    pfl_python = peer_python(PFL, ["pfl[pytorch]==0.6.0", f"torch=={torch_version}"])
    workers = {
        OURS: Worker(OURS, model, sys.executable),
        PLAIN: Worker(PLAIN, model, sys.executable),
        PFL: Worker(PFL, model, pfl_python),
    }
    about = [worker.about for worker in workers.values()]
    if any(other != about[0] for other in about):
        raise RuntimeError(f"the rivals do not have the same torch and data: {about}")
    # One thread each, so CPU time, which other loads disturb least; wall time is written down too.
    timings = compare.compare(
        dict(workers), repeats=repeats, warmups=2, clock=clock_of(workers, "cpu")
    )
    for worker in workers.values():
        worker.close()
    ratio = compare.report(
        timings,
        ours=OURS,
        theirs=PFL,
        bar=BARS[model],
        title=f"user-level round, {model}, CPU time; pfl 0.6.0, torch {torch.__version__} for all",
    )
    results.save(
        f"user_round_{model}",
        {
            "ratio": ratio,
            "bar": BARS[model],
            "seconds": {
                name: [{kind: round(s, 6) for kind, s in spent.items()} for spent in w.rounds[2:]]
                for name, w in workers.items()
            },
        },
    )


if __name__ == "__main__":
    main()
