"""Run a Flower app on a SuperLink that is already there, and wait for its end.

>>> run_on_connection(Path("apps/medical"), "production", log_path=Path("run.log"),
...                   timeout_seconds=0)
Traceback (most recent call last):
    ...
ValueError: timeout_seconds=0 must be a finite number > 0
"""

import contextlib
import os
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from dpfl_flower import checks
from dpfl_flower.simulation.flwr_command import (
    Deadline,
    FlowerRun,
    FlowerRunError,
    FlwrCommand,
    RunConfig,
    to_toml,
)

__all__ = ["run_on_connection"]

_STOP_SECONDS: Final = 30.0


def run_on_connection(
    app: Path,
    connection: str,
    *,
    log_path: Path,
    run_config: RunConfig | None = None,
    num_supernodes: int | None = None,
    on_line: Callable[[str], None] | None = None,
    timeout_seconds: float = 1800.0,
) -> FlowerRun:
    """Run ``app`` by ``flwr run`` on ``connection``; stop it if it is not awaited to its end.

    Parameters
    ----------
    app
        The app's folder.
    connection
        Name of a ``[superlink.NAME]`` in ``$FLWR_HOME/config.toml``.
    log_path, run_config, on_line, timeout_seconds
        As for :func:`~dpfl_flower.simulation.flower_run.run_flower_app`.
    num_supernodes
        For a SuperLink that simulates; None leaves its own setting.

    Raises
    ------
    FlowerRunError
        Flower refused the app or the connection.
    TimeoutError
        The run took longer than ``timeout_seconds``; Flower was asked to stop it.
    """
    checks.positive(timeout_seconds=timeout_seconds)
    if num_supernodes is not None:
        checks.positive_int(num_supernodes=num_supernodes)
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    environment = {**os.environ, "PATH": path, "FLWR_DISABLE_UPDATE_CHECK": "1"}
    flwr = FlwrCommand(environment, connection, Deadline(timeout_seconds))
    started: list[int] = []
    with tempfile.TemporaryDirectory(prefix="dpfl-") as scratch:
        config_file = Path(scratch) / "run-config.toml"
        config_file.write_text(to_toml(run_config or {}), encoding="utf-8")
        try:
            return flwr.run(
                app,
                config_file=config_file,
                federation_config=""
                if num_supernodes is None
                else f"num-supernodes={num_supernodes}",
                log_path=log_path,
                on_line=on_line,
                on_start=started.append,
            )
        except BaseException:
            for run_id in started:
                with contextlib.suppress(FlowerRunError, TimeoutError):
                    FlwrCommand(environment, connection, Deadline(_STOP_SECONDS)).stop(run_id)
            raise
