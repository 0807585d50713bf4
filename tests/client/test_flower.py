"""NumPyClients behind the adapter train under Flower's own strategy.

In this process; on Flower's own engine: tests/simulation/test_virtual_engine.py.
"""

import numpy as np
import pytest
import torch
from flwr.client import NumPyClient
from torch import nn

from dpfl_flower.accounting import Ledger
from dpfl_flower.client import numpy_client_app
from dpfl_flower.simulation import InProcessGrid
from tests.support.sums_clients import DELTA, ROUNDS, STEPS, client_fn, start


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
    app = numpy_client_app(client_fn)
    model = nn.Linear(3, 1)
    with InProcessGrid(app, num_supernodes=2, run_config=config) as grid:
        result = start(grid, model.state_dict())
    assert not np.array_equal(result.arrays["weight"].numpy(), model.weight.detach().numpy())
    assert result.train_metrics_clientapp == {1: {}, 2: {}}
    for node in range(2):
        with Ledger.open(
            tmp_path / f"{node}.jsonl", dataset="sums", delta=DELTA, unit="example"
        ) as ledger:
            assert ledger.releases == STEPS * ROUNDS
