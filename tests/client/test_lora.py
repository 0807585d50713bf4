"""Adapters on a frozen model: they alone are clipped, noised and trained."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from dpfl_flower.client import DPSGDClient, DPSGDConfig, GradientEngine, NodeLedger
from dpfl_flower.client.per_example import ClipStyle, per_example_clipper

C = 0.2
WORDS, WIDTH, LENGTH, RANK = 11, 8, 5, 2
CROSS_ENTROPY = nn.CrossEntropyLoss(reduction="none")


class Adapted(nn.Module):
    """A frozen layer with a trained product of low rank beside it."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, RANK, bias=False)
        self.up = nn.Linear(RANK, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Transformer(nn.Module):
    """One block on token ids."""

    def __init__(self):
        super().__init__()
        self.tokens, self.normal = nn.Embedding(WORDS, WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.wide, self.narrow = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, ids):
        x = self.tokens(ids)
        heads = [layer(self.normal(x)) for layer in (self.query, self.key, self.value)]
        x = x + nn.functional.scaled_dot_product_attention(*heads)
        return self.head((x + self.narrow(nn.functional.gelu(self.wide(x)))).mean(1))


def lora():
    torch.manual_seed(0)
    model = Transformer().requires_grad_(False)
    for name in ("query", "value", "wide"):
        setattr(model, name, Adapted(getattr(model, name)))
    return model


def records(n):
    return torch.randint(WORDS, (n, LENGTH)), torch.randint(3, (n,))


def clipped_one_by_one(model, ids, targets):
    """Autograd over the adapters, record by record, in float64: gradient, clip, sum."""
    model = copy.deepcopy(model).double()
    adapters = [p for p in model.parameters() if p.requires_grad]
    total = torch.zeros(sum(p.numel() for p in adapters), dtype=torch.float64)
    for i in range(len(ids)):
        loss = CROSS_ENTROPY(model(ids[i : i + 1]), targets[i : i + 1]).sum()
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, adapters)])
        total += gradient * min(1.0, C / float(gradient.norm()))
    return total


@pytest.mark.parametrize("engine", list(GradientEngine))
def test_the_sum_is_that_of_the_adapters_clipped_gradients_and_of_nothing_else(engine):
    model = lora()
    ids, targets = records(7)
    expected = clipped_one_by_one(model, ids, targets)
    with per_example_clipper(model, CROSS_ENTROPY, clip_norm=C, engine=engine) as clipper:
        total = torch.cat([t.flatten() for t in clipper.clipped_sum([ids, targets])]).double()
    assert len(total) == 2 * (2 * RANK * WIDTH) + RANK * 3 * WIDTH
    assert float((total - expected).norm()) <= 1e-6 * float(expected.norm())


def client_for(model, **changes):
    settings = {
        "sampling_rate": 1.0,
        "steps_per_round": 2,
        "planned_rounds": 10,
        "clip_norm": C,
        "expected_batch_size": 20.0,
        "delta": 1e-5,
        "noise_multiplier": 1.0,
    }
    return DPSGDClient(
        model,
        TensorDataset(*records(20)),
        config=DPSGDConfig(**{**settings, **changes}),
        loss_fn=CROSS_ENTROPY,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
        ledger=NodeLedger("heart"),
        example=[torch.zeros(LENGTH, dtype=torch.long), torch.tensor(0)],
        device="cpu",
    )


@pytest.mark.parametrize(
    "changes",
    [{}, {"mixed_precision": True}, {"clip_style": ClipStyle.PER_LAYER}],
    ids=["plain", "mixed", "per-layer"],
)
def test_training_moves_every_adapter_and_no_bit_of_what_is_frozen(changes):
    model = lora()
    client = client_for(model, **changes)
    names, sent = list(model.state_dict()), client.get_parameters({})
    answered, _, _ = client.fit(sent, {})
    for name, before, after in zip(names, sent, answered, strict=True):
        adapter = ".down." in name or ".up." in name
        assert np.array_equal(before, after) != adapter, name
