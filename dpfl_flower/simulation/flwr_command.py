"""The command ``flwr``, made fit for scripts: a run has an outcome, and waiting an end.

>>> FlowerRun(RunOutcome.FAILED, run_id=7, details="clients", log_path=Path("run.log")).completed
False
"""

import json
import re
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

__all__ = ["Deadline", "FlowerRun", "FlowerRunError", "FlwrCommand", "RunConfig", "RunOutcome"]

RunConfig = Mapping[str, bool | int | float | str]
"""What ``--run-config`` overrides in the app's ``[tool.flwr.app.config]``."""

_POLL_SECONDS: Final = 0.2
_COLOURS: Final = re.compile(r"\x1b\[[0-9;]*m")


class RunOutcome(StrEnum):
    """How a Flower run ended, in Flower's words."""

    COMPLETED = "completed"
    FAILED = "failed"
    STOPPED = "stopped"


class FlowerRunError(RuntimeError):
    """The run could not be started or asked about; the message holds what Flower printed."""


@dataclass(frozen=True)
class FlowerRun:
    """A Flower run that ended.

    Attributes
    ----------
    outcome
        How it ended.
    run_id
        Flower's number for it.
    details
        Flower's reason, empty when it completed.
    log_path
        What the ServerApp and, in the simulation, the ClientApps printed.
    """

    outcome: RunOutcome
    run_id: int
    details: str
    log_path: Path

    @property
    def completed(self) -> bool:
        """Whether the ServerApp ran to its end."""
        return self.outcome is RunOutcome.COMPLETED


class Deadline:
    """One limit for all the waiting of a run."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._end = time.monotonic() + seconds

    def remaining(self) -> float:
        """Return the seconds left; raise TimeoutError when none are."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise self.error()
        return left

    def error(self) -> TimeoutError:
        """Return the error that says so."""
        return TimeoutError(f"the Flower run did not end within {self._seconds:g} seconds")


class FlwrCommand:
    """The command ``flwr``, asked about one SuperLink.

    Parameters
    ----------
    environment
        Of the command.
    connection
        Which SuperLink, by its name in ``$FLWR_HOME/config.toml``.
    deadline
        For all that is asked.
    check_alive
        Called first each time; raises FlowerRunError where the SuperLink is known to be gone.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        connection: str,
        deadline: Deadline,
        *,
        check_alive: Callable[[], None] = lambda: None,
    ) -> None:
        self._environment = environment
        self._connection = connection
        self._deadline = deadline
        self._check_alive = check_alive

    def run(
        self,
        app: Path,
        *,
        config_file: Path,
        federation_config: str = "",
        log_path: Path,
        on_line: Callable[[str], None] | None = None,
        on_start: Callable[[int], None] = lambda run_id: None,
    ) -> FlowerRun:
        """Run ``app`` with the overrides in ``config_file``, copy its log, wait for its end.

        ``on_start`` is told the run's number.
        """
        federation = ["--federation-config", federation_config] if federation_config else []
        started = self.json(
            *("run", str(app.resolve()), self._connection, *federation),
            *("--run-config", str(config_file)),
        )
        run_id = int(started["run-id"])
        on_start(run_id)
        self.stream_log(run_id, log_path, on_line)
        while not (status := self.status(run_id))[0].startswith("finished:"):
            time.sleep(_POLL_SECONDS)
        outcome = RunOutcome(status[0].removeprefix("finished:"))
        return FlowerRun(outcome, run_id=run_id, details=status[1], log_path=log_path)

    def json(self, *arguments: str) -> dict[str, Any]:
        """Return what ``flwr ... --format json`` answers; raise FlowerRunError if it refuses."""
        self._check_alive()
        try:
            done = subprocess.run(
                ["flwr", *arguments, "--format", "json"],
                env=self._environment,
                capture_output=True,
                text=True,
                timeout=self._deadline.remaining(),
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise self._deadline.error() from None
        try:
            answer = json.loads(done.stdout)
        except json.JSONDecodeError:
            answer = {}
        if done.returncode != 0 or not isinstance(answer, dict) or not answer.get("success"):
            printed = _COLOURS.sub("", (done.stdout + done.stderr).strip())
            raise FlowerRunError(f"flwr {arguments[0]} exited with {done.returncode}:\n{printed}")
        return answer

    def status(self, run_id: int) -> tuple[str, str]:
        """Return the run's status and details."""
        (run,) = self.json("list", self._connection, "--run-id", str(run_id))["runs"]
        details = run["status-details"]
        return str(run["status"]), "" if details == "N/A" else str(details)

    def stop(self, run_id: int) -> None:
        """Ask for the run's end."""
        self.json("stop", str(run_id), self._connection)

    def stream_log(
        self, run_id: int, log_path: Path, on_line: Callable[[str], None] | None
    ) -> None:
        """Write the run's log to a file as it comes, until the run ends or time is up."""
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with (
            log_path.open("w", encoding="utf-8") as log,
            subprocess.Popen(
                ["flwr", "log", str(run_id), self._connection, "--stream"],
                env=self._environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                encoding="utf-8",
                errors="replace",
            ) as stream,
        ):
            guard = threading.Timer(self._deadline.remaining(), stream.kill)
            guard.start()
            try:
                assert stream.stdout is not None
                for raw in stream.stdout:
                    line = _COLOURS.sub("", raw.rstrip("\n"))
                    print(line, file=log, flush=True)
                    if on_line is not None:
                        on_line(line)
            finally:
                guard.cancel()
                stream.kill()
        self._deadline.remaining()


def to_toml(config: RunConfig) -> str:
    r"""Write a flat table as TOML.

    >>> print(to_toml({"rounds": 3, "eps": float("inf"), "noise": True, "dir": 'a "b"'}), end="")
    rounds = 3
    eps = inf
    noise = true
    dir = "a \"b\""
    """
    return "".join(f"{key} = {_toml_value(value)}\n" for key, value in config.items())


def _toml_value(value: bool | int | float | str) -> str:
    if isinstance(value, float):
        return repr(value)  # JSON would spell infinity in a way that TOML does not know
    return json.dumps(value, ensure_ascii=False)
