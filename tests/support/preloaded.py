"""What the fork server imports and computes once, before it forks: nothing random."""

import importlib
import logging

import torch

from dpfl_flower.noise import RoundedGaussian
from dpfl_flower.rng import SeededRandom

for _contract in ("charging", "clients", "cohorts", "freshness", "isolation", "leakage"):
    importlib.import_module(f"tests.support.contracts.{_contract}")

importlib.import_module("torch._dynamo")  # the first optimizer would, in every fork
torch.set_num_threads(1)
logging.disable(logging.CRITICAL)
RoundedGaussian(1 << 14).sample(1, SeededRandom(0))  # builds its table
