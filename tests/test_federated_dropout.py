"""A node trains a random part of the model, by public randomness, and moves nothing else."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from dpfl_flower.federated_dropout import FederatedDropout
from dpfl_flower.hidden_layers import Axis, HiddenLayer, hidden_layers, resized
from dpfl_flower.layout import ArrayLayout

MLP = nn.Sequential(
    nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6, bias=False), nn.Tanh(), nn.Linear(6, 2)
)
CNN = nn.Sequential(
    nn.Conv2d(1, 4, 3),
    nn.ReLU(),
    nn.Conv2d(4, 6, 3),
    nn.MaxPool2d(2),
    nn.Flatten(),
    nn.Linear(6 * 2 * 2, 5),
    nn.ReLU(),
    nn.Linear(5, 3),
)


def arrays_of(model):
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def random_arrays(model, seed=0):
    rng = np.random.default_rng(seed)
    return {n: rng.normal(size=a.shape).astype(a.dtype) for n, a in arrays_of(model).items()}


@pytest.mark.parametrize("model", [MLP, CNN])
def test_a_kept_part_goes_back_to_where_it_was_and_the_rest_is_zero(model):
    arrays = random_arrays(model)
    cut = FederatedDropout.of(model, rate=0.5).submodel(arrays, seed=b"public", node_id=1)
    whole = cut.scatter(cut.take(arrays), arrays)
    for name, array in arrays.items():
        kept = whole[name] != 0
        np.testing.assert_array_equal(whole[name][kept], array[kept])
        assert kept.sum() == cut.take(arrays)[name].size
    assert sum(np.count_nonzero(a == 0) for a in whole.values())


@pytest.mark.parametrize("model", [MLP, CNN])
def test_the_small_model_computes_what_the_large_one_does_without_the_dropped_units(model):
    dropout = FederatedDropout.of(model, rate=0.5)
    arrays = random_arrays(model)
    cut = dropout.submodel(arrays, seed=b"public", node_id=1)
    part = cut.take(arrays)
    small = resized(copy.deepcopy(model), part)
    small.load_state_dict({n: torch.from_numpy(a) for n, a in part.items()})
    # Dropped: silenced on the way out, in the large model.
    silenced = {n: torch.from_numpy(a) for n, a in cut.scatter(part, arrays).items()}
    large = nn.Sequential(*model)
    before = {n: t.clone() for n, t in large.state_dict().items()}
    large.load_state_dict(silenced)
    x = torch.randn(7, *((3,) if model is MLP else (1, 8, 8)))
    torch.testing.assert_close(large(x), small(x), rtol=1e-4, atol=1e-5)
    large.load_state_dict(before)


def test_every_entry_is_kept_as_often_as_stated():
    dropout = FederatedDropout.of(MLP, rate=0.4)
    arrays = {n: np.ones_like(a) for n, a in arrays_of(MLP).items()}
    layout = ArrayLayout.of(arrays)
    nodes = 4000
    times = np.zeros(layout.dimension)
    for node in range(nodes):
        cut = dropout.submodel(arrays, seed=b"public", node_id=node)
        times += layout.flatten(cut.scatter(cut.take(arrays), arrays))
    stated = dropout.keep_probability(layout)
    error = np.sqrt(stated * (1 - stated) / nodes)
    # 6.5 standard errors: once in 10^8 runs over 100 entries; a wrong 0.05 would be 6 more.
    assert np.all(np.abs(times / nodes - stated) <= 6.5 * error + 1e-12)
    assert set(np.round(stated, 6)) == {
        round(5 / 8, 6),
        round(5 / 8 * 4 / 6, 6),
        round(4 / 6, 6),
        1.0,
    }


def test_what_a_node_keeps_follows_from_the_seed_and_its_id_alone():
    dropout = FederatedDropout.of(MLP, rate=0.5)
    arrays = arrays_of(MLP)

    def kept(seed, node):
        cut = dropout.submodel(arrays, seed=seed, node_id=node)
        return tuple(cut.kept["2.weight"][1]) + tuple(cut.kept["2.weight"][0])

    assert kept(b"a", 1) == kept(b"a", 1)
    assert len({kept(b"a", node) for node in range(50)}) > 40
    assert len({kept(bytes([seed]), 1) for seed in range(50)}) > 40


def test_at_rate_zero_the_whole_model_travels_in_its_order():
    arrays = random_arrays(CNN)
    dropout = FederatedDropout.of(CNN, rate=0.0)
    part = dropout.submodel(arrays, seed=b"public", node_id=3).take(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(part[name], array)
    assert (dropout.keep_probability(ArrayLayout.of(arrays)) == 1).all()


def test_one_unit_is_kept_however_high_the_rate():
    arrays = arrays_of(MLP)
    part = FederatedDropout.of(MLP, rate=0.99).submodel(arrays, seed=b"s", node_id=1).take(arrays)
    assert part["0.weight"].shape == (1, 3)
    assert part["2.weight"].shape == (1, 1)


@pytest.mark.parametrize("rate", [-0.1, 1.0, math.nan, "0.5"])
def test_a_rate_out_of_range_is_refused(rate):
    with pytest.raises(ValueError, match="rate="):
        FederatedDropout.of(MLP, rate=rate)


@pytest.mark.parametrize(
    ("layers", "match"),
    [
        ((), "layers"),
        ((HiddenLayer((Axis("0.weight", 0),)), HiddenLayer((Axis("0.weight", 0),))), "once"),
    ],
)
def test_layers_that_make_no_sense_are_refused(layers, match):
    with pytest.raises(ValueError, match=match):
        FederatedDropout(rate=0.5, layers=layers)


@pytest.mark.parametrize(
    "axes",
    [
        (Axis("nobody", 0),),
        (Axis("0.weight", 2),),
        (Axis("0.weight", 0, block=3),),
        (Axis("0.weight", 0), Axis("2.weight", 0)),
    ],
)
def test_layers_that_do_not_fit_the_model_are_refused(axes):
    with pytest.raises(ValueError, match="must"):
        FederatedDropout(rate=0.5, layers=(HiddenLayer(axes),)).check(arrays_of(MLP))


def test_an_empty_layer_is_refused():
    with pytest.raises(ValueError, match="axes"):
        HiddenLayer(())


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(2, 2),
        nn.Sequential(nn.Linear(2, 2)),
        nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4), nn.Linear(4, 1)),
        nn.Sequential(nn.Linear(2, 4), nn.Flatten(), nn.Linear(8, 1)),
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.Linear(4, 1)),
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=2)),
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(2), nn.Linear(4, 1)),
        nn.Sequential(nn.Linear(2, 4), nn.Linear(3, 1)),
        nn.Sequential(*[nn.Linear(2, 2)] * 2),
    ],
)
def test_a_model_whose_units_cannot_be_told_is_refused(model):
    with pytest.raises(ValueError, match=r"mod(el|ule)"):
        hidden_layers(model)


def test_a_resized_model_keeps_everything_but_the_sizes():
    model = nn.Sequential(
        nn.Conv2d(1, 4, (3, 1), stride=2, padding=1, dilation=(1, 2), padding_mode="circular"),
        nn.Conv2d(4, 2, 1, bias=False, dtype=torch.float64),
    )
    shapes = {"0.weight": np.zeros((2, 1, 3, 1)), "1.weight": np.zeros((2, 2, 1, 1))}
    small = resized(copy.deepcopy(model), shapes)
    assert repr(small) == repr(model).replace("Conv2d(1, 4", "Conv2d(1, 2").replace(
        "(4, 2", "(2, 2"
    )
    assert [p.dtype for p in small.parameters()] == [p.dtype for p in model.parameters()]
    whole = resized(model, arrays_of(model))
    assert whole[0] is model[0], "nothing is replaced where nothing is smaller"
