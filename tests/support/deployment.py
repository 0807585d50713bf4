"""A SuperLink and SuperNodes on the loopback interface, and an app to run there."""

import contextlib
import os
import shutil
import socket
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpfl_flower.simulation.processes import MARK, new_mark, stop_marked

ROOT = Path(__file__).parents[2]

_PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "exact"
version = "1.0.0"
license = "Apache-2.0"
dependencies = ["flwr>=1.41,<2"]

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "dpfl"

[tool.flwr.app.components]
serverapp = "exact.server_app:app"
clientapp = "exact.client_app:app"

[tool.flwr.app.config]
out = ""
"""


def free_prefix(ports: int) -> int:
    """Return p such that so many ports from 10 p on are free."""

    def free(port: int) -> bool:
        with contextlib.closing(socket.socket()) as tried:
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                return False
        return True

    start = 1100 + os.getpid() % 1000
    return next(p for p in range(start, 3200) if all(free(10 * p + n) for n in range(ports)))


@contextlib.contextmanager
def host_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Let ``folder`` stand for the repository's root; stop what was started in the block."""
    mark = new_mark()
    for name in [n for n in os.environ if n.startswith(("FLWR_", "RAY_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv(MARK, mark)
    monkeypatch.setenv("PATH", os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]]))
    python_path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(python_path))
    monkeypatch.setenv("FLWR_HOME", str(folder / "home"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    shutil.copytree(
        ROOT / "apps", folder / "apps", ignore=shutil.ignore_patterns("__pycache__", "runs")
    )
    try:
        yield folder
    finally:
        monkeypatch.undo()  # this process must not carry the mark
        stop_marked(mark)


def shell(host: Path, script: str) -> str:
    """Run ``script`` in ``host`` to its end and return what it and what it left running said."""
    log = host / "log"
    with log.open("ab") as out:  # a file, not a pipe: what is left running holds it open
        ended = subprocess.run(
            ["bash", "-c", script],
            cwd=host,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            timeout=900,
            check=False,
        )
    assert ended.returncode == 0, log.read_text()
    return log.read_text()


def write_app(host: Path, *, client: str, server: str) -> Path:
    """Write an app of two modules, with ``out`` in its run config, and return its folder."""
    package = host / "app" / "exact"
    package.mkdir(parents=True)
    (host / "app" / "pyproject.toml").write_text(_PYPROJECT)
    (package / "__init__.py").write_text("")
    (package / "client_app.py").write_text(client)
    (package / "server_app.py").write_text(server)
    return host / "app"
