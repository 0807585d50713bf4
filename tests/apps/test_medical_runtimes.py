"""The app under ``flwr run``, on Flower's virtual client engine, from end to end."""

import io
import logging
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from apps.medical import demo
from apps.medical.medical.report import Report
from dpfl_flower.final_model import MODEL, load_model
from dpfl_flower.simulation import FlowerRun, RunConfig, RunOutcome, run_app

ROOT = Path(__file__).parents[2]
APP = ROOT / "apps" / "medical"


def flower_run_here(
    app: Path, *, log_path: Path, run_config: RunConfig, on_line: Callable[[str], None], **_: object
) -> FlowerRun:
    """Stand in for `run_flower_app`: the app runs in this process, its log comes at the end."""
    log, logger = io.StringIO(), logging.getLogger("dpfl_flower")
    handler = logging.StreamHandler(log)
    handler.setFormatter(logging.Formatter("%(levelname)s : %(message)s"))
    logger.addHandler(handler)
    try:
        run = run_app(app, run_config=run_config)
    finally:
        logger.removeHandler(handler)
    for line in log.getvalue().splitlines():
        on_line(line)
    return FlowerRun(run.outcome, run_id=run.run_id, details=run.details, log_path=log_path)


def test_the_demo_fails_when_every_hospital_refuses_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "run_flower_app", flower_run_here)
    arguments = ["--run-dir", str(tmp_path), "--rounds", "2"]
    assert demo.main(arguments) == 0
    report = Report.load(tmp_path)
    assert report.table() in capsys.readouterr().out
    assert report.rounds == 2
    assert len(report.hospitals) == 4
    assert report.worst_epsilon == pytest.approx(1, abs=1e-3)
    assert all(hospital.durable for hospital in report.hospitals)

    assert demo.main(arguments) == 1
    refused = capsys.readouterr()
    assert re.search(
        r"A hospital refuses: ledger .*hungary\.jsonl.* exceed the budget", refused.out
    )
    assert re.search(r"FAILED: the run failed: .*budget \(epsilon 1 at delta 0\.0001", refused.err)
    assert Report.load(tmp_path) == report


@pytest.mark.slow
def test_flwr_run_ends_with_the_table_and_trains_the_model_of_this_process_but_for_little_noise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The least noise that there is: two runs differ by about 0.001 in weights of up to 0.14.
    free: dict[str, int | float] = {"target-epsilon": 1e8, "clip-norm": 0.5, "num-server-rounds": 3}
    overrides = free | {"run-dir": str(tmp_path / "flower")}
    assert demo.run_and_report(APP, tmp_path / "flower", overrides, timeout_seconds=500) == 0
    printed = capsys.readouterr().out
    assert Report.load(tmp_path / "flower").table() in printed
    assert printed.count("[ROUND 3/3]") == 1
    assert "Run directory: " in printed
    assert run_app(APP, run_dir=tmp_path / "here", run_config=free).completed
    there, here = (load_model(tmp_path / name / MODEL) for name in ("flower", "here"))
    assert there.keys() == here.keys()
    assert np.abs(here["weight"]).max() > 0.1
    for name, array in here.items():
        np.testing.assert_allclose(there[name], array, rtol=0, atol=0.01)
    assert Report.load(tmp_path / "flower").not_private_auc == pytest.approx(
        Report.load(tmp_path / "here").not_private_auc, abs=0.01
    )


def test_a_run_without_a_result_exits_non_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def completed(*args: object, log_path: Path, **settings: object) -> FlowerRun:
        return FlowerRun(RunOutcome.COMPLETED, run_id=5, details="", log_path=log_path)

    monkeypatch.setattr(demo, "run_flower_app", completed)
    assert demo.run_and_report(APP, tmp_path, {}, timeout_seconds=1) == 1
    assert "without a result" in capsys.readouterr().err


def test_a_result_of_another_run_exits_non_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Report(
        run_id=4,
        rounds=1,
        split_seed=1,
        unit="example",
        relation="add-or-remove-one",
        delta=1e-4,
        worst_epsilon=1.0,
        epsilon_everywhere=2.0,
        hospitals=(),
        expected_hospitals=4,
        not_private_auc=0.9,
        not_private_reference_auc=0.9,
    ).save(tmp_path)

    def completed(*args: object, log_path: Path, **settings: object) -> FlowerRun:
        return FlowerRun(RunOutcome.COMPLETED, run_id=5, details="", log_path=log_path)

    monkeypatch.setattr(demo, "run_flower_app", completed)
    assert demo.run_and_report(APP, tmp_path, {}, timeout_seconds=1) == 1
    assert "is of run 4, not 5" in capsys.readouterr().err


def test_a_run_that_cannot_start_exits_non_zero(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    assert demo.run_and_report(tmp_path, tmp_path / "run", {}, timeout_seconds=0.01) == 1
    assert "FAILED: the Flower run did not end within 0.01 seconds" in capsys.readouterr().err


def test_the_demo_takes_a_fresh_run_directory_each_time() -> None:
    assert demo._fresh_run_dir() != demo._fresh_run_dir()
