"""``flwr run`` in isolation: whatever goes wrong is an error, and nothing is left running.

Runs that complete and apps that fail: tests/cli and tests/apps, where the same call is made.
"""

import ctypes
import http.server
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpfl_flower.simulation import FlowerRunError, flower_run, run_flower_app

PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "tiny"
version = "1.0.0"
description = "Asks every node for its partition."
license = "Apache-2.0"
dependencies = ["flwr>=1.41"]

[tool.flwr.app]
publisher = "dpfl"

[tool.flwr.app.components]
serverapp = "tiny.app:server"
clientapp = "tiny.app:client"

"""

APP = """
import time

from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client = ClientApp()
server = ServerApp()


@client.query()
def query(message, context):
    metrics = MetricRecord({"partition": float(context.node_config["partition-id"])})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


@server.main()
def main(grid, context):
    while len(nodes := list(grid.get_node_ids())) < 3:
        time.sleep(0.1)
    replies = grid.send_and_receive([Message(RecordDict(), node, "query") for node in nodes])
    found = sorted(int(reply.content["metrics"]["partition"]) for reply in replies)
    print(f"partitions {found}")
"""

PR_SET_CHILD_SUBREAPER = 36  # prctl(2): orphans of our descendants become our children


@pytest.fixture
def app(tmp_path: Path) -> Path:
    folder = tmp_path / "app"
    (folder / "tiny").mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (folder / "tiny" / "__init__.py").write_text("")
    (folder / "tiny" / "app.py").write_text(APP)
    return folder


def children() -> set[int]:
    """Return the living children of this process, adopted orphans included."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(parent) == os.getpid() and state != "Z":
            found.add(int(stat.parent.name))
    return found


@pytest.fixture
def nothing_left_running() -> Iterator[None]:
    """Adopt every orphan of the test, so that one that was left running is seen."""
    prctl = ctypes.CDLL(None).prctl
    before = children()
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
        assert children() - before == set()
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_left_running")
def test_an_interrupted_run_is_stopped_with_all_its_workers(app: Path, tmp_path: Path) -> None:
    def interrupt(line: str) -> None:
        if line.startswith("partitions [0, 1, 2]"):  # Ray and its workers are up
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_flower_app(
            app,
            num_supernodes=3,
            num_cpus=1,
            log_path=tmp_path / "run.log",
            on_line=interrupt,
            timeout_seconds=300,
        )


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_left_running")
def test_a_superlink_that_dies_is_an_error_and_takes_its_workers_along(
    app: Path, tmp_path: Path
) -> None:
    before = children()

    def kill_superlink(line: str) -> None:
        if line.startswith("partitions [0, 1, 2]"):
            for pid in children() - before:
                if b"flower-superlink" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)

    with pytest.raises(FlowerRunError, match="the SuperLink ended early"):
        run_flower_app(
            app,
            num_supernodes=3,
            num_cpus=1,
            log_path=tmp_path / "run.log",
            on_line=kill_superlink,
            timeout_seconds=300,
        )


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_left_running")
def test_time_that_is_up_stops_the_run(app: Path, tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match=r"did not end within 0\.5 seconds"):
        run_flower_app(app, num_supernodes=3, log_path=tmp_path / "run.log", timeout_seconds=0.5)


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_left_running")
def test_an_app_that_flower_refuses_is_an_error_with_flowers_words(
    app: Path, tmp_path: Path
) -> None:
    broken = PYPROJECT.replace('serverapp = "tiny.app:server"', "")
    (app / "pyproject.toml").write_text(broken)
    with pytest.raises(FlowerRunError, match="serverapp"):
        run_flower_app(app, num_supernodes=3, log_path=tmp_path / "run.log", timeout_seconds=300)


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_left_running")
def test_a_port_taken_by_another_server_is_left_to_it(
    app: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Healthy(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Healthy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(flower_run, "_free_port", lambda: server.server_port)
    try:
        with pytest.raises(FlowerRunError, match="SuperLink"):
            run_flower_app(
                app, num_supernodes=3, log_path=tmp_path / "run.log", timeout_seconds=300
            )
    finally:
        server.shutdown()
        server.server_close()


def test_a_folder_without_an_app_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"app=.* must be a folder that holds a pyproject\.toml"):
        run_flower_app(tmp_path, num_supernodes=2, log_path=tmp_path / "run.log")


def test_an_environment_without_flower_is_an_error(
    app: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flower_run.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FlowerRunError, match="the command flwr is not installed in"):
        run_flower_app(app, num_supernodes=2, log_path=tmp_path / "run.log")


def test_no_nodes_are_refused(app: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_supernodes=0 must be an integer >= 1"):
        run_flower_app(app, num_supernodes=0, log_path=tmp_path / "run.log")
