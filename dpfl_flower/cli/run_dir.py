"""The directory of a run: what ran, on what, what came of each round, and what the app wrote.

``config.json``
    the app, the engine, the number of nodes and the whole configuration
``environment.json``
    versions of Python and of the packages a result depends on, and the machine
``metrics.jsonl``
    a JSON object per round: epsilon spent as the log showed it, metrics, time
``model.safetensors``
    the final model, as the strategy released it last or as the app saved it; see
    :mod:`dpfl_flower.final_model`
``run.log``
    what the run logged and printed
``outcome.json``
    how it ended, with the exit code

An app whose configuration has the key ``run-dir`` puts its own files there too: its ledger, its
result. Used again, the directory keeps those (a ledger goes on counting) and its
``metrics.jsonl`` grows; the other files are those of the newest run.

>>> import tempfile
>>> with tempfile.TemporaryDirectory() as folder:
...     directory = RunDirectory(Path(folder) / "run")
...     directory.write("outcome.json", {"exit-code": 0})
...     sorted(path.name for path in directory.path.iterdir())
['environment.json', 'outcome.json']
"""

import json
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from dpfl_flower.cli.output import plain
from dpfl_flower.cli.progress import RoundProgress
from dpfl_flower.final_model import MODEL

__all__ = ["RunDirectory", "fresh_path"]

_PACKAGES: Final = (
    "dpfl-flower",
    "flwr",
    "torch",
    "opacus",
    "dp-accounting",
    "numpy",
    "scipy",
    "cryptography",
    "safetensors",
)


class RunDirectory:
    """Creates the directory and writes into it."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.path.mkdir(parents=True, exist_ok=True)
        self.write("environment.json", _environment())

    @property
    def log_path(self) -> Path:
        """Where what the run logs and prints goes."""
        return self.path / "run.log"

    def model(self) -> tuple[int, int] | None:
        """Return what tells the final model from another one, None where there is none."""
        try:
            found = (self.path / MODEL).stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns

    def write(self, name: str, data: Mapping[str, Any]) -> None:
        """Write a JSON file, all of it or nothing."""
        unfinished = self.path / f".{name}.{os.getpid()}"
        text = json.dumps(plain(data), indent=2, ensure_ascii=False, allow_nan=False)
        unfinished.write_text(text + "\n", encoding="utf-8")
        unfinished.replace(self.path / name)

    def add_round(self, progress: RoundProgress, *, seconds: float) -> None:
        """Add a line to ``metrics.jsonl``; ``seconds`` since the run began."""
        line = plain(
            {
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "seconds": round(seconds, 3),
                "round": progress.server_round,
                "rounds": progress.num_rounds,
                "epsilon": progress.epsilon,
                "budget": progress.budget,
                "metrics": progress.metrics,
                "metric_noise": progress.metric_noise,
            }
        )
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            print(json.dumps(line, ensure_ascii=False, allow_nan=False), file=file)


def fresh_path(app_name: str) -> Path:
    """Return ``runs/<app>/<now>``."""
    return Path("runs") / app_name / datetime.now().strftime("%Y%m%d-%H%M%S-%f")


def _environment() -> dict[str, Any]:
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count() if affinity is None else len(affinity(0)),
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
