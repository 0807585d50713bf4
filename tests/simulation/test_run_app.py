"""An app's folder runs in this process as under ``flwr run``, and leaves nothing behind."""

import sys
import threading
from pathlib import Path

import pytest
from flwr.common.config import get_fused_config_from_dir

from dpfl_flower.simulation import AppFolder, Fault, RunOutcome, run_app
from dpfl_flower.simulation.pytest_plugin import in_process_app, in_process_grid

__all__ = ["in_process_app", "in_process_grid"]

PYPROJECT = """
[project]
name = "{name}"
version = "1.0.0"

[tool.flwr.app]
publisher = "dpfl"

[tool.flwr.app.components]
serverapp = "tiny.server_app:app"
clientapp = "tiny.client_app:app"

[tool.flwr.app.config]
mode = "well"
text = ""
run-dir = "elsewhere"
train.lr = 0.5

[tool.dpfl]
num-supernodes = 3
"""

CLIENT = """
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.query()
def query(message, context):
    if context.run_config["mode"] == "clients":
        raise RuntimeError("planted client failure")
    metrics = MetricRecord({"partition": float(context.node_config["partition-id"])})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
"""

SERVER = """
import sys
import time

from flwr.app import Message, RecordDict
from flwr.serverapp import ServerApp

from .words import WORD
import helper

app = ServerApp()


@app.main()
def main(grid, context):
    import tiny.late
    mode = context.run_config["mode"]
    asked = [Message(RecordDict(), node, "query") for node in grid.get_node_ids()]
    replies = grid.send_and_receive(asked)
    found = [int(r.content["metrics"]["partition"]) for r in replies if r.has_content()]
    print(WORD, helper.WORD, found, context.run_config["train.lr"], context.run_config["run-dir"])
    if mode == "server":
        raise RuntimeError("planted failure")
    if mode == "exit":
        sys.exit(3)
    if mode == "quit":
        sys.exit(0)
    if mode == "slow":
        while True:
            try:
                time.sleep(60)
            except Exception:
                pass
"""


def write_app(folder: Path, word: str = "first") -> Path:
    package = folder / "tiny"
    package.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PYPROJECT.format(name=word))
    (folder / "helper.py").write_text(f"WORD = '{word} helper'\n")
    (package / "__init__.py").write_text("")
    (package / "late.py").write_text("")
    (package / "words.py").write_text(f"WORD = '{word}'\n")
    (package / "client_app.py").write_text(CLIENT)
    (package / "server_app.py").write_text(SERVER)
    return folder


@pytest.fixture
def app(tmp_path: Path) -> Path:
    return write_app(tmp_path / "app")


def test_a_run_uses_the_folders_components_nodes_and_configuration(
    app: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_app(app, run_config={"train.lr": 2.0}, run_dir=tmp_path / "out")
    assert run.completed
    assert run.run_id > 0
    assert run.config["train.lr"] == 2.0
    out = tmp_path / "out"
    assert capsys.readouterr().out == f"first first helper [0, 1, 2] 2.0 {out}\n"
    assert run_app(app, num_supernodes=1).completed
    assert capsys.readouterr().out == "first first helper [0] 0.5 elsewhere\n"


def test_in_worker_processes_the_run_is_the_same(
    app: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_app(app, num_workers=2, run_dir=tmp_path).completed
    assert capsys.readouterr().out == f"first first helper [0, 1, 2] 0.5 {tmp_path}\n"
    failed = run_app(app, num_workers=2, run_config={"mode": "clients"})
    assert failed.details == "all 3 messages that reached a node were answered by an error"
    with pytest.raises(ValueError, match="num_workers=0 must be an integer >= 1"):
        run_app(app, num_workers=0)


def test_two_apps_of_the_same_module_names_do_not_see_each_other(
    app: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_app(tmp_path / "other", "second")
    path = list(sys.path)
    modules = set(sys.modules)
    for folder in (app, other, app):
        assert run_app(folder, num_supernodes=1).completed
    words = [line.split(" [")[0] for line in capsys.readouterr().out.splitlines()]
    assert words == ["first first helper", "second second helper", "first first helper"]
    assert sys.path == path
    left = {name for name in set(sys.modules) - modules if name.startswith(("tiny", "helper"))}
    assert left == set()


def test_a_module_of_the_callers_that_the_app_hides_comes_back(
    app: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = type(sys)("helper")
    mine.WORD = "mine"
    monkeypatch.setitem(sys.modules, "helper", mine)
    assert run_app(app, num_supernodes=1).completed
    assert "first helper" in capsys.readouterr().out
    assert sys.modules["helper"] is mine


@pytest.mark.parametrize(
    ("mode", "details"),
    [
        ("server", "RuntimeError: planted failure"),
        ("exit", "SystemExit: 3"),
        ("clients", "all 3 messages that reached a node were answered by an error"),
    ],
)
def test_a_run_that_fails_says_so(app: Path, mode: str, details: str) -> None:
    path = list(sys.path)
    run = run_app(app, run_config={"mode": mode})
    assert (run.outcome, run.details) == (RunOutcome.FAILED, details)
    assert sys.path == path
    assert "tiny" not in sys.modules


def test_a_server_that_exits_with_zero_completed(app: Path) -> None:
    assert run_app(app, run_config={"mode": "quit"}).completed


def test_an_app_that_cannot_be_imported_failed(app: Path) -> None:
    (app / "tiny" / "client_app.py").write_text("import there_is_no_such_module\n")
    run = run_app(app)
    assert not run.completed
    assert run.details.startswith("ModuleNotFoundError: No module named 'there_is_no_such_module'")
    (app / "tiny" / "client_app.py").write_text("app = 3  # a longer file\n")
    assert run_app(app).details == ("TypeError: tiny.client_app:app must be a ClientApp, not a int")


def test_a_run_that_takes_too_long_ends(app: Path) -> None:
    with pytest.raises(TimeoutError, match=r"did not end within 0\.3 seconds"):
        run_app(app, run_config={"mode": "slow"}, timeout_seconds=0.3)
    assert "tiny" not in sys.modules
    assert run_app(app).completed  # the next one may begin


def test_a_time_out_outside_of_the_main_thread_is_refused(app: Path) -> None:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            run_app(app, timeout_seconds=5)
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert "timeout_seconds=5 must be None outside of the main thread" in str(errors[0])


def test_configuration_is_merged_as_flower_merges_it(app: Path) -> None:
    overrides: dict[str, bool | int | float | str] = {"text": "a b", "train.lr": 1}
    assert AppFolder.read(app).configured(overrides) == get_fused_config_from_dir(app, overrides)
    with pytest.raises(ValueError, match="not present in the main dictionary"):
        get_fused_config_from_dir(app, {"txet": "a"})
    with pytest.raises(ValueError, match=r"run_config key 'txet' must be one of \['mode', 'run"):
        AppFolder.read(app).configured({"txet": "a"})


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[project]", "[projekt]", r"must have a table \[project\]"),
        ('serverapp = "tiny.server_app:app"', "", r"components\] serverapp=None must be a text"),
        ("tiny.client_app:app", "tiny", r"clientapp='tiny' must be 'module:attribute'"),
        ("num-supernodes = 3", "num-supernodes = 0", r"\[tool\.dpfl\] num-supernodes=0 must be"),
        ('mode = "well"', "mode = [1]", r"run_config mode=\[1\] must be a text"),
        ("[tool.dpfl]", "[tool", r"must be TOML"),
    ],
)
def test_a_folder_that_is_no_app_is_refused_by_name(
    app: Path, old: str, new: str, message: str
) -> None:
    text = (app / "pyproject.toml").read_text()
    (app / "pyproject.toml").write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=message):
        run_app(app)


def test_the_fixtures_run_apps_and_make_grids(
    in_process_app, in_process_grid, app: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert in_process_app(app, fault=lambda message: Fault.SILENT).completed
    assert str(tmp_path / "run") in capsys.readouterr().out
    with AppFolder.read(app).loaded() as loaded:
        grid = in_process_grid(loaded.client, num_supernodes=2, run_config={"mode": "well"})
        assert list(grid.get_node_ids()) == [1000, 1001]
