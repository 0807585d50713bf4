"""The round that all rivals run: data, models, recipe and privacy, alike in every process.

Imports nothing but torch, since it runs in an environment of pfl's own as well.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

USERS = 1000
SAMPLES = 50
COHORT = 50
BATCH_SIZE = 10
LEARNING_RATE = 0.1
CLIP_NORM = 0.4
# pfl's benchmarks calibrate for a cohort of 1000 of 1e6 users, 1500 rounds, (2, 1e-6), and scale
# the noise down to a simulated cohort of 50.
NOISE_MULTIPLIER = 0.0308


def cnn() -> nn.Module:
    """612,042 parameters."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 6 * 6, 256),
        nn.ReLU(),
        nn.Linear(256, 10),
    )


def mlp() -> nn.Module:
    """4,130 parameters: 30-64-32-2."""
    return nn.Sequential(
        nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2)
    )


@dataclass(frozen=True)
class Task:
    """A model and the users' records."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor


def build(name: str) -> Task:
    """Return the same task for the same name, in every process."""
    torch.manual_seed(0)
    shape, classes, model_fn = {"cnn": ((3, 32, 32), 10, cnn), "mlp": ((30,), 2, mlp)}[name]
    model = model_fn()
    inputs = torch.randn(USERS, SAMPLES, *shape)
    return Task(model, inputs, torch.randint(0, classes, (USERS, SAMPLES)))
