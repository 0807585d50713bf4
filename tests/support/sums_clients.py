"""NumPyClients that learn to add up, each from data of its own, by DP-SGD under Flower's FedAvg."""

from collections.abc import Mapping

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.client import Client
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from flwr.serverapp.strategy.result import Result
from torch import nn
from torch.utils.data import TensorDataset

from dpfl_flower.client import DPSGDClient, DPSGDConfig, NodeLedger

ROUNDS = 2
STEPS = 3
DELTA = 1e-3


def client_fn(context: Context) -> Client:
    """Return a node's client; its ledger is in the folder that the run config names."""
    number = context.node_config["partition-id"]
    inputs = torch.randn(30, 3, generator=torch.Generator().manual_seed(number))
    return DPSGDClient(
        nn.Linear(3, 1),
        TensorDataset(inputs, inputs.sum(1, keepdim=True)),
        config=DPSGDConfig(
            sampling_rate=1.0,
            steps_per_round=STEPS,
            planned_rounds=ROUNDS,
            clip_norm=1.0,
            expected_batch_size=30,
            delta=DELTA,
            noise_multiplier=1.0,
        ),
        loss_fn=nn.MSELoss(reduction="none"),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5),
        ledger=NodeLedger.from_context(
            context, dataset="sums", path=f"{context.run_config['ledgers']}/{number}.jsonl"
        ),
    ).to_client()


def start(grid: Grid, arrays: Mapping[str, torch.Tensor]) -> Result:
    """Train ``arrays`` under Flower's own FedAvg."""
    return FedAvg().start(
        grid, ArrayRecord(arrays), num_rounds=ROUNDS, train_config=ConfigRecord({"lr": 0.1})
    )
