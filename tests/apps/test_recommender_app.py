"""The app keeps its budget, one user moves a sum by one bounded part, and films stay at home."""

import json
import shutil
import tomllib
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MessageType, RecordDict

from apps.recommender.recommender import server_app
from apps.recommender.recommender.catalogue import FILE as CATALOGUE_FILE
from apps.recommender.recommender.client_app import app
from apps.recommender.recommender.data import FILE as RATINGS_FILE
from apps.recommender.recommender.evaluation import HELD_OUT, SHOW_FILMS
from apps.recommender.recommender.report import RESULT, Report
from apps.recommender.recommender.server_app import train
from apps.recommender.recommender.shop import SAMPLE, Shop, sample
from apps.recommender.recommender.task import BIAS, Settings
from dpfl_flower import records
from dpfl_flower.accounting import Gaussian, epsilon
from dpfl_flower.client import NodeErrorCode
from dpfl_flower.client.users import CohortRequest
from dpfl_flower.datasets import fetch
from dpfl_flower.final_model import MODEL, load_model
from dpfl_flower.quantize import IntegerGrid, Rounding
from dpfl_flower.simulation import InProcessGrid, NodeConfig, run_app, run_flower_app
from tests.support.agreement import require_same_but_for_noise

APP = Path(__file__).parents[2] / "apps" / "recommender"
FILMS = 1682
SHOPPERS = [str(number) for number in range(1, 41)]

Config = dict[str, bool | int | float | str]
Write = Callable[[Collection[str]], Path]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    text = (APP / "pyproject.toml").read_text()
    found = dict(tomllib.loads(text)["tool"]["flwr"]["app"]["config"])
    return found | {"num-server-rounds": 2, "run-dir": str(tmp_path / "run")}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a function that writes some packaged users as a node's own files."""
    packaged = fetch(SAMPLE)
    header, *lines = (packaged / RATINGS_FILE).read_text().splitlines(keepends=True)

    def write(users: Collection[str]) -> Path:
        folder = tmp_path / f"shop-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        shutil.copy(packaged / CATALOGUE_FILE, folder)
        kept = [line for line in lines if line.split("\t")[0] in users]
        (folder / RATINGS_FILE).write_text("".join([header, *kept]))
        return folder

    return write


def run(config: Config, *, node_configs: list[NodeConfig] | None = None) -> Report:
    nodes = int(config["num-nodes"])
    grid = InProcessGrid(app, num_supernodes=nodes, run_config=config, node_configs=node_configs)
    with grid:
        return train(grid, Settings.parse(config), run_id=grid.run.run_id)


def model(seed: int = 1) -> ArrayRecord:
    bias = np.random.default_rng(seed).normal(0, 0.3, FILMS).astype(np.float32)
    return ArrayRecord({BIAS: Array(bias)})


def ask(
    config: Config, node_config: NodeConfig, kind: str, *, request: CohortRequest | None = None
) -> Message:
    grid = InProcessGrid(app, num_supernodes=1, run_config=config, node_configs=[node_config])
    with grid:
        content = RecordDict({records.ARRAYS: model()})
        if request is not None:
            content[records.COHORT] = request.to_config()
        (reply,) = grid.send_and_receive([Message(content, 1000, kind)])
    return reply


# --- a run ---------------------------------------------------------------------------------------


def test_a_run_spends_its_budget_and_no_more_and_says_what_its_figures_mean(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run(config)
    run_dir = Path(str(config["run-dir"]))
    assert 7.99 < report.epsilon <= 8.0
    assert (report.unit, report.relation, report.delta) == ("user", "add-or-remove-one", 1e-5)
    assert report.durable
    assert report.rounds == 2
    assert report.nodes == report.expected_nodes == 2
    assert Report.load(run_dir) == report
    assert json.loads((run_dir / RESULT).read_text())["not_private_rmse"] == report.not_private_rmse
    assert (run_dir / "model.safetensors").exists()
    # Less noise a round than in the full run: two rounds are already worth more than none.
    assert report.not_private_reference is not None
    assert report.not_private_reference.together < report.not_private_rmse
    assert report.not_private_rmse < report.not_private_reference.alone
    table = report.table()
    for words in (
        "NOT PRIVATE: stars, on 19932 held-out ratings",
        "one user (all ratings of one person), relation add-or-remove-one",
        "at most epsilon 8 at delta 1e-05",
        "all runs in the ledger",
        "this model, all ratings together",
    ):
        assert words in table
    shown = capsys.readouterr().out
    assert shown.count("For user 1 only") == 1
    assert shown.count(" stars  ") == 10


def test_epsilon_agrees_with_what_the_ledger_holds(config: Config) -> None:
    report = run(config)
    lines = (Path(str(config["run-dir"])) / "ledger.jsonl").read_text().splitlines()
    found = [float(p.split(":")[1]) for p in _parts(lines) if p.startswith("noise_multiplier:")]
    assert len(set(found)) == 1
    events = [Gaussian(found[0])] * 2
    alone = epsilon(events, delta=1e-5, relation="add-or-remove-one")
    assert report.epsilon == pytest.approx(alone, rel=1e-4)


def _parts(lines: list[str]) -> list[str]:
    return [
        p
        for line in lines
        for p in line.replace('"', "")
        .replace(" ", "")
        .translate(str.maketrans("{}", ",,"))
        .split(",")
    ]


def test_a_second_run_on_the_same_users_is_refused(config: Config) -> None:
    first = run(config)
    run_dir = Path(str(config["run-dir"]))
    ledger = (run_dir / "ledger.jsonl").read_bytes()
    with pytest.raises(RuntimeError, match=r"budget is spent \(epsilon 8 at delta 1e-05\)"):
        run(config)
    assert (run_dir / "ledger.jsonl").read_bytes() == ledger
    assert Report.load(run_dir) == first


def test_the_folder_runs_unchanged_and_fails_when_its_budget_is_spent(tmp_path: Path) -> None:
    overrides = {"num-server-rounds": 1, "sample-user": ""}
    assert run_app(APP, run_dir=tmp_path, run_config=overrides).completed
    assert Report.load(tmp_path).rounds == 1
    again = run_app(APP, run_dir=tmp_path, run_config=overrides)
    assert not again.completed
    assert "the budget is spent" in again.details


# --- one user's influence ------------------------------------------------------------------------


@pytest.mark.parametrize(("victim", "clipped"), [("1", True), ("13", False), ("37", True)])
def test_removing_a_user_moves_the_nodes_sum_by_that_users_part_only(
    config: Config, write: Write, victim: str, clipped: bool
) -> None:
    grid = IntegerGrid.for_noise_multiplier(2.0, FILMS, rounding=Rounding.DITHERED)
    request = CohortRequest(
        grid=grid, clip_norm=1.0, server_round=1, sampling_rate=1.0, dither_seed=b"public"
    )

    def total(users: Collection[str]) -> np.ndarray:
        reply = ask(config, {"data-path": str(write(users))}, MessageType.TRAIN, request=request)
        assert list(reply.content) == [records.INTEGER_SUM]
        return reply.content.array_records[records.INTEGER_SUM][records.SUM].numpy()

    part = total(SHOPPERS) - total([user for user in SHOPPERS if user != victim])
    np.testing.assert_array_equal(part, total([victim]))
    squared = sum(int(value) ** 2 for value in part)
    assert 0 < squared <= grid.sensitivity_units**2
    assert (squared > (0.99 * grid.clip_units) ** 2) is clipped


# --- a node's own --------------------------------------------------------------------------------


def test_films_are_shown_at_the_users_node_and_nothing_is_sent(
    config: Config, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    here = {"data-path": str(write(SHOPPERS))}
    replies = [
        ask(config | {"sample-user": user}, here, f"query.{SHOW_FILMS}") for user in ("7", "999")
    ]
    shown = capsys.readouterr().out
    assert "For user 7 only, from this user's own ratings" in shown
    assert "999" not in shown
    # Whether the user lives there cannot be told from the answers.
    assert all(reply.has_content() and not reply.content for reply in replies)


def test_a_node_with_its_own_files_has_no_reference_and_may_share_nothing(
    config: Config, write: Write
) -> None:
    folders = [write(SHOPPERS[:20]), write(SHOPPERS[20:])]
    report = run(
        config | {"num-users": 40, "dataset": "two shops", "sample-user": ""},
        node_configs=[
            {"data-path": str(folders[0])},
            {"data-path": str(folders[1]), "share-held-out": False},
        ],
    )
    assert report.not_private_reference is None
    assert report.not_private_rmse is not None
    assert (report.nodes, report.expected_nodes) == (1, 2)
    assert report.dataset == "two shops"
    assert "of 1 of 2 nodes" in report.table()


def test_a_bad_file_stops_its_node_and_tells_the_server_nothing(
    config: Config, write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write(["1"])
    with (folder / RATINGS_FILE).open("a") as file:
        file.write("sentinel-4711\t1\t9\t0\n")
    reply = ask(config, {"data-path": str(folder)}, f"query.{HELD_OUT}")
    assert reply.error.code == NodeErrorCode.CLIENT_FAILED
    assert "sentinel" not in str(reply.error)
    assert "column 'rating'" in caplog.text


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
        Shop.of(node_config)


def test_every_packaged_user_lives_on_one_node() -> None:
    here = [
        user.user
        for partition in range(3)
        for user in Shop.of({"partition-id": partition, "num-partitions": 3}).users
    ]
    assert sorted(here) == sorted(user.user for user in sample().users)


@pytest.mark.parametrize(
    ("metric", "value"),
    [
        ("not-private.squared-errors", float("nan")),
        ("not-private.squared-errors", -1.0),
        ("not-private.held-out-ratings", -1),
        ("not-private.held-out-ratings", 1.5),
    ],
)
def test_a_malformed_evaluation_is_refused(metric: str, value: float) -> None:
    answer = server_app.HeldOutAnswer(server_app.SquaredErrors(1.0, 2), packaged=True)
    with pytest.raises(ValueError, match=metric):
        server_app.HeldOutAnswer.from_metrics({**answer.to_metrics(), metric: value})


@pytest.mark.slow
def test_the_same_folder_under_flwr_run_trains_the_same_model_but_for_noise(tmp_path: Path) -> None:
    overrides: Config = {"num-server-rounds": 2, "sample-user": ""}
    lines: list[str] = []
    ended = run_flower_app(
        APP,
        num_supernodes=2,
        num_cpus=1,
        log_path=tmp_path / "flower.log",
        run_config=overrides | {"run-dir": str(tmp_path / "run")},
        flwr_home=tmp_path / "home",
        on_line=lines.append,
        timeout_seconds=500,
    )
    assert ended.completed, ended.details
    assert ended.details == ""
    assert ended.log_path.read_text(encoding="utf-8").splitlines() == lines
    assert (tmp_path / "home" / "state.db").exists()
    report = Report.load(tmp_path / "run")
    assert report.run_id == ended.run_id
    assert (report.rounds, report.nodes) == (2, 2)
    assert report.epsilon <= 8.0
    assert report.table().splitlines()[2] in (tmp_path / "flower.log").read_text()
    for name in ("here", "again"):
        assert run_app(APP, run_dir=tmp_path / name, run_config=overrides).completed
    models = [load_model(tmp_path / name / MODEL) for name in ("here", "again", "run")]
    require_same_but_for_noise(*models)
