"""Sparing memory traffic changes no number."""

import copy

import pytest
import torch
from torch import nn

from dpfl_flower.client.users.tuning import FactoredWeights, pool_before_relu
from tests.support.users import cnn, records_of

CROSS_ENTROPY = nn.CrossEntropyLoss()


def gradients(model, inputs, targets):
    loss = CROSS_ENTROPY(model(inputs), targets)
    return loss, torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("case", ["ordinary", "ties", "negative", "nan"])
def test_pooling_before_relu_changes_no_bit(case):
    plain = cnn()
    swapped = copy.deepcopy(plain)
    pool_before_relu(swapped)
    assert [type(m).__name__ for m in swapped[:6]] == ["Conv2d", "MaxPool2d", "ReLU"] * 2
    assert swapped.state_dict().keys() == plain.state_dict().keys()
    inputs, targets = records_of(cnn, 9, 3)
    if case == "ties":
        inputs = inputs.sign()
        for model in (plain, swapped):
            model[0].weight.data.sign_()
            model[0].bias.data.zero_()
    if case == "negative":
        for model in (plain, swapped):
            model[0].bias.data.fill_(-100.0)
    if case == "nan":
        inputs[2, 0, 4, 4] = torch.nan
    (loss, expected), (found_loss, found) = (
        gradients(model, inputs, targets) for model in (plain, swapped)
    )
    assert torch.equal(loss.view(1).view(torch.int32), found_loss.view(1).view(torch.int32))
    for e, f in zip(expected, found, strict=True):
        assert torch.equal(e.nan_to_num(7.0), f.nan_to_num(7.0))


def test_a_pool_that_returns_indices_or_a_layer_with_a_hook_stays():
    model = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2, return_indices=True))
    pool_before_relu(model)
    assert isinstance(model[0], nn.ReLU)
    hooked = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))
    hooked[0].register_forward_hook(lambda *_: None)
    pool_before_relu(hooked)
    assert isinstance(hooked[0], nn.ReLU)


class Twice(nn.Module):
    """Uses one layer twice, another's weight outside the layer, and ties two layers."""

    def __init__(self):
        super().__init__()
        self.again = nn.Linear(160, 160)
        self.outside = nn.Linear(160, 160, bias=False)
        self.tied, self.other = nn.Linear(160, 160), nn.Linear(160, 160)
        self.other.weight = self.tied.weight
        self.out = nn.Linear(160, 3)

    def forward(self, x):
        x = self.again(self.again(x).tanh()).tanh()
        x = self.outside(x) + x @ self.outside.weight
        return self.out(self.other(self.tied(x).tanh()).tanh())


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: nn.Sequential(nn.Linear(160, 200), nn.Tanh(), nn.Linear(200, 3)), (5, 160)),
        (lambda: nn.Sequential(nn.Linear(160, 200, bias=False)), (5, 160)),
        (lambda: nn.Sequential(nn.Linear(160, 200), nn.Flatten(), nn.Linear(800, 3)), (5, 4, 160)),
        (Twice, (5, 160)),
    ],
)
def test_a_step_along_factors_is_a_step_along_the_gradient(build, shape):
    torch.manual_seed(3)
    plain = build()
    model = copy.deepcopy(plain)
    factored = FactoredWeights(model)
    inputs, targets = torch.randn(shape), torch.randint(0, 3, (5,))
    for _ in range(3):
        _, expected = gradients(plain, inputs, targets)
        with torch.no_grad():
            for p, g in zip(plain.parameters(), expected, strict=True):
                p.sub_(0.1 * g)
        loss = CROSS_ENTROPY(model(inputs), targets)
        found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        assert any(g is None for g in found)  # the large ones are kept as factors
        with torch.no_grad():
            for p, g in zip(model.parameters(), found, strict=True):
                if g is not None:
                    p.sub_(0.1 * g)
        factored.step(0.1)
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_what_a_failed_step_left_is_forgotten():
    model = nn.Sequential(nn.Linear(160, 160))
    factored = FactoredWeights(model)
    before = model[0].weight.detach().clone()
    torch.autograd.grad(
        model(torch.randn(2, 160)).sum(), list(model.parameters()), allow_unused=True
    )
    factored.forget()
    factored.step(0.1)
    assert torch.equal(model[0].weight, before)
