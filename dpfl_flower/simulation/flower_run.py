"""Run a Flower app through the command ``flwr run``, in a corner of its own.

The command alone cannot be scripted safely: it exits 0 even when the run fails, it leaves a
SuperLink behind that the next run joins, and by default it installs the app's dependencies into a
new environment. Here the run gets its own ``FLWR_HOME``, its own SuperLink on a free port of the
loopback interface and the environment of this interpreter; its outcome is asked for, and
everything it started is stopped.

>>> FlowerRun(RunOutcome.FAILED, run_id=7, details="clients", log_path=Path("run.log")).completed
False
"""

import contextlib
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from dpfl_flower import checks
from dpfl_flower.simulation.processes import MARK, new_mark, stop_marked

__all__ = ["FlowerRun", "FlowerRunError", "RunConfig", "RunOutcome", "run_flower_app"]

RunConfig = Mapping[str, bool | int | float | str]
"""What ``--run-config`` overrides in the app's ``[tool.flwr.app.config]``."""

_CONNECTION: Final = "dpfl"
_HOST: Final = "127.0.0.1"
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


def run_flower_app(
    app: Path,
    *,
    num_supernodes: int,
    log_path: Path,
    run_config: RunConfig | None = None,
    flwr_home: Path | None = None,
    num_cpus_per_client: int = 1,
    on_line: Callable[[str], None] | None = None,
    timeout_seconds: float = 1800.0,
) -> FlowerRun:
    """Run ``app`` in Flower's simulation runtime by ``flwr run`` and wait for its end.

    Parameters
    ----------
    app
        The app's folder, the one that holds its ``pyproject.toml``.
    num_supernodes
        Simulated nodes.
    log_path
        File that receives the run's log, line by line; replaced if it exists.
    run_config
        Overrides of the app's configuration.
    flwr_home
        Flower's state; a temporary folder, removed afterwards, when not given.
    num_cpus_per_client
        Cores that Ray sets aside for each client at work.
    on_line
        Called with each line of the log as it comes, without its line end.
    timeout_seconds
        For everything together.

    Raises
    ------
    FlowerRunError
        Flower refused the app, the SuperLink did not start or ended before the run did.
    TimeoutError
        The run took longer than ``timeout_seconds``; it has been stopped.
    """
    checks.positive_int(num_supernodes=num_supernodes, num_cpus_per_client=num_cpus_per_client)
    checks.positive(timeout_seconds=timeout_seconds)
    if not (app / "pyproject.toml").is_file():
        raise ValueError(f"app={str(app)!r} must be a folder that holds a pyproject.toml")
    deadline = _Deadline(timeout_seconds)
    # Ray's socket paths must stay below 108 characters, which a long TMPDIR would exceed.
    with tempfile.TemporaryDirectory(
        prefix="dpfl-", dir="/tmp", ignore_cleanup_errors=True
    ) as scratch:
        home = Path(scratch) / "home" if flwr_home is None else flwr_home.resolve()
        home.mkdir(parents=True, exist_ok=True)
        environment = _environment(home, ray_folder=Path(scratch) / "ray")
        config_file = Path(scratch) / "run-config.toml"
        config_file.write_text(_toml(run_config or {}), encoding="utf-8")
        with _superlink(home, environment, deadline) as superlink:
            flwr = _FlwrCommand(environment, superlink, home, deadline)
            started = flwr.json(
                "run",
                str(app.resolve()),
                _CONNECTION,
                "--federation-config",
                f"num-supernodes={num_supernodes} client-resources-num-cpus={num_cpus_per_client}",
                "--run-config",
                str(config_file),
            )
            run_id = int(started["run-id"])
            flwr.stream_log(run_id, log_path, on_line)
            while not (status := flwr.status(run_id))[0].startswith("finished:"):
                time.sleep(_POLL_SECONDS)
    outcome = RunOutcome(status[0].removeprefix("finished:"))
    return FlowerRun(outcome, run_id=run_id, details=status[1], log_path=log_path)


class _Deadline:
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
        return TimeoutError(f"the Flower run did not end within {self._seconds:g} seconds")


class _FlwrCommand:
    """The command ``flwr``, asked about one SuperLink."""

    def __init__(
        self,
        environment: Mapping[str, str],
        superlink: subprocess.Popen[bytes],
        home: Path,
        deadline: _Deadline,
    ) -> None:
        self._environment = environment
        self._superlink = superlink
        self._home = home
        self._deadline = deadline

    def json(self, *arguments: str) -> dict[str, Any]:
        """Return what ``flwr ... --format json`` answers; raise FlowerRunError if it refuses."""
        if self._superlink.poll() is not None:
            raise FlowerRunError(f"the SuperLink ended early:\n{_tail(_superlink_log(self._home))}")
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
        (run,) = self.json("list", _CONNECTION, "--run-id", str(run_id))["runs"]
        details = run["status-details"]
        return str(run["status"]), "" if details == "N/A" else str(details)

    def stream_log(
        self, run_id: int, log_path: Path, on_line: Callable[[str], None] | None
    ) -> None:
        """Write the run's log to a file as it comes, until the run ends or time is up."""
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with (
            log_path.open("w", encoding="utf-8") as log,
            subprocess.Popen(
                ["flwr", "log", str(run_id), _CONNECTION, "--stream"],
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


@contextlib.contextmanager
def _superlink(
    home: Path, environment: Mapping[str, str], deadline: _Deadline
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a SuperLink for simulations; stop it and all that descends from it at the end.

    ``flwr run`` would start one itself, but gives it 15 seconds only and forgets its process id.
    """
    process = None
    try:
        for _ in range(3):  # another program may take the port between the question and the use
            port = _free_port()
            if _healthy(port):
                continue
            process = _start_superlink(home, environment, port)
            if _comes_up(process, port, deadline):
                break
        else:
            raise FlowerRunError(f"no SuperLink started:\n{_tail(_superlink_log(home))}")
        connection = f'[superlink]\ndefault = "{_CONNECTION}"\n\n[superlink.{_CONNECTION}]\n'
        connection += f'address = "{_HOST}:{port}"\ninsecure = true\n'
        (home / "config.toml").write_text(connection, encoding="utf-8")
        yield process
    finally:
        if process is not None:
            process.terminate()  # it ends its children itself when it is asked first
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5.0)
        stop_marked(environment[MARK], roots=() if process is None else (process.pid,))
        if process is not None:
            process.wait()


def _start_superlink(
    home: Path, environment: Mapping[str, str], port: int
) -> subprocess.Popen[bytes]:
    with _superlink_log(home).open("ab") as log:
        return subprocess.Popen(
            [
                *("flower-superlink", "--insecure", "--simulation"),
                *("--host", _HOST, "--port", str(port), "--database", str(home / "state.db")),
            ],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches this process alone, which stops the rest
        )


def _comes_up(process: subprocess.Popen[bytes], port: int, deadline: _Deadline) -> bool:
    """Wait until the SuperLink is healthy; return False if it ended instead."""
    while process.poll() is None:
        if _healthy(port):
            return True
        time.sleep(min(_POLL_SECONDS, deadline.remaining()))
    return False


def _healthy(port: int) -> bool:
    connection = http.client.HTTPConnection(_HOST, port, timeout=1.0)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _environment(home: Path, *, ray_folder: Path) -> dict[str, str]:
    """Return this process's environment, cut off from other Flower and Ray installations."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("FLWR_", "RAY_"))}
    scripts = sysconfig.get_path("scripts")
    path = os.pathsep.join([scripts, os.environ.get("PATH", os.defpath)])
    if shutil.which("flwr", path=path) is None:
        raise FlowerRunError(f"the command flwr is not installed in {path}")
    no_proxy = ",".join(filter(None, [os.environ.get("no_proxy"), _HOST, "localhost"]))
    return environment | {
        "PATH": path,
        "PYTHONUNBUFFERED": "1",
        "NO_PROXY": no_proxy,
        "no_proxy": no_proxy,
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "RAY_TMPDIR": str(ray_folder),
        "RAY_USAGE_STATS_ENABLED": "0",
        MARK: new_mark(),
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


def _superlink_log(home: Path) -> Path:
    return home / "superlink.log"


def _tail(path: Path, *, lines: int = 20) -> str:
    if not path.exists():
        return ""
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def _toml(config: RunConfig) -> str:
    r"""Write a flat table as TOML.

    >>> print(_toml({"rounds": 3, "eps": float("inf"), "noise": True, "dir": 'a "b"'}), end="")
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
