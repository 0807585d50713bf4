"""Dropout in checks on a model: the same masks twice, or none.

>>> model = nn.Sequential(nn.Dropout(0.5))
>>> with same_masks(torch.device("cpu")):
...     first = model(torch.ones(8))
>>> with same_masks(torch.device("cpu")):
...     torch.equal(first, model(torch.ones(8)))
True
>>> with without_dropout(model):
...     model(torch.ones(2))
tensor([1., 1.])
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from dpfl_flower.client.torch_seed import forked_seeds, seed_torch

__all__ = ["nn", "same_masks", "torch", "without_dropout"]


@contextmanager
def same_masks(device: torch.device) -> Iterator[None]:
    """Draw from torch the same in each such block, and leave its generators as they were."""
    with forked_seeds(device):
        seed_torch(0, device)
        yield


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Set the rates of the dropout layers to 0, and those of torch's attention, in the block."""
    layers: list[tuple[nn.Module, str, float]] = [
        (m, "p", m.p) for m in model.modules() if isinstance(m, _DropoutNd)
    ]
    layers += [
        (m, "dropout", m.dropout) for m in model.modules() if isinstance(m, nn.MultiheadAttention)
    ]
    try:
        for layer, name, _ in layers:
            setattr(layer, name, 0.0)
        yield
    finally:
        for layer, name, rate in layers:
            setattr(layer, name, rate)
