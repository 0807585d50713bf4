"""DP-SGD runs where its noise is drawn: on the CPU or on a CUDA device, and nowhere else."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from dpfl_flower.client import DPSGDClient, DPSGDConfig, NodeLedger, StackedDPSGD
from dpfl_flower.client.training_device import training_device

CONFIG = DPSGDConfig(
    sampling_rate=0.5,
    steps_per_round=1,
    planned_rounds=10,
    clip_norm=1.0,
    expected_batch_size=10,
    delta=1e-3,
    noise_multiplier=2.0,
)
COMMON = {
    "config": CONFIG,
    "loss_fn": nn.MSELoss(reduction="none"),
    "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
}


def records():
    return TensorDataset(torch.zeros(20, 3), torch.zeros(20, 1))


@pytest.mark.parametrize("device", ["mps", "xpu", "meta", torch.device("mps")])
def test_other_devices_are_refused_by_name(device):
    named = rf"device='{device}' must be 'cpu' or a CUDA device"
    with pytest.raises(ValueError, match=named):
        DPSGDClient(nn.Linear(3, 1), records(), ledger=NodeLedger("a"), device=device, **COMMON)
    with pytest.raises(ValueError, match=named):
        StackedDPSGD(
            [nn.Sequential(nn.Linear(3, 1))],
            [records()],
            ledgers=[NodeLedger("a")],
            example=(torch.zeros(3), torch.zeros(1)),
            device=device,
            **COMMON,
        )


def test_cuda_is_taken_where_there_is_one(monkeypatch):
    assert training_device("cuda:1") == torch.device("cuda", 1)
    for there, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert training_device(None) == torch.device(expected)
