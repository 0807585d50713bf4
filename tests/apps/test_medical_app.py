"""The app keeps its budget, says whose epsilon it is, and lets nothing of a patient's row leave."""

import csv
import dataclasses
import math
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message, RecordDict
from scipy.optimize import brentq
from scipy.stats import norm

from apps.medical.medical.client_app import app
from apps.medical.medical.hospital import ledger_path
from apps.medical.medical.patients import HOSPITALS, Patient, sample_patients
from apps.medical.medical.reference import train_reference
from apps.medical.medical.report import RESULT, Report
from apps.medical.medical.server_app import IterateAverage, train
from apps.medical.medical.settings import Settings
from apps.medical.medical.split import Split
from apps.medical.medical.task import LOSS, new_model, tensors
from dpfl_flower.client import DPSGDConfig, NodeErrorCode
from dpfl_flower.client.per_example import per_example_clipper
from dpfl_flower.simulation import Fault, InProcessGrid, NodeConfig

APP = Path(__file__).parents[2] / "apps" / "medical"
ROUNDS = 3

Config = dict[str, bool | int | float | str]


def app_config() -> Config:
    return dict(
        tomllib.loads((APP / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    )


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return app_config() | {"num-server-rounds": ROUNDS, "run-dir": str(tmp_path / "run")}


def run(
    config: Config,
    *,
    node_configs: list[NodeConfig] | None = None,
    fault: Callable[[Message], Fault | None] | None = None,
) -> Report:
    nodes = int(config["num-hospitals"])
    grid = InProcessGrid(
        app, num_supernodes=nodes, run_config=config, node_configs=node_configs, fault=fault
    )
    with grid:
        return train(grid, Settings.parse(config), run_id=grid.run.run_id)


def gaussian_epsilon(total_noise_multiplier: float, delta: float) -> float:
    """Return epsilon of one Gaussian release (Balle and Wang, arXiv 1805.06530, Theorem 8)."""
    mu = 1 / total_noise_multiplier

    def excess(epsilon: float) -> float:
        low = math.exp(epsilon + norm.logcdf(-mu / 2 - epsilon / mu))
        return norm.cdf(mu / 2 - epsilon / mu) - low - delta

    return float(brentq(excess, 0, 100))


def write(path: Path, hospital: str, changes: dict[int, dict[str, str]] | None = None) -> Path:
    """Write a hospital's packaged patients as a CSV file of its own, some cells changed."""
    header = ["id", "age", "sex", "cp", "trestbps", "chol", "fbs", "restecg"]
    header += ["thalch", "exang", "oldpeak", "num"]

    def cells(p: Patient) -> list[object]:
        row = [p.id, p.age, "Male" if p.male else "Female", p.chest_pain, p.resting_pressure]
        row += [p.cholesterol, p.high_blood_sugar, p.resting_ecg, p.max_heart_rate]
        row += [p.exercise_angina, p.st_depression, int(p.diseased)]
        return ["" if cell is None else str(cell) for cell in row]

    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for number, patient in enumerate(sample_patients(hospital)):
            row = dict(zip(header, cells(patient), strict=True))
            writer.writerow((row | (changes or {}).get(number, {})).values())
    return path


# --- what it costs -------------------------------------------------------------------------------


def test_every_hospital_spends_its_budget_and_no_more(config: Config) -> None:
    report = run(config)
    assert [hospital.dataset for hospital in report.hospitals] == [
        f"heart-disease/{name}" for name in HOSPITALS
    ]
    for hospital in report.hospitals:
        assert 0.999 < hospital.epsilon <= 1.0
        assert hospital.delta == 1e-4
        assert hospital.durable
    assert report.worst_epsilon == max(hospital.epsilon for hospital in report.hospitals)
    assert (report.unit, report.relation) == ("example", "add-or-remove-one")


def test_epsilon_agrees_with_an_independent_computation(config: Config) -> None:
    report = run(config)
    each_round = Settings.parse(config).dp_sgd().resolve_noise_multiplier()
    one_hospital = gaussian_epsilon(each_round / math.sqrt(ROUNDS), 1e-4)
    all_hospitals = gaussian_epsilon(each_round / math.sqrt(ROUNDS * 4), 1e-4)
    assert report.worst_epsilon == pytest.approx(one_hospital, abs=1e-3)
    assert report.epsilon_everywhere == pytest.approx(all_hospitals, abs=1e-3)
    assert report.epsilon_everywhere == pytest.approx(2.21, abs=0.01)  # not 4 x 1


def test_a_second_run_on_the_same_patients_is_refused(config: Config) -> None:
    run_dir = Path(str(config["run-dir"]))
    first = run(config)
    ledgers = {path: path.read_bytes() for path in (run_dir / "ledgers").glob("*.jsonl")}
    assert set(ledgers) == {ledger_path(run_dir, name) for name in HOSPITALS}
    with pytest.raises(
        RuntimeError, match=r"no hospital trains.*budget \(epsilon 1 at delta 0\.0001"
    ):
        run(config)
    for path, content in ledgers.items():
        charges = [line for line in path.read_bytes().splitlines() if b'"charge"' in line]
        assert len(charges) == ROUNDS
        assert path.read_bytes().startswith(content)
    assert Report.load(run_dir) == first


def test_a_hospital_trains_within_its_own_policy_only(config: Config, tmp_path: Path) -> None:
    report = run(
        config,
        node_configs=[
            {},
            {"max-epsilon": 0.6, "max-delta": 1e-4, "ledger-path": str(tmp_path / "hungary.jsonl")},
            {},
            {"min-noise-multiplier": 99.0},
        ],
    )
    spent = {hospital.dataset.split("/")[1]: hospital.epsilon for hospital in report.hospitals}
    assert set(spent) == {"Cleveland", "Hungary", "Switzerland"}
    assert 0 < spent["Hungary"] <= 0.6 < spent["Cleveland"]


# --- what it is worth ----------------------------------------------------------------------------


def test_without_noise_and_clipping_the_federation_is_the_pooled_model(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    private = Settings.dp_sgd

    def without_noise(settings: Settings) -> DPSGDConfig:
        return dataclasses.replace(private(settings), target_epsilon=None, noise_multiplier=0.0)

    monkeypatch.setattr(Settings, "dp_sgd", without_noise)
    report = run(config | {"clip-norm": 8.0, "num-server-rounds": 10})
    assert report.not_private_auc == pytest.approx(report.not_private_reference_auc, abs=1e-3)
    for hospital in report.hospitals:
        assert hospital.not_private_auc == pytest.approx(
            hospital.not_private_reference_auc, abs=5e-3
        )


def test_the_reference_is_logistic_regression_by_momentum(config: Config) -> None:
    settings = Settings.parse(config | {"num-server-rounds": 10})
    parts = [Split.of(sample_patients(name), seed=settings.split_seed) for name in HOSPITALS]
    x, y = (t.double().numpy() for t in tensors(sum((p.training for p in parts), ())).tensors)
    x = np.c_[x, np.ones(len(x))]
    weights, velocity, kept = np.zeros((16, 1)), np.zeros((16, 1)), []
    for _ in range(10):
        gradient = x.T @ (1 / (1 + np.exp(-x @ weights)) - y) / 736
        velocity = 0.9 * velocity + gradient
        weights = weights - 0.5 * velocity
        kept.append(weights)
    model = train_reference(settings)
    found = np.r_[model.weight.detach().numpy().ravel(), model.bias.detach().numpy()]
    np.testing.assert_allclose(found, np.mean(kept[5:], axis=0).ravel(), atol=1e-5)


def test_the_average_is_over_the_second_half_of_the_rounds() -> None:
    average = IterateAverage(first_round=3)
    with pytest.raises(RuntimeError, match="no model of round 3 or later"):
        average.mean()
    for number in range(5):
        model = ArrayRecord([np.full(2, float(number), dtype=np.float32)])
        assert average.observe(number, model) is None
    (array,) = average.mean().to_numpy_ndarrays()
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, [3.5, 3.5])


def test_a_hospital_that_never_answers_is_missing_from_the_report(config: Config) -> None:
    def silent(message: Message) -> Fault | None:
        return Fault.SILENT if message.metadata.dst_node_id == 1002 else None

    report = run(config, fault=silent)
    assert [h.dataset.split("/")[1] for h in report.hospitals] == [
        "Cleveland",
        "Hungary",
        "VA Long Beach",
    ]
    assert "3 of 4 hospitals trained" in report.table()


# --- a hospital's own file -----------------------------------------------------------------------


def test_a_hospitals_own_file_trains_as_its_own_data_set(config: Config, tmp_path: Path) -> None:
    path = write(tmp_path / "bern.csv", "Hungary")
    ledger = tmp_path / "at-the-hospital" / "ledger.jsonl"
    ledger.parent.mkdir()
    report = run(
        config | {"num-hospitals": 2},
        node_configs=[
            {"data-path": str(path)},
            {"data-path": str(path), "hospital": "Basel", "ledger-path": str(ledger)},
        ],
    )
    basel, bern = report.hospitals
    assert (basel.dataset, basel.durable) == ("Basel", True)
    assert (bern.dataset, bern.durable) == ("bern", False)
    assert ledger.exists()
    # The server, which chooses run-dir, does not choose where a hospital keeps its ledger.
    assert not (Path(str(config["run-dir"])) / "ledgers").exists()
    # What is not packaged cannot be pooled for comparison.
    assert report.not_private_reference_auc is None
    assert "this run only" in report.table()
    assert "n/a" in report.table()


def test_a_file_like_the_packaged_one_gives_the_same_patients(tmp_path: Path) -> None:
    from apps.medical.medical.patients import read_patients

    assert read_patients(write(tmp_path / "h.csv", "Hungary")) == sample_patients("Hungary")


def test_a_hospital_may_keep_its_held_out_patients_to_itself(config: Config) -> None:
    report = run(config, node_configs=[{"share-held-out": False}, {}, {}, {}])
    assert report.hospitals[0].not_private_auc is None
    assert all(hospital.not_private_auc is not None for hospital in report.hospitals[1:2])
    assert report.not_private_auc is not None


def test_a_bad_file_stops_its_hospital_and_tells_the_server_nothing(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "bad.csv", "Hungary", {17: {"age": "sentinel-4711"}})
    grid = InProcessGrid(
        app, num_supernodes=1, run_config=config, node_configs=[{"data-path": str(path)}]
    )
    with grid:
        arrays = ArrayRecord(new_model().state_dict())
        ask = Message(RecordDict({"arrays": arrays}), 1000, "train")
        (reply,) = grid.send_and_receive([ask])
    assert reply.error.code == NodeErrorCode.CLIENT_FAILED
    assert "sentinel" not in str(reply.error)
    # The hospital's own log names column and row.
    assert "column 'age', row 19: 'sentinel-4711' is not a number" in caplog.text


@pytest.mark.parametrize(
    ("node_config", "why"),
    [
        ({"data-path": 5}, "node config data-path=5 must be a text"),
        ({"partition-id": 4}, "partition-id=4 must be from 0 to 3"),
        ({"partition-id": "x"}, "partition-id='x' must be from 0 to 3"),
    ],
)
def test_a_wrong_node_config_is_named_in_the_hospitals_log(
    config: Config, node_config: NodeConfig, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(RuntimeError, match="no hospital trains"):
        run(config | {"num-hospitals": 1}, node_configs=[node_config])
    assert why in caplog.text


# --- one patient's influence ---------------------------------------------------------------------


def clipped_sum(patients: tuple[Patient, ...], clip_norm: float) -> np.ndarray:
    model = new_model()
    with torch.no_grad():
        model.weight += 0.3
    with per_example_clipper(model, LOSS, clip_norm=clip_norm) as clipper:
        parts = clipper.clipped_sum(tensors(patients).tensors)
    return torch.cat([part.ravel() for part in parts]).double().numpy()


@pytest.mark.parametrize("number", [0, 100, 292])
def test_one_patient_moves_the_clipped_sum_by_at_most_the_clip_norm(number: int) -> None:
    patients = sample_patients("Hungary")
    without = patients[:number] + patients[number + 1 :]
    moved = np.linalg.norm(clipped_sum(patients, 0.5) - clipped_sum(without, 0.5))
    assert 0.01 < moved <= 0.5 * (1 + 1e-4)


# --- configuration and report --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num-server-rounds", 0),
        ("num-server-rounds", 3.0),
        ("num-hospitals", True),
        ("learning-rate", -1.0),
        ("learning-rate", "fast"),
        ("server-momentum", -0.1),
        ("clip-norm", 0.0),
        ("expected-patients", 0),
        ("target-epsilon", 0.0),
        ("target-delta", 1.0),
        ("split-seed", -1),
        ("run-dir", 7),
    ],
)
def test_a_wrong_setting_is_refused_by_name(config: Config, key: str, value: object) -> None:
    name = {"num-server-rounds": "num_rounds|num-server", "expected-patients": "expected_batch"}
    expected = name.get(key, f"{key}|{key.replace('-', '_')}|{key.removeprefix('target-')}")
    with pytest.raises(ValueError, match=expected):
        Settings.parse(config | {key: value})


def test_a_missing_setting_is_named(config: Config) -> None:
    del config["clip-norm"]
    with pytest.raises(ValueError, match="run config clip-norm=None must be of type float"):
        Settings.parse(config)


def test_a_report_survives_its_file(config: Config) -> None:
    report = run(config)
    assert Report.load(Path(str(config["run-dir"]))) == report
    assert (Path(str(config["run-dir"])) / RESULT).exists()


def test_the_table_says_what_its_figures_mean(config: Config) -> None:
    table = run(config).table()
    for words in (
        "NOT PRIVATE: measured on held-out patients",
        "one patient (one row, 'example')",
        "add-or-remove-one",
        "delta 0.0001",
        "all runs in its ledger",
        "1 (worst)",
        "seen in all 4 at most epsilon 2.21",
    ):
        assert words in table
