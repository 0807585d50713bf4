"""The clipped sums of many models at once are those of one model after the other."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

from dpfl_flower.client.per_example import Clip, ClipStyle, GradientEngine, per_example_clipper
from dpfl_flower.client.per_sample.stacked import StackedClipper, unstackable
from dpfl_flower.client.record_set import RecordSet
from dpfl_flower.client.stacked_sample import StackedSample

CE = nn.CrossEntropyLoss(reduction="none")
EXAMPLE = (torch.zeros(2, 3), torch.tensor(0))
CPU = torch.device("cpu")


def mlp(hidden=5, *, inner=nn.Tanh, bias=True, classes=4):
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(6, hidden, bias=bias),
        nn.Sequential(inner(), nn.Linear(hidden, hidden)),
        inner(),
        nn.Linear(hidden, classes, bias=bias),
    )


def records(n, *, seed, classes=4):
    generator = torch.Generator().manual_seed(seed)
    inputs = 3 * torch.randn(n, 2, 3, generator=generator)
    return [inputs, torch.randint(classes, (n,), generator=generator)]


def sample_of(models, data, *, clip, width=4, loss_fn=CE):
    sets = [RecordSet(TensorDataset(*parts), CPU) for parts in data]
    clipper = StackedClipper(models, loss_fn, clip=clip)
    return StackedSample(clipper, sets, EXAMPLE, width=width)


def stacked_sums(models, data, **arguments):
    everyone = [list(range(len(parts[-1]))) for parts in data]
    return sample_of(models, data, **arguments).sums(everyone)


def one_by_one(model, data, clip):
    engine = per_example_clipper(
        model, CE, clip_norm=clip.norm, style=clip.style, engine=GradientEngine.HOOKS
    )
    with engine as clipper:
        return torch.cat([part.double().flatten() for part in clipper.clipped_sum(data)])


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 7]), min_size=1, max_size=6),
    hidden=st.integers(1, 9),
    inner=st.sampled_from([nn.Tanh, nn.ReLU, nn.GELU, nn.Identity]),
    bias=st.booleans(),
    frozen=st.sampled_from([(), ("1.",), ("2.1.weight",), ("4.bias",)]),
    style=st.sampled_from([ClipStyle.FLAT, ClipStyle.AUTOMATIC]),
    clip_norm=st.sampled_from([0.1, 3.0, 1e4]),
    width=st.sampled_from([1, 4, 64]),
)
def test_each_models_sum_is_that_of_opacus_alone(
    sizes, hidden, inner, bias, frozen, style, clip_norm, width
):
    torch.manual_seed(sum(sizes) + hidden)
    models = [mlp(hidden, inner=inner, bias=bias) for _ in sizes]
    for model in models:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not any(name.startswith(part) for part in frozen))
    data = [records(n, seed=index) for index, n in enumerate(sizes)]
    clip = Clip(clip_norm, style)
    assert unstackable(models, EXAMPLE) is None
    for n, model, parts, actual in zip(
        sizes, models, data, stacked_sums(models, data, clip=clip, width=width), strict=True
    ):
        expected = one_by_one(model, parts, clip)
        assert actual.shape == expected.shape
        scale = max(1e-6, float(expected.norm()))
        np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6 * scale)
        assert n or not actual.any()


def test_float64_agrees_to_float64():
    torch.manual_seed(0)
    models = [mlp().double() for _ in range(3)]
    data = [[x.double(), y] for x, y in (records(7, seed=index) for index in range(3))]
    sets = [RecordSet(TensorDataset(*parts), CPU) for parts in data]
    clipper = StackedClipper(models, CE, clip=Clip(0.5))
    example = (EXAMPLE[0].double(), EXAMPLE[1])
    sums = StackedSample(clipper, sets, example, width=8).sums([range(7)] * 3)
    for model, parts, actual in zip(models, data, sums, strict=True):
        # A factor is below the exact one by 2^-22.
        torch.testing.assert_close(
            actual, one_by_one(model, parts, Clip(0.5)), rtol=1e-12, atol=1e-13
        )


def poison(kind, parts):
    inputs, targets = (part.clone() for part in parts)
    if kind == "raises":
        targets[2] = 99
    elif kind == "changes":
        inputs[2] = -inputs[2]
    else:
        inputs[2] = kind
    return [inputs, targets]


@pytest.mark.parametrize("kind", ["gone", "changes", "raises", 1e30, np.nan, np.inf])
@pytest.mark.parametrize("who", [0, 2, 4])
def test_one_record_moves_its_own_models_sum_alone_and_by_at_most_the_clip_norm(who, kind):
    torch.manual_seed(1)
    models = [mlp() for _ in range(5)]
    data = [records(7, seed=index) for index in range(5)]
    before = stacked_sums(models, data, clip=Clip(0.5))
    data[who] = (
        [part[[0, 1, 3, 4, 5, 6]] for part in data[who]]
        if kind == "gone"
        else poison(kind, data[who])
    )
    after = stacked_sums(models, data, clip=Clip(0.5))
    for index in range(5):
        if index != who:  # to the last bit
            assert torch.equal(before[index], after[index]), index
    moved = float((after[who] - before[who]).norm())
    most = 1.0 if kind == "changes" else 0.5  # one record for another moves by twice the norm
    assert 0.1 < moved <= most * (1 + 1e-5)


def test_padding_adds_exactly_nothing_even_where_its_loss_is_not_finite():
    def log_of_input(outputs, targets):
        # nan and infinite slopes at the zeros of padding, whose bias-free outputs are 0
        return (outputs.abs().log() * targets[:, None]).sum(1)

    torch.manual_seed(2)
    models = [nn.Sequential(nn.Linear(3, 2, bias=False)) for _ in range(2)]
    data = [[torch.ones(2, 3), torch.ones(2)], [torch.ones(0, 3), torch.ones(0)]]
    example = (torch.zeros(3), torch.tensor(0.0))
    sets = [RecordSet(TensorDataset(*parts), CPU) for parts in data]
    clipper = StackedClipper(models, log_of_input, clip=Clip(1.0))
    sums = StackedSample(clipper, sets, example, width=8).sums([[0, 1], []])
    assert sums.isfinite().all()
    assert float(sums[0].norm()) == pytest.approx(2.0, rel=1e-5)
    assert not sums[1].any()


class Sub(nn.Linear):
    pass


def hooked():
    model = mlp()
    model[1].register_forward_hook(lambda *_: None)
    return model


def shared():
    layer = nn.Linear(6, 6)
    return nn.Sequential(nn.Flatten(), layer, nn.Tanh(), layer)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (nn.Linear(6, 4), "Linear is not an nn.Sequential"),
        (nn.Sequential(nn.Conv1d(2, 3, 1)), "no stacked Conv1d"),
        (nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.Dropout()), "no stacked Dropout"),
        (nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.Softmax(1)), "no stacked Softmax"),
        (nn.Sequential(nn.Flatten(), Sub(6, 4)), "no stacked Sub"),
        (nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.ReLU(inplace=True)), "no stacked ReLU"),
        (nn.Sequential(nn.Linear(3, 4)), "2 dimensions of a record, not a vector"),
        (nn.Sequential(nn.Flatten(), nn.Linear(6, 4).bfloat16()), "bfloat16"),
        (hooked(), "hooks"),
        (shared(), "used twice"),
    ],
)
def test_what_cannot_be_stacked_is_named(model, says):
    assert says in unstackable([model], EXAMPLE)


def test_models_that_differ_are_not_stacked():
    assert "model 1 differs from model 0" in unstackable([mlp(5), mlp(6)], EXAMPLE)
    slopes = [nn.Sequential(nn.Linear(6, 2), nn.LeakyReLU(slope)) for slope in (0.1, 0.2)]
    assert "model 1 differs" in unstackable(slopes, (torch.zeros(6), torch.tensor(0)))
