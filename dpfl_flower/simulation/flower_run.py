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
import os
import shutil
import socket
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

from dpfl_flower import checks
from dpfl_flower.final_model import RUN_DIR_VARIABLE
from dpfl_flower.simulation.flwr_command import (
    Deadline,
    FlowerRun,
    FlowerRunError,
    FlwrCommand,
    RunConfig,
    RunOutcome,
    to_toml,
)
from dpfl_flower.simulation.processes import MARK, new_mark, stop_marked

__all__ = [
    "FlowerRun",
    "FlowerRunError",
    "RunConfig",
    "RunOutcome",
    "run_flower_app",
    "simulation_superlink",
]

_CONNECTION: Final = "dpfl"
_HOST: Final = "127.0.0.1"
_POLL_SECONDS: Final = 0.2


def run_flower_app(
    app: Path,
    *,
    num_supernodes: int,
    log_path: Path,
    run_config: RunConfig | None = None,
    run_dir: Path | None = None,
    flwr_home: Path | None = None,
    num_cpus_per_client: int = 1,
    num_cpus: int | None = None,
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
    run_dir
        Where strategies leave the final model of an app that has no configuration key ``run-dir``.
    flwr_home
        Flower's state; a temporary folder, removed afterwards, when not given.
    num_cpus_per_client
        Cores that Ray sets aside for each client at work.
    num_cpus
        Cores that Ray may use, and so how many clients are at work at once; all by default. Each
        takes a process, which takes longer to start than a small client to train.
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
    if num_cpus is not None:
        checks.positive_int(num_cpus=num_cpus)
    checks.positive(timeout_seconds=timeout_seconds)
    if not (app / "pyproject.toml").is_file():
        raise ValueError(f"app={str(app)!r} must be a folder that holds a pyproject.toml")
    variables = {} if run_dir is None else {RUN_DIR_VARIABLE: str(run_dir.absolute())}
    with (
        tempfile.TemporaryDirectory(prefix="dpfl-") as scratch,
        simulation_superlink(Deadline(timeout_seconds), flwr_home, variables) as flwr,
    ):
        config_file = Path(scratch) / "run-config.toml"
        config_file.write_text(to_toml(run_config or {}), encoding="utf-8")
        resources = f"client-resources-num-cpus={num_cpus_per_client}"
        if num_cpus is not None:
            resources += f" init-args-num-cpus={num_cpus}"
        return flwr.run(
            app,
            config_file=config_file,
            federation_config=f"num-supernodes={num_supernodes} {resources}",
            log_path=log_path,
            on_line=on_line,
        )


@contextlib.contextmanager
def simulation_superlink(
    deadline: Deadline,
    flwr_home: Path | None = None,
    variables: Mapping[str, str] | None = None,
) -> Iterator[FlwrCommand]:
    """Run a SuperLink for simulations for the length of the block; yield the command to use it.

    Parameters
    ----------
    deadline
        For all that the command is asked.
    flwr_home
        Flower's state; a temporary folder, removed afterwards, when not given.
    variables
        Of the environment, for the SuperLink and all that it runs.
    """
    # Ray's socket paths must stay below 108 characters, which a long TMPDIR would exceed.
    with tempfile.TemporaryDirectory(
        prefix="dpfl-", dir="/tmp", ignore_cleanup_errors=True
    ) as scratch:
        home = Path(scratch) / "home" if flwr_home is None else flwr_home.resolve()
        home.mkdir(parents=True, exist_ok=True)
        environment = _environment(home, ray_folder=Path(scratch) / "ray") | dict(variables or {})
        with _superlink(home, environment, deadline) as superlink:

            def check_alive() -> None:
                if superlink.poll() is not None:
                    log = _tail(_superlink_log(home))
                    raise FlowerRunError(f"the SuperLink ended early:\n{log}")

            yield FlwrCommand(environment, _CONNECTION, deadline, check_alive=check_alive)


@contextlib.contextmanager
def _superlink(
    home: Path, environment: Mapping[str, str], deadline: Deadline
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


def _comes_up(process: subprocess.Popen[bytes], port: int, deadline: Deadline) -> bool:
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
