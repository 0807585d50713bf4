"""``dpfl data`` prints where a data set lies, or why it cannot be had."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dpfl_flower.cli import app
from dpfl_flower.datasets import CATALOG, DatasetError

data_command = importlib.import_module("dpfl_flower.cli.data")  # the package has a function data
run = CliRunner().invoke


def test_without_a_name_all_are_listed() -> None:
    listed = run(app, ["data"])
    assert listed.exit_code == 0
    assert all(name in listed.stdout for name in CATALOG)
    found = json.loads(run(app, ["data", "--format", "json"]).stdout)
    assert [item["name"] for item in found["data-sets"]] == list(CATALOG)


def test_a_name_is_fetched_and_its_path_is_all_of_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(name: str, *, cache_dir: Path | None, progress: Callable[[str], None]) -> Path:
        progress(f"{name}: fetching")
        assert cache_dir == tmp_path
        return tmp_path / name

    monkeypatch.setattr(data_command, "fetch", fetch)
    done = run(app, ["data", "heart", "--cache-dir", str(tmp_path)])
    assert (done.exit_code, done.stdout) == (0, f"{tmp_path / 'heart'}\n")
    assert "heart: fetching" in done.stderr
    assert CATALOG["heart"].licence in done.stderr
    found = json.loads(
        run(app, ["data", "heart", "--cache-dir", str(tmp_path), "--format", "json"]).stdout
    )
    assert found["path"] == str(tmp_path / "heart")
    assert found["files"] == ["heart_disease_uci.csv"]


def test_what_cannot_be_had_exits_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(name: str, **settings: object) -> Path:
        raise DatasetError(f"{name}: no network")

    monkeypatch.setattr(data_command, "fetch", fetch)
    done = run(app, ["data", "heart"])
    assert (done.exit_code, done.stdout) == (1, "")
    assert "dpfl: heart: no network" in done.stderr
    found = json.loads(run(app, ["data", "heart", "--format", "json"]).stdout)
    assert found == {"error": "heart: no network", "exit-code": 1}


def test_an_unknown_name_exits_with_2_and_lists_the_names() -> None:
    done = run(app, ["data", "hart"])
    assert done.exit_code == 2
    assert "name='hart' must be one of ['akl-pedestrians', 'heart'" in done.stderr
