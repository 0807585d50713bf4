"""Several small linear layers at once give what each of them gives, and hide no broken record."""

import math

import pytest
import torch
from torch import nn

from dpfl_flower.client.per_sample.contributions import Held, Outer
from dpfl_flower.client.per_sample.outers import Outers, merged

RECORDS = 6


def layer(m, n, *, bias=True):
    shapes = [(m, n), (m,)] if bias else [(m, n)]
    parameters = tuple(nn.Parameter(torch.zeros(shape)) for shape in shapes)
    return Outer(parameters, torch.randn(RECORDS, n), torch.randn(RECORDS, m))


def layers():
    torch.manual_seed(5)
    return [layer(4, 5), layer(3, 4, bias=False), layer(2, 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("drops", [False, True])
def test_norms_and_sums_are_those_of_the_single_layers(drops, dtype):
    parts = layers()
    for part in parts:
        part.inputs, part.gradients = part.inputs.to(dtype), part.gradients.to(dtype)
    (whole,) = merged(parts)
    assert isinstance(whole, Outers)
    assert [id(p) for p in whole.parameters] == [id(p) for part in parts for p in part.parameters]
    expected = sum(part.squares() for part in parts)
    assert torch.allclose(whole.squares(), expected, rtol=1e-13, atol=0)
    of_held = sum(g.double().square().sum(1) for g in whole.held())
    assert torch.allclose(whole.squares(), of_held, rtol=1e-6, atol=0)
    dropped = torch.tensor([False, drops, False, False, False, drops]) if drops else None
    factors = torch.rand(RECORDS, dtype=torch.float64)
    sums = whole.weighted_sums(factors, dropped)
    singly = [s for part in parts for s in part.weighted_sums(factors, dropped)]
    for actual, alone, p in zip(sums, singly, whole.parameters, strict=True):
        assert actual.shape == p.shape
        assert float((actual - alone).norm()) <= 1e-6 * float(alone.norm())


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
@pytest.mark.parametrize("name", ["inputs", "gradients"])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_record_that_is_not_finite_in_one_layer_is_dropped_and_no_other(value, name, which):
    clean, parts = layers(), layers()
    getattr(parts[which], name)[2] = value
    (whole,) = merged(parts)
    finite = torch.isfinite(whole.squares())
    # A gradient of 3e38 is long, and is clipped: an input of that size could not be scaled.
    assert bool(finite[2]) == (name == "gradients" and math.isfinite(value))
    assert bool(finite[[0, 1, 3, 4, 5]].all())
    dropped = torch.arange(RECORDS) == 2
    factors = torch.rand(RECORDS, dtype=torch.float64)
    expected = Outers(clean).weighted_sums(factors, dropped)
    for actual, without in zip(whole.weighted_sums(factors, dropped), expected, strict=True):
        assert torch.equal(actual, without)


def test_only_small_linear_layers_of_one_dtype_are_merged():
    held = Held((nn.Parameter(torch.zeros(3)),), [torch.randn(RECORDS, 3)])
    small, big = layers(), layer(4, 12_000)
    assert merged([small[0], held]) == [small[0], held]
    assert merged([*small, big]) == [*small, big]
    other, whole = merged([small[0], held, small[1]])
    assert other is held and isinstance(whole, Outers)
    wide = layer(3, 4)
    wide.inputs, wide.gradients = wide.inputs.double(), wide.gradients.double()
    assert merged([small[0], wide]) == [small[0], wide]
