"""Users with made-up records, and models for them."""

import numpy as np
import torch
from torch import nn

from dpfl_flower.client.users import CohortRequest, LocalTraining
from dpfl_flower.quantize import IntegerGrid

PER_RECORD = nn.CrossEntropyLoss(reduction="none")


class Words(nn.Module):
    """Embedding, normalisation, and a forward pass of its own."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 12)
        self.norm = nn.LayerNorm(12)
        self.hidden = nn.Linear(12, 7)
        self.out = nn.Linear(7, 3)

    def forward(self, words):
        return self.out(nn.functional.gelu(self.hidden(self.norm(self.embed(words).mean(1)))))


def mlp():
    return nn.Sequential(
        nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2)
    )


def odd():
    # No size is a multiple of anything: slots would begin anywhere.
    return nn.Sequential(
        nn.Linear(31, 16),
        nn.Sigmoid(),
        nn.Linear(16, 17),
        nn.LayerNorm(17),
        nn.Linear(17, 9),
        nn.GELU(),
        nn.GroupNorm(3, 9),
        nn.SiLU(),
        nn.Linear(9, 3),
    )


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 8, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(72, 256),
        nn.ReLU(),
        nn.Linear(256, 3),
    )


def words():
    return Words()


SHAPES = {mlp: ((30,), 2), odd: ((31,), 3), cnn: ((1, 18, 18), 3), words: ((4,), 3)}
"""The shape of one record's input and the number of classes."""


def records_of(model_fn, count, seed, scale=1.0):
    """One user's records: inputs and classes."""
    shape, classes = SHAPES[model_fn]
    generator = torch.Generator().manual_seed(seed)
    if model_fn is words:
        inputs = torch.randint(0, 50, (count, *shape), generator=generator)
    else:
        inputs = scale * torch.randn((count, *shape), generator=generator)
    return inputs, torch.randint(0, classes, (count,), generator=generator)


def example_of(model_fn):
    return [part[0] for part in records_of(model_fn, 1, 0)]


def recipe(**changes):
    arguments = {"lr": 0.1, "batch_size": 7, "loss_fn": PER_RECORD} | changes
    return LocalTraining(**arguments)


def global_arrays(model_fn, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return {name: t.numpy().copy() for name, t in model_fn().state_dict().items()}


def dimension(model_fn):
    return sum(p.numel() for p in model_fn().parameters())


def request_for(size, *, clip_norm=0.4, noise_multiplier=1.0, server_round=1, **changes):
    grid = changes.pop("grid", None) or IntegerGrid.for_noise_multiplier(noise_multiplier, size)
    if "users" not in changes:
        changes.setdefault("sampling_rate", 1.0)
    return CohortRequest(grid=grid, clip_norm=clip_norm, server_round=server_round, **changes)


def flat_update(update):
    """An engine's update as one float array."""
    values = [np.asarray(torch.as_tensor(v)).reshape(-1) for v in update.values]
    if update.reference is not None:
        reference = [np.asarray(torch.as_tensor(v)).reshape(-1) for v in update.reference]
        values = [v - r for v, r in zip(values, reference, strict=True)]
    return np.concatenate(values)


def updates_by_user(engine, members, arrays, server_round=1):
    """The engine's updates, by user; copied, since each is valid only until the next."""
    return {
        update.user: flat_update(update).copy()
        for update in engine.updates(members, arrays, server_round=server_round)
    }
