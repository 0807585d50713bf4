"""Four hospitals that each add a share: one noisy sum, its price and its worth."""

import dataclasses
import tomllib
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message

from apps.medical.medical.client_app import app
from apps.medical.medical.distributed import gradient_step
from apps.medical.medical.features import FEATURES
from apps.medical.medical.hospital import ledger_path
from apps.medical.medical.patients import HOSPITALS
from apps.medical.medical.report import Report
from apps.medical.medical.server_app import train
from apps.medical.medical.settings import Settings
from apps.medical.medical.task import LOSS, new_model
from dpfl_flower.accounting import Composed, Ledger, Relation, epsilon
from dpfl_flower.client.users import app as users_app
from dpfl_flower.simulation import Fault, InProcessGrid, NodeConfig

APP = Path(__file__).parents[2] / "apps" / "medical"

Config = dict[str, bool | int | float | str]


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(users_app, "_cohorts", {})


@pytest.fixture
def config(tmp_path: Path) -> Config:
    found = tomllib.loads((APP / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    return found | {"trust": "distributed", "run-dir": str(tmp_path / "run")}


def run(
    config: Config, *, node_configs: list[NodeConfig] | None = None, fault: object = None
) -> Report:
    grid = InProcessGrid(
        app,
        num_supernodes=4,
        run_config=config,
        node_configs=node_configs,
        fault=fault,  # type: ignore[arg-type]
    )
    with grid:
        return train(grid, Settings.parse(config), run_id=grid.run.run_id)


def test_distributed_noise_is_worth_what_a_trusted_curator_would_give(config: Config) -> None:
    """AUC at least 0.85 at (1, 1e-4), as printed by the table.

    Over six splits it was 0.856 to 0.920, mean 0.877. The noise is fresh in every run: on split 3,
    ten runs gave 0.918 with a standard deviation of 0.002, so that none fails by chance.
    """
    report = run(config | {"split-seed": 3})
    assert report.not_private_auc is not None and report.not_private_auc >= 0.85
    assert report.rounds == 30
    run_dir = Path(str(config["run-dir"]))
    for hospital, name in zip(report.hospitals, HOSPITALS, strict=True):
        assert hospital.dataset == f"heart-disease/{name}"
        assert 0.99 < hospital.epsilon <= 1.0
        with Ledger.open(
            ledger_path(run_dir, name), dataset=hospital.dataset, delta=1e-4, unit="example"
        ) as ledger:
            [rounds] = ledger.events()
            assert ledger.releases == 30
    assert isinstance(rounds, Composed)
    # The event is one sum in all four ledgers: a patient of all four moves it four times as far.
    moved = dataclasses.replace(
        rounds.event,
        l2_sensitivity=4 * rounds.event.l2_sensitivity,
        l1_sensitivity=4 * rounds.event.l1_sensitivity,
    )
    everywhere = epsilon([Composed(moved, 30)], delta=1e-4, relation=Relation.ADD_OR_REMOVE_ONE)
    assert report.epsilon_everywhere == pytest.approx(everywhere, rel=1e-6)
    assert report.epsilon_everywhere == pytest.approx(4.88, abs=0.05)  # not 4 x 1, and not 2.21


def test_the_budgets_are_spent_afterwards(config: Config) -> None:
    short = config | {"num-server-rounds": 2}
    run(short)
    with pytest.raises(RuntimeError, match="no hospital trains"):
        run(short)


def test_a_hospital_may_fall_silent_and_two_may_not(config: Config) -> None:
    short = config | {"num-server-rounds": 2}

    def fault(message: Message) -> Fault | None:
        silent = message.metadata.dst_node_id == 1001
        return Fault.SILENT if silent else None

    assert len(run(short, fault=fault).hospitals) == 3

    def faults(message: Message) -> Fault | None:
        silent = message.metadata.dst_node_id in (1001, 1002)
        return Fault.SILENT if silent else None

    with pytest.raises(RuntimeError, match="no hospital trains"):
        run(short | {"run-dir": str(config["run-dir"]) + "2"}, fault=faults)


def test_a_hospital_may_demand_more_than_the_others(config: Config) -> None:
    short = config | {"num-server-rounds": 2}
    report = run(short, node_configs=[{}, {}, {}, {"min-share-multiplier": 99.0}])
    spent = {h.dataset.split("/")[1]: h.epsilon for h in report.hospitals}
    assert spent.pop("VA Long Beach") == 0
    assert all(0.9 < value <= 1.0 for value in spent.values())


def test_one_patients_step_is_the_gradient_of_the_loss() -> None:
    import torch

    generator = np.random.default_rng(1)
    x, y = generator.normal(size=len(FEATURES)), np.float64(1.0)
    model = new_model().double()
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(generator.normal(size=(1, len(FEATURES)))))
        model.bias.fill_(0.3)
    LOSS(model(torch.from_numpy(x)[None]), torch.tensor([[y]])).sum().backward()
    arrays = {name: p.detach().numpy() for name, p in model.named_parameters()}
    stepped = gradient_step(arrays, (x, y))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        np.testing.assert_allclose(arrays[name] - stepped[name], parameter.grad, atol=1e-12)


@pytest.mark.parametrize(
    ("key", "value"),
    [("trust", "central"), ("min-hospitals", 5), ("min-hospitals", 0), ("rosters", 1)],
)
def test_a_wrong_setting_is_refused(config: Config, key: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{value}"):
        Settings.parse(config | {key: value})  # type: ignore[dict-item]


def test_a_trust_that_there_is_not_is_refused_with_those_that_there_are(config: Config) -> None:
    with pytest.raises(ValueError, match=r"trust='secure' .* \['local', 'distributed'\]"):
        Settings.parse(config | {"trust": "secure"})
