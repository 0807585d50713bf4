"""Noise and epsilon are Opacus' on the same schedule."""

import warnings

import numpy as np
import pytest
import torch
from opacus import PrivacyEngine
from opacus.accountants import PRVAccountant, RDPAccountant
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dpfl_flower.accounting import Composed, epsilon
from dpfl_flower.client import DPSGDConfig
from dpfl_flower.client.noisy_gradient import NoisyGradient
from dpfl_flower.rng import secure

RATE, Z, STEPS, DELTA = 0.05, 1.0, 600, 1e-5


def test_epsilon_is_that_of_opacus_accountants():
    config = DPSGDConfig(
        sampling_rate=RATE,
        steps_per_round=STEPS // 10,
        planned_rounds=10,
        clip_norm=1.0,
        expected_batch_size=50.0,
        delta=DELTA,
        noise_multiplier=Z,
    )
    ours = epsilon([Composed(config.event(Z), STEPS)], delta=DELTA, relation=config.relation)
    theirs = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in (PRVAccountant, RDPAccountant):
            accountant = kind()
            accountant.history = [(Z, RATE, STEPS)]
            theirs[kind] = accountant.get_epsilon(delta=DELTA)
    assert ours == pytest.approx(theirs[PRVAccountant], rel=5e-3)
    assert ours <= theirs[RDPAccountant]


def test_the_noise_of_a_step_has_the_scale_of_opacus_optimizer():
    d, clip_norm, batch = 200_000, 0.7, 4
    model = nn.Linear(d, 1, bias=False)
    nn.init.zeros_(model.weight)
    data = TensorDataset(torch.zeros(batch, d), torch.zeros(batch))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        private, optimizer, _ = PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
            data_loader=DataLoader(data, batch_size=batch),
            noise_multiplier=Z,
            max_grad_norm=clip_norm,
            poisson_sampling=False,
        )
        private(data.tensors[0]).mean().backward()
        optimizer.step()
    theirs = model.weight.detach().flatten().double().numpy()
    (ours,) = NoisyGradient(Z, float(batch), secure())([torch.zeros(d)], clip_norm=clip_norm)
    ratio = ours.numpy().std() / theirs.std()
    # The ratio of two deviations has a standard error of 1/sqrt(d): 5.5 of them, and 3 % is 13.
    assert abs(ratio - 1) < 5.5 / np.sqrt(d)
    assert abs(1.03 * ratio - 1) > 5.5 / np.sqrt(d)
