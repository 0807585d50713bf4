"""``dpfl run`` exits with 0 only for a run that succeeded, on every engine, and leaves a record."""

import json
import logging
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.markup import render
from typer.testing import CliRunner, Result

from dpfl_flower.cli import app as dpfl
from dpfl_flower.cli.run_config import parse_run_config
from dpfl_flower.simulation import connection

MEDICAL = Path(__file__).parents[2] / "apps" / "medical"

PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "tiny"
version = "1.0.0"
description = "Ends as it is told to."
license = "Apache-2.0"
dependencies = ["flwr>=1.41"]

[tool.flwr.app]
publisher = "dpfl"

[tool.flwr.app.components]
serverapp = "tiny.app:server"
clientapp = "tiny.app:client"

[tool.flwr.app.config]
mode = "well"
run-dir = ""
"""

APP = """
import logging
import os
import signal
import time
from pathlib import Path

from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client = ClientApp()
server = ServerApp()
log = logging.getLogger("flwr.dpfl")


@client.query()
def query(message, context):
    return Message(RecordDict(), reply_to=message)


@server.main()
def main(grid, context):
    mode = context.run_config["mode"]
    log.warning("Metrics are let through")
    for i in (1, 2):
        spent = f"epsilon 0.{i} of 1, rmse {2 / i}"
        log.info("[ROUND %d/%d] %s, about %.0f s left", i, 2, spent, 0)
    logging.getLogger("tiny").error("said by another logger")
    print("the app's own report")
    Path(context.run_config["run-dir"], "model.txt").write_text("model")
    if mode == "fails":
        raise RuntimeError("planted failure")
    if mode == "counts":
        log.info("aggregate_train: Received %s results and %s failures", 0, 3)
    if mode == "slow":
        time.sleep(60)
    if mode == "terminated":
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
"""


@pytest.fixture
def app(tmp_path: Path) -> Path:
    folder = tmp_path / "app"
    (folder / "tiny").mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (folder / "tiny" / "__init__.py").write_text("")
    (folder / "tiny" / "app.py").write_text(APP)
    return folder


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(dpfl, ["run", *map(str, arguments)])


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_that_succeeds_exits_with_0_and_leaves_a_record(app: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    handlers = list(logging.getLogger("flwr").handlers)
    done = invoke(app, "--run-dir", run_dir, "--num-supernodes", 3, "--format", "text")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("the app's own report\nCompleted in ")
    assert str(run_dir) in done.stdout
    assert "round 2/2, epsilon 0.2 of 1, rmse 1, 0 s left" in done.stderr
    assert done.stderr.count("Metrics are let through") == 1
    assert done.stderr.count("said by another logger") == 1
    assert logging.getLogger("flwr").handlers == handlers

    config = json.loads((run_dir / "config.json").read_text())
    assert (config["name"], config["engine"], config["num-supernodes"]) == ("tiny", "in-process", 3)
    assert config["run-config"] == {"mode": "well", "run-dir": str(run_dir)}
    environment = json.loads((run_dir / "environment.json").read_text())
    assert environment["packages"]["flwr"]
    rounds = json_lines(run_dir / "metrics.jsonl")
    assert [(r["round"], r["epsilon"], r["metrics"]) for r in rounds] == [
        (1, 0.1, {"rmse": 2.0}),
        (2, 0.2, {"rmse": 1.0}),
    ]
    assert json.loads((run_dir / "outcome.json").read_text())["outcome"] == "completed"
    assert (run_dir / "model.txt").read_text() == "model"
    log = (run_dir / "run.log").read_text()
    assert log.count("WARNING : Metrics are let through") == 1
    assert "the app's own report" in log


def test_as_json_the_standard_output_is_one_object(app: Path, tmp_path: Path) -> None:
    done = invoke(app, "--run-dir", tmp_path / "run", "--format", "json")
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert found["outcome"] == "completed"
    assert (found["rounds"], found["epsilon"], found["budget"]) == (2, 0.2, 1.0)
    failed = invoke(app, "--run-config", "mode='fails'", "--run-dir", tmp_path, "--format", "json")
    assert failed.exit_code == json.loads(failed.stdout)["exit-code"] == 1


@pytest.mark.parametrize(
    ("mode", "code", "why"),
    [
        ("fails", 1, "the run failed: RuntimeError: planted failure"),
        ("counts", 1, "every node that was asked to train failed"),
        ("terminated", 130, "the run was interrupted"),
    ],
)
def test_a_run_that_does_not_succeed_says_why(
    app: Path, tmp_path: Path, mode: str, code: int, why: str
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    done = invoke(app, "--run-config", f"mode='{mode}'", "--run-dir", tmp_path / "run")
    assert done.exit_code == code
    assert why in done.stderr
    assert str(tmp_path / "run" / "run.log") in done.stderr
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert outcome["exit-code"] == code
    assert signal.getsignal(signal.SIGTERM) == before
    if mode == "fails":
        assert 'RuntimeError("planted failure")' in (tmp_path / "run" / "run.log").read_text()


def test_a_run_that_takes_too_long_exits_with_3(app: Path, tmp_path: Path) -> None:
    arguments = ["--run-config", "mode='slow'", "--run-dir", tmp_path, "--timeout", "0.5"]
    done = invoke(app, *arguments)
    assert done.exit_code == 3
    assert "the run timed out: the run did not end within 0.5 seconds" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["--run-config", "moed='well'"], r"run_config key 'moed' must be one of ['mode', 'run-"),
        (["--run-config", "mode"], "--run-config 'mode' must be key=value"),
        (["--run-config", "mode=well"], "--run-config mode=well must be"),
        (["--num-supernodes", "0"], "--num-supernodes=0 must be an integer >= 1"),
        (["--workers", "0"], "--workers=0 must be an integer >= 1"),
        (["--workers", "2", "--engine", "flower"], "--workers=2 must not be given with --engine="),
        (["--timeout", "0"], "--timeout=0.0 must be a finite number > 0"),
        (["--engine", " "], "--engine=' ' must be in-process, flower or a connection"),
        (["--run-dir", "/dev/null/x"], "--run-dir: /dev/null"),
    ],
)
def test_a_wrong_argument_exits_with_2_and_is_named(
    app: Path, arguments: list[str], culprit: str
) -> None:
    done = invoke(app, *arguments)
    assert done.exit_code == 2
    assert culprit in done.stderr
    assert done.stdout == ""


def test_a_folder_that_is_no_app_exits_with_2(tmp_path: Path) -> None:
    done = invoke(tmp_path, "--format", "json")
    assert done.exit_code == 2
    assert "must be a folder that holds a pyproject.toml" in json.loads(done.stdout)["error"]


def test_the_medical_app_runs_as_it_is(tmp_path: Path) -> None:
    arguments = ["--num-supernodes", 4, "--run-config", "num-server-rounds=2"]
    done = invoke(MEDICAL, *arguments, "--run-dir", tmp_path, "--format", "json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["rounds"] == 2
    assert found["epsilon"] == pytest.approx(1, abs=1e-3)
    report = json.loads((tmp_path / "result.json").read_text())
    assert str(report["run_id"]) == found["run-id"]
    assert len(report["hospitals"]) == 4
    assert len(list((tmp_path / "ledgers").glob("*.jsonl"))) == 4

    again = invoke(MEDICAL, *arguments, "--run-dir", tmp_path)
    assert again.exit_code == 1  # the ledgers in the directory still count
    assert "no hospital trains" in again.stderr
    assert again.stderr.count("A node refuses: ") == 4


def test_the_medical_app_runs_in_worker_processes_and_its_refusals_are_shown(
    tmp_path: Path,
) -> None:
    arguments = ["--workers", 2, "--run-config", "num-server-rounds=2", "--run-dir", tmp_path]
    done = invoke(MEDICAL, *arguments, "--format", "json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["epsilon"] == pytest.approx(1, abs=1e-3)
    assert json.loads((tmp_path / "config.json").read_text())["workers"] == 2
    report = json.loads((tmp_path / "result.json").read_text())
    assert all(hospital["durable"] for hospital in report["hospitals"])
    assert len(report["hospitals"]) == 4

    again = invoke(MEDICAL, *arguments)
    assert again.exit_code == 1
    assert again.stderr.count("A node refuses: ") == 4
    assert "Traceback" not in again.stderr
    assert "Traceback" in (tmp_path / "run.log").read_text()


@pytest.mark.slow
def test_a_failing_app_exits_with_1_on_flowers_simulation_too(app: Path, tmp_path: Path) -> None:
    arguments = ["--engine", "flower", "--run-config", "mode='fails'", "--timeout", "300"]
    done = invoke(app, *arguments, "--run-dir", tmp_path / "run")
    assert done.exit_code == 1, done.output
    assert re.search("the run failed: .*planted failure", done.stderr)
    rounds = json_lines(tmp_path / "run" / "metrics.jsonl")
    assert [(r["round"], r["epsilon"]) for r in rounds] == [(1, 0.1), (2, 0.2)]
    assert "the app's own report" in done.stdout.splitlines()
    assert "planted failure" in (tmp_path / "run" / "run.log").read_text()


# --- connections ----------------------------------------------------------------------------------

FLWR = """#!/bin/sh
cd {folder}
echo "$*" >> calls
case $1 in
run) if [ "$3" = unknown ]; then echo '{{"success": false}}'; exit 1; fi
     cat "$(echo "$*" | sed 's/.*--run-config \\([^ ]*\\).*/\\1/')" > config
     echo '{{"success": true, "run-id": "7"}}';;
log) echo 'INFO :      [ROUND 1/2] epsilon 0.5 of 1, about 1 s left'
     echo 'the app prints'
     if [ -e hang ]; then exec sleep 60; fi;;
list) run='{{"status": "'$(cat status)'", "status-details": "N/A"}}'
      echo '{{"success": true, "runs": ['$run']}}';;
stop) echo '{{"success": true}}';;
esac
"""


@pytest.fixture
def flwr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the command ``flwr``; returns the folder of what it is told and tells."""
    folder = tmp_path / "flwr"
    folder.mkdir()
    (folder / "status").write_text("finished:completed")
    (folder / "flwr").write_text(FLWR.format(folder=folder))
    (folder / "flwr").chmod(0o755)
    monkeypatch.setattr(connection.sysconfig, "get_path", lambda name: str(folder))
    return folder


def test_a_connection_runs_the_app_and_tells_how_it_ended(
    app: Path, tmp_path: Path, flwr: Path
) -> None:
    arguments = [app, "--engine", "production", "--run-dir", tmp_path / "run"]
    done = invoke(*arguments)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("the app prints\n")
    calls = (flwr / "calls").read_text()
    assert calls.startswith(f"run {app} production --run-config ")
    assert "--federation-config" not in calls
    assert (flwr / "config").read_text() == f'run-dir = "{tmp_path / "run"}"\n'

    invoke(*arguments, "--num-supernodes", 5)
    assert "--federation-config num-supernodes=5" in (flwr / "calls").read_text()

    for status in ("failed", "stopped"):
        (flwr / "status").write_text(f"finished:{status}")
        failed = invoke(*arguments)
        assert failed.exit_code == 1
        assert f"the run {status}" in failed.stderr
    assert "stop" not in (flwr / "calls").read_text()


def test_a_connection_that_flower_does_not_know_exits_with_1(
    app: Path, tmp_path: Path, flwr: Path
) -> None:
    done = invoke(app, "--engine", "unknown", "--run-dir", tmp_path / "run")
    assert done.exit_code == 1
    assert "flwr run exited with 1" in done.stderr


def test_a_run_on_a_connection_that_is_not_awaited_is_stopped(
    app: Path, tmp_path: Path, flwr: Path
) -> None:
    (flwr / "hang").touch()
    arguments = ["--engine", "production", "--run-dir", tmp_path / "run"]
    done = invoke(app, *arguments, "--timeout", 1)
    assert done.exit_code == 3
    assert "stop 7 production --format json" in (flwr / "calls").read_text()

    def interrupt() -> None:
        while (flwr / "calls").read_text().count("log 7") < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt).start()
    assert invoke(app, *arguments).exit_code == 130
    assert (flwr / "calls").read_text().count("stop 7") == 2


def test_run_config_is_read_as_flower_reads_it() -> None:
    from flwr.common.config import parse_config_args

    text = "a=1 b=0.5 c=true d='two words' e=\"x=y\" f.g=3"
    assert parse_run_config([text, "a=2"]) == {**parse_config_args([text]), "a": 2}
    for wrong in ("a=", "=1", "a='x", "a=1b", "a=[1]", "a=1 b"):
        with pytest.raises(ValueError, match="--run-config"):
            parse_run_config([wrong])


def test_no_bracket_of_a_help_text_is_taken_for_markup() -> None:
    command = typer.main.get_command(dpfl)
    assert isinstance(command, typer.core.TyperGroup)
    shown = CliRunner().invoke(dpfl, ["run", "--help"], env={"COLUMNS": "300"})
    assert "num-supernodes in the app's [tool.dpfl]." in shown.stdout
    for name, one in command.commands.items():
        texts = [one.help or "", *(getattr(option, "help", None) or "" for option in one.params)]
        for text in texts:
            assert render(text).plain == text.replace("\\[", "["), name
