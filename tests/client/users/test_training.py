"""The recipe is torch's, and each user's randomness is its own."""

import copy

import pytest
import torch
from torch import nn

from dpfl_flower.client.users import LocalOptimizer
from tests.support.users import mlp, recipe


@pytest.mark.parametrize(
    ("changes", "theirs"),
    [
        ({}, lambda p: torch.optim.SGD(p, lr=0.1)),
        ({"momentum": 0.9}, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
        ({"optimizer": "adam", "lr": 0.01}, lambda p: torch.optim.Adam(p, lr=0.01)),
    ],
)
def test_a_rule_steps_as_torchs_optimizer(changes, theirs):
    model = mlp()
    reference = copy.deepcopy(model)
    optimizer = theirs(reference.parameters())
    parameters = [p.detach() for p in model.parameters()]
    rule = recipe(**changes).rule(parameters)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        gradients = [torch.randn(p.shape, generator=generator) for p in parameters]
        for p, g in zip(reference.parameters(), gradients, strict=True):
            p.grad = g.clone()
        optimizer.step()
        rule.step(gradients)
    for ours, p in zip(parameters, reference.parameters(), strict=True):
        torch.testing.assert_close(ours, p.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("changes", [{}, {"momentum": 0.9}, {"optimizer": "adam"}])
def test_a_missing_gradient_is_a_zero(changes):
    first, second = (
        [torch.ones(3), torch.ones(2)],
        [torch.ones(3), torch.ones(2)],
    )
    one, other = recipe(**changes).rule(first), recipe(**changes).rule(second)
    for gradient in (torch.ones(3), torch.zeros(3)):
        one.step([gradient, None])
        other.step([gradient, torch.zeros(2)])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("records", [1, 6, 7, 8, 50])
def test_every_epoch_sees_every_record_once(shuffle, records):
    training = recipe(epochs=3, shuffle=shuffle)
    batches = list(training.batches(records, server_round=1, user="ann"))
    assert len(batches) == training.steps(records)
    per_epoch = len(batches) // 3
    for epoch in range(3):
        seen = [torch.arange(records)[picks] for picks in batches[epoch * per_epoch :][:per_epoch]]
        assert sorted(torch.cat(seen).tolist()) == list(range(records))


def test_orders_differ_between_users_rounds_and_epochs_and_repeat_otherwise():
    training = recipe()

    def order(**where):
        found = {"server_round": 1, "user": "ann", "epoch": 0} | where
        return tuple(training.order(40, **found).tolist())

    places = [{}, {"user": "bob"}, {"server_round": 2}, {"epoch": 1}, {"user": 1}, {"user": "1"}]
    assert len({order(**place) for place in places}) == len(places)
    assert order() == order()
    assert recipe(seed=1).order(40, server_round=1, user="ann").tolist() != list(order())


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"lr": 0.0}, "lr=0.0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"epochs": 0}, "epochs=0"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"momentum": -0.1}, "momentum=-0.1"),
        ({"momentum": 0.5, "optimizer": "adam"}, "momentum=0.5"),
        ({"optimizer": "lbfgs"}, "lbfgs"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_a_recipe_out_of_range_names_the_culprit(changes, culprit):
    with pytest.raises(ValueError, match=culprit):
        recipe(**changes)


def test_the_optimizer_may_be_named_by_text():
    assert recipe(optimizer="adam").optimizer is LocalOptimizer.ADAM
    assert isinstance(recipe().loss_fn, nn.Module)
