"""Dropout in DP-SGD: masks that nobody can foretell, and a caller's torch that stays as it was."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from dpfl_flower.client.dp_sgd import DPSGDClient, DPSGDConfig, NodeLedger
from dpfl_flower.client.per_example import GradientEngine
from tests.support.contracts.seeds import reseed

WIDTH = 512
RECORDS = 6
STEPS = 2
ENGINES = [GradientEngine.BOOKKEEPING, GradientEngine.HOOKS]
"""The engines that draw masks for a batch at once; chance makes two masks equal once in 2^512."""


class Recording(nn.Module):
    """A linear layer behind dropout that notes which entries of each record were kept."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout, self.linear = nn.Dropout(0.5), nn.Linear(WIDTH, 1)
        self.kept: list[bytes] = []
        self.noting = False

    def forward(self, x):
        masked = self.dropout(x)
        if self.noting:
            self.kept += [bytes(row.tolist()) for row in masked.detach() != 0]
        return self.linear(masked)


def recorded(engine, *, physical=2):
    """Return the masks of one round, after which torch is where ``reseed`` put it, or is not."""
    model = Recording()
    client = DPSGDClient(
        model,
        TensorDataset(torch.ones(RECORDS, WIDTH), torch.ones(RECORDS)),
        config=DPSGDConfig(
            sampling_rate=1.0,
            steps_per_round=STEPS,
            planned_rounds=9,
            clip_norm=1.0,
            expected_batch_size=RECORDS,
            delta=1e-3,
            noise_multiplier=2.0,
            max_physical_batch_size=physical,
        ),
        loss_fn=lambda outputs, targets: (outputs[:, 0] - targets) ** 2,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        ledger=NodeLedger("test"),
        example=(torch.ones(WIDTH), torch.ones(())),
        engine=engine,
        device="cpu",
    )
    parameters = client.get_parameters({})
    reseed()
    client._choose_clipper()  # looks at the model with made-up records, once, in the open
    model.noting = True
    reseed()
    client.fit(parameters, {})
    return model.kept


@pytest.mark.parametrize("engine", ENGINES)
def test_masks_are_never_those_of_a_seed_that_somebody_knows(engine):
    masks = [mask for _ in range(2) for mask in recorded(engine)]
    assert len(masks) >= 2 * RECORDS * STEPS, "the model did not see every record"
    # Twice from the same seed: no mask of one round is one of the other, nor of another batch.
    distinct = set(masks)
    assert len(distinct) >= 2 * RECORDS * STEPS
    half = len(masks) // 2
    assert not set(masks[:half]) & set(masks[half:])
    for seed in (0, 1):
        torch.manual_seed(seed)
        told = {bytes(row.tolist()) for row in nn.Dropout(0.5)(torch.ones(64, WIDTH)) != 0}
        assert not told & distinct


@pytest.mark.parametrize("engine", ENGINES)
def test_every_physical_batch_has_masks_of_its_own(engine):
    masks = recorded(engine, physical=1)
    assert len(set(masks)) >= RECORDS * STEPS


@pytest.mark.parametrize("engine", ENGINES)
def test_torch_is_left_as_its_caller_had_it_and_tells_nothing_of_the_masks(engine):
    reseed()
    before = torch.get_rng_state()
    # `recorded` reseeds last before the round: the state afterwards is that seed's, untouched.
    masks = recorded(engine)
    after = torch.get_rng_state()
    assert torch.equal(before, after), "a state that follows from the secret seed was left behind"
    next_ones = {bytes(row.tolist()) for row in nn.Dropout(0.5)(torch.ones(64, WIDTH)) != 0}
    assert not next_ones & set(masks)


def test_torch_is_left_as_it_was_when_a_step_fails():
    reseed()
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 1))
    client = DPSGDClient(
        model,
        TensorDataset(torch.ones(4, 3), torch.ones(4)),
        config=DPSGDConfig(
            sampling_rate=1.0,
            steps_per_round=1,
            planned_rounds=1,
            clip_norm=1.0,
            expected_batch_size=4,
            delta=1e-3,
            noise_multiplier=2.0,
        ),
        loss_fn=lambda outputs, targets: (outputs[:, 0] - targets) ** 2,
        optimizer=lambda parameters: _Breaking(),
        ledger=NodeLedger("test"),
        example=(torch.ones(3), torch.ones(())),
        device="cpu",
    )
    client._choose_clipper()
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="broke"):
        client.fit(client.get_parameters({}), {})
    assert torch.equal(before, torch.get_rng_state())


class _Breaking:
    def step(self):
        raise RuntimeError("broke")

    def zero_grad(self, *, set_to_none):
        del set_to_none
