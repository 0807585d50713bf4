"""The app keeps its budget, and one sensor-fortnight moves a node's sum by one bounded part."""

import csv
import json
import sys
import tomllib
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message, MessageType, RecordDict

from apps.smart_city.smart_city import server_app
from apps.smart_city.smart_city.client_app import app
from apps.smart_city.smart_city.district import FILE, SAMPLE, District, sample_counts
from apps.smart_city.smart_city.evaluation import HELD_OUT, SENSOR_WEEK, HeldOutAnswer
from apps.smart_city.smart_city.reference import Reference
from apps.smart_city.smart_city.report import RESULT, Report
from apps.smart_city.smart_city.server_app import FIGURE, train
from apps.smart_city.smart_city.task import AbsoluteErrors, Settings, new_model
from dpfl_flower import records
from dpfl_flower.client import NodeErrorCode
from dpfl_flower.client.users import CohortRequest
from dpfl_flower.datasets import fetch
from dpfl_flower.final_model import MODEL, load_model
from dpfl_flower.layout import ArrayLayout
from dpfl_flower.quantize import IntegerGrid, Rounding
from dpfl_flower.simulation import InProcessGrid, NodeConfig, run_app, run_flower_app
from tests.support.agreement import require_same_but_for_noise

APP = Path(__file__).parents[2] / "apps" / "smart_city"
SENSORS = ("107 Quay Street", "45 Queen Street")
REFERENCE = Reference(last_hour=76.5, last_week=59.7, naive=41.9, pooled=34.9)

Config = dict[str, bool | int | float | str]
Keep = Callable[[str, int], bool]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    text = (APP / "pyproject.toml").read_text()
    found = dict(tomllib.loads(text)["tool"]["flwr"]["app"]["config"])
    return found | {"num-server-rounds": 4, "run-dir": str(tmp_path / "run")}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the references, tested beside the task, be known without training them."""
    monkeypatch.setattr(server_app, "reference", lambda: REFERENCE)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Keep], Path]:
    """Return a function that writes two sensors' weeks; ``keep(sensor, fortnight)`` says which."""
    with (fetch(SAMPLE) / FILE).open(newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["date"].startswith("2023-")]
    first = date(2023, 1, 2)

    def write(keep: Keep) -> Path:
        path = tmp_path / f"district-{len(list(tmp_path.iterdir()))}.csv"
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["date", "hour", *SENSORS])
            for line in lines:
                # A line of the file carries the day it began on, at 06:00, as a fortnight does.
                fortnight = (date.fromisoformat(line["date"]) - first) // timedelta(days=14)
                cells = [line[sensor] if keep(sensor, fortnight) else "" for sensor in SENSORS]
                writer.writerow([line["date"], line["hour"], *cells])
        return path

    return write


def run(config: Config, *, node_configs: list[NodeConfig] | None = None) -> Report:
    nodes = int(config["num-nodes"])
    grid = InProcessGrid(app, num_supernodes=nodes, run_config=config, node_configs=node_configs)
    with grid:
        return train(grid, Settings.parse(config), run_id=grid.run.run_id)


def ask(
    config: Config, node_config: NodeConfig, kind: str, *, request: CohortRequest | None = None
) -> Message:
    grid = InProcessGrid(app, num_supernodes=1, run_config=config, node_configs=[node_config])
    with grid:
        content = RecordDict({records.ARRAYS: ArrayRecord(new_model(seed=1).state_dict())})
        if request is not None:
            content[records.COHORT] = request.to_config()
        (reply,) = grid.send_and_receive([Message(content, 1000, kind)])
    return reply


# --- a run ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
def test_a_run_spends_its_budget_and_a_second_one_is_refused(config: Config) -> None:
    report = run(config)
    run_dir = Path(str(config["run-dir"]))
    assert 3.99 < report.epsilon <= 4.0
    assert (report.unit, report.relation, report.delta) == ("user", "add-or-remove-one", 1e-5)
    assert report.durable
    assert report.rounds == 4
    assert report.nodes == report.expected_nodes == 3
    assert report.not_private_held_out == 183_813
    assert report.not_private_mae is not None
    assert Report.load(run_dir) == report
    assert json.loads((run_dir / RESULT).read_text())["not_private_mae"] == report.not_private_mae
    assert (run_dir / "model.safetensors").exists()
    table = report.table()
    for words in (
        "NOT PRIVATE: people an hour, over 183813 held-out hours",
        "one sensor's fortnight ('user'), relation add-or-remove-one",
        "at most epsilon 4 at delta 1e-05",
        "all runs in the ledger",
        "this model, all units together",
    ):
        assert words in table

    ledger = (run_dir / "ledger.jsonl").read_bytes()
    with pytest.raises(RuntimeError, match=r"budget is spent \(epsilon 4 at delta 1e-05\)"):
        run(config)
    assert (run_dir / "ledger.jsonl").read_bytes() == ledger
    assert Report.load(run_dir) == report


@pytest.mark.usefixtures("quick")
def test_with_little_noise_a_few_rounds_beat_the_naive_forecast(config: Config) -> None:
    report = run(config | {"target-epsilon": 30.0, "num-server-rounds": 12, "figure-sensor": ""})
    assert report.not_private_mae < REFERENCE.naive
    assert report.not_private_figure is None


def test_a_week_is_drawn_or_said_to_be_missing(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture, quick: None
) -> None:
    pytest.importorskip("matplotlib")
    short = config | {"num-server-rounds": 1}
    report = run(short)
    assert report.not_private_figure == FIGURE
    assert (Path(str(config["run-dir"])) / FIGURE).read_bytes().startswith(b"\x89PNG")
    assert f"Figure, NOT PRIVATE: {FIGURE}" in report.table()
    for number, changes in enumerate(({"figure-sensor": "Nowhere"}, {"figure-day": "2031-01-06"})):
        report = run(short | changes | {"run-dir": str(tmp_path / f"run-{number}")})
        assert report.not_private_figure is None
        assert "No figure: no node shares hours of" in caplog.text
        caplog.clear()


@pytest.mark.usefixtures("quick")
def test_without_matplotlib_the_run_goes_on_and_says_so(
    config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "apps.smart_city.smart_city.figure", raising=False)
    report = run(config | {"num-server-rounds": 1})
    assert report.not_private_figure is None
    assert "No figure: matplotlib is not installed" in caplog.text


# --- one unit's influence ------------------------------------------------------------------------


@pytest.mark.parametrize(("sensor", "fortnight"), [(SENSORS[0], 0), (SENSORS[1], 12)])
def test_removing_a_fortnight_moves_the_nodes_sum_by_its_part_only(
    config: Config, write: Callable[[Keep], Path], sensor: str, fortnight: int
) -> None:
    dimension = ArrayLayout.of(new_model().state_dict()).dimension
    grid = IntegerGrid.for_noise_multiplier(1.0, dimension, rounding=Rounding.DITHERED)
    request = CohortRequest(
        grid=grid, clip_norm=0.15, server_round=1, sampling_rate=1.0, dither_seed=b"public"
    )

    def total(keep: Keep) -> np.ndarray:
        reply = ask(config, {"data-path": str(write(keep))}, MessageType.TRAIN, request=request)
        assert list(reply.content) == [records.INTEGER_SUM]
        return reply.content.array_records[records.INTEGER_SUM][records.SUM].numpy()

    def is_victim(of_sensor: str, of_fortnight: int) -> bool:
        return (of_sensor, of_fortnight) == (sensor, fortnight)

    part = total(lambda *unit: True) - total(lambda *unit: not is_victim(*unit))
    np.testing.assert_array_equal(part, total(is_victim))
    squared = sum(int(value) ** 2 for value in part)
    assert (0.99 * grid.clip_units) ** 2 < squared <= grid.sensitivity_units**2


# --- a node's own --------------------------------------------------------------------------------


def test_a_node_that_shares_nothing_answers_neither_errors_nor_a_week(config: Config) -> None:
    alone: NodeConfig = {"share-held-out": False}
    for kind in (f"query.{HELD_OUT}", f"query.{SENSOR_WEEK}"):
        assert ask(config, alone, kind).error.code == NodeErrorCode.NOT_IMPLEMENTED


def test_a_bad_file_stops_its_node_and_tells_the_server_nothing(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "bad.csv"
    path.write_text("date,hour,Quay\n2023-01-02,6:00-6:59,sentinel-4711\n")
    reply = ask(config, {"data-path": str(path)}, f"query.{HELD_OUT}")
    assert reply.error.code == NodeErrorCode.CLIENT_FAILED
    assert "sentinel" not in str(reply.error)
    assert "column 'Quay', line 2" in caplog.text


@pytest.mark.parametrize(
    ("node_config", "why"),
    [
        ({"data-path": 5}, "data-path=5 must be a text"),
        ({"partition-id": "x", "num-partitions": 2}, "partition-id='x'"),
        ({"partition-id": 2, "num-partitions": 2}, "partition"),
        ({}, "partition-id=None"),
    ],
)
def test_a_wrong_node_config_is_named(node_config: NodeConfig, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        District.of(node_config)


def test_the_districts_hold_every_sensor_with_its_own_counts_once() -> None:
    whole = sample_counts()
    found = {}
    for partition in range(3):
        counts = District.of({"partition-id": partition, "num-partitions": 3}).counts
        found |= dict(zip(counts.sensors, counts.counts.T, strict=True))
    assert found.keys() == set(whole.sensors)
    for column, sensor in enumerate(whole.sensors):
        np.testing.assert_array_equal(found[sensor], whole.counts[:, column])


@pytest.mark.parametrize(
    ("metric", "value"),
    [
        ("not-private.absolute-errors", float("inf")),
        ("not-private.absolute-errors", -1.0),
        ("not-private.held-out-hours", -1),
        ("not-private.held-out-hours", 1.5),
    ],
)
def test_a_malformed_evaluation_is_refused(metric: str, value: float) -> None:
    answer = HeldOutAnswer(AbsoluteErrors(1.0, 2), packaged=True)
    with pytest.raises(ValueError, match=metric):
        HeldOutAnswer.from_metrics({**answer.to_metrics(), metric: value})


def test_a_wrong_day_is_refused_by_name(config: Config) -> None:
    with pytest.raises(ValueError, match="figure-day='Monday' must be a day"):
        Settings.parse(config | {"figure-day": "Monday"})


def test_the_folder_fails_on_a_wrong_setting_and_names_it(tmp_path: Path) -> None:
    refused = run_app(APP, run_dir=tmp_path, run_config={"target-epsilon": -1.0})
    assert not refused.completed
    assert "target_epsilon=-1.0" in refused.details


@pytest.mark.slow
def test_the_same_folder_under_flwr_run_trains_the_same_model_but_for_noise(tmp_path: Path) -> None:
    # Everybody takes part, so that nothing but the noise differs.
    overrides: Config = {"num-server-rounds": 2, "expected-cohort": 546.0}
    ended = run_flower_app(
        APP,
        num_supernodes=3,
        num_cpus=1,
        log_path=tmp_path / "flower.log",
        run_config=overrides | {"run-dir": str(tmp_path / "run")},
        timeout_seconds=500,
    )
    assert ended.completed, ended.details
    report = Report.load(tmp_path / "run")
    assert report.run_id == ended.run_id
    assert (report.rounds, report.nodes) == (2, 3)
    assert report.epsilon <= 4.0
    assert report.table().splitlines()[2] in (tmp_path / "flower.log").read_text()
    for name in ("here", "again"):
        assert run_app(APP, run_dir=tmp_path / name, run_config=overrides).completed
    models = [load_model(tmp_path / name / MODEL) for name in ("here", "again", "run")]
    require_same_but_for_noise(*models)
