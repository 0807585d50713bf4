"""NumPyClients behind the adapter train under Flower's own strategy and its own engine."""

import dataclasses
import gc
import os

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord
from flwr.client import NumPyClient
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import nn
from torch.utils.data import TensorDataset

from dpfl_flower.accounting import Ledger
from dpfl_flower.client import DPSGDClient, DPSGDConfig, NodeLedger, numpy_client_app
from dpfl_flower.simulation import InProcessGrid

ROUNDS = 2


class Adds(NumPyClient):
    """Adds its own number to every array."""

    def __init__(self, number):
        self.number = number

    def fit(self, parameters, config):
        assert config["server-round"] in range(1, ROUNDS + 1) and config["lr"] == 0.1
        moved = [p + p.dtype.type(self.number) for p in parameters]
        return moved, 1 + self.number, {"number": float(self.number)}

    def evaluate(self, parameters, config):
        return float(parameters[0].mean()), 1, {"number": float(self.number)}


def adds_client_fn(context):
    return Adds(context.node_config["partition-id"]).to_client()


def dp_sgd_client_fn(context):
    generator = torch.Generator().manual_seed(context.node_config["partition-id"])
    inputs = torch.randn(30, 3, generator=generator)
    return DPSGDClient(
        nn.Linear(3, 1),
        TensorDataset(inputs, inputs.sum(1, keepdim=True)),
        config=DPSGDConfig(
            sampling_rate=1.0,
            steps_per_round=3,
            planned_rounds=ROUNDS,
            clip_norm=1.0,
            expected_batch_size=30,
            delta=1e-3,
            noise_multiplier=1.0,
        ),
        loss_fn=nn.MSELoss(reduction="none"),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5),
        ledger=NodeLedger.from_context(
            context,
            dataset="sums",
            path=f"{context.run_config['ledgers']}/{context.node_config['partition-id']}.jsonl",
        ),
    )


def start(grid, arrays):
    return FedAvg().start(
        grid, ArrayRecord(arrays), num_rounds=ROUNDS, train_config=ConfigRecord({"lr": 0.1})
    )


def test_flowers_fedavg_trains_numpy_clients_in_process():
    arrays = {"w": torch.zeros(2, 3), "b": torch.zeros(())}
    with InProcessGrid(numpy_client_app(adds_client_fn), num_supernodes=2) as grid:
        result = start(grid, arrays)
    # Weights 1 and 2, numbers 0 and 1: each round adds 2/3.
    for name, array in result.arrays.items():
        assert array.shape == tuple(arrays[name].shape)
        np.testing.assert_allclose(array.numpy(), ROUNDS * 2 / 3, rtol=1e-5)
    assert result.train_metrics_clientapp[1]["number"] == pytest.approx(2 / 3)
    assert result.evaluate_metrics_clientapp[ROUNDS]["loss"] == pytest.approx(ROUNDS * 2 / 3)


def test_flowers_fedavg_trains_dp_sgd_clients_in_process(tmp_path):
    config = {"ledgers": str(tmp_path)}
    app = numpy_client_app(dp_sgd_client_fn)
    model = nn.Linear(3, 1)
    with InProcessGrid(app, num_supernodes=2, run_config=config) as grid:
        result = start(grid, model.state_dict())
    assert not np.array_equal(result.arrays["weight"].numpy(), model.weight.detach().numpy())
    assert result.train_metrics_clientapp == {1: {}, 2: {}}
    for node in range(2):
        with Ledger.open(
            tmp_path / f"{node}.jsonl", dataset="sums", delta=1e-3, unit="example"
        ) as ledger:
            assert ledger.releases == 3 * ROUNDS


# Ray announces its own plans when it starts, and leaves files and processes to the collector.
@pytest.mark.filterwarnings("ignore::FutureWarning:ray")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.slow
def test_flowers_fedavg_trains_dp_sgd_clients_under_the_virtual_client_engine(
    tmp_path, monkeypatch
):
    """In Ray's processes; run_simulation has no run_config, so the path comes by closure."""
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))  # the engine changes it
    path, before = str(tmp_path), nn.Linear(3, 1)

    def client_fn(context):
        return dp_sgd_client_fn(dataclasses.replace(context, run_config={"ledgers": path}))

    server_app = ServerApp()
    results = []

    @server_app.main()
    def main(grid, context):
        results.append(start(grid, before.state_dict()))

    run_simulation(
        server_app,
        numpy_client_app(client_fn),
        num_supernodes=2,
        backend_config={
            "init_args": {"num_cpus": 1},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )
    gc.collect()  # what Ray left, here and not in somebody else's test
    (result,) = results
    assert list(result.arrays) == ["weight", "bias"]
    assert not np.array_equal(result.arrays["weight"].numpy(), before.weight.detach().numpy())
    for node in range(2):
        with Ledger.open(
            tmp_path / f"{node}.jsonl", dataset="sums", delta=1e-3, unit="example"
        ) as ledger:
            assert ledger.releases == 3 * ROUNDS
