"""``dpfl run`` leaves the final model in the run directory, whatever the app and the engine."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from typer.testing import CliRunner, Result

from dpfl_flower.cli import app as dpfl
from dpfl_flower.final_model import MODEL, load_model

PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "small"
version = "1.0.0"
description = "Adds one, privately."
license = "Apache-2.0"
dependencies = ["flwr>=1.41"]

[tool.flwr.app]
publisher = "dpfl"

[tool.flwr.app.components]
serverapp = "small.app:server"
clientapp = "small.app:client"

[tool.flwr.app.config]
mode = "well"
text = ""
"""

APP = """
import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from dpfl_flower import EveryoneSampling, FixedClipping
from dpfl_strategies import DPFedAvg

client = ClientApp()
server = ServerApp()


@client.train()
def train(message, context):
    if context.run_config["mode"] == "fails":
        raise RuntimeError("planted")
    arrays = {n: Array(a.numpy() + np.float32(1)) for n, a in message.content["arrays"].items()}
    content = {"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"num-examples": 1})}
    return Message(RecordDict(content), reply_to=message)


@server.main()
def main(grid, context):
    print("the text is", context.run_config["text"])
    if context.run_config["mode"] == "quiet":
        return
    strategy = DPFedAvg(
        sampling=EveryoneSampling(2), clipping=FixedClipping(100.0), noise_multiplier=0.01
    )
    arrays = ArrayRecord({"weight": Array(np.zeros(400, np.float32))})
    result = strategy.start(grid, arrays, num_rounds=2)
    np.save({beside!r}, result.arrays["weight"].numpy())
"""


@pytest.fixture
def app(tmp_path: Path) -> Path:
    folder = tmp_path / "app"
    (folder / "small").mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (folder / "small" / "__init__.py").write_text("")
    source = APP.replace("{beside!r}", repr(str(tmp_path / "beside.npy")))
    (folder / "small" / "app.py").write_text(source)
    return folder


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(dpfl, ["run", *map(str, arguments), "--format", "json"])


def require_released_model(done: Result, run_dir: Path, beside: Path) -> None:
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["model"] == MODEL
    np.testing.assert_array_equal(load_model(run_dir / MODEL)["weight"], np.load(beside))
    with safe_open(run_dir / MODEL, "np") as file:
        assert file.metadata()["rounds"] == "2"
        assert "after 2 releases" in file.metadata()["privacy"]
    rounds = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    # Each entry moves by 1; the noise on the mean has a standard deviation of 0.01 x 100 / 2.
    for line in rounds:
        assert line["metrics"]["signal-to-noise"] == pytest.approx(4.0, abs=1.5)
    assert len(rounds) == 2


def test_an_app_that_saves_nothing_leaves_its_model(app: Path, tmp_path: Path) -> None:
    done = invoke(app, "--run-dir", tmp_path / "run")
    require_released_model(done, tmp_path / "run", tmp_path / "beside.npy")


def test_an_old_model_is_not_taken_for_the_runs_own(app: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    invoke(app, "--run-dir", run_dir)
    done = invoke(app, "--run-dir", run_dir, "--run-config", "mode='quiet'")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["model"] is None
    assert (run_dir / MODEL).exists()
    assert f"No {MODEL} in the run directory" in done.stderr


def test_a_run_whose_nodes_all_fail_leaves_what_was_released(app: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    done = invoke(app, "--run-dir", run_dir, "--run-config", "mode='fails'")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["model"] == MODEL
    with safe_open(run_dir / MODEL, "np") as file:
        assert file.metadata()["stopped"] == "every node that was asked failed"


@pytest.mark.slow
def test_so_does_flowers_simulation(app: Path, tmp_path: Path) -> None:
    text = r'a "quoted" path/with = and ünïcode'
    config = ["--run-config", f"text='{text}'"]
    done = invoke(app, "--engine", "flower", "--run-dir", tmp_path / "run", *config)
    require_released_model(done, tmp_path / "run", tmp_path / "beside.npy")
    log = (tmp_path / "run" / "run.log").read_text(encoding="utf-8")
    assert f"the text is {text}" in log.splitlines()
    assert "\x1b" not in log
