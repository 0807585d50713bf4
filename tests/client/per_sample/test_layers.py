"""Every layer's clipped sum is that of Opacus' hooks, or of autograd where those err."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dpfl_flower.client.per_example import Clip, ClipStyle, per_example_clipper
from dpfl_flower.client.per_sample.layers import unsupported
from dpfl_flower.client.per_sample.single import SingleClipper

# torch copies its input then, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
CROSS_ENTROPY = nn.CrossEntropyLoss(reduction="none")
BATCHES = st.sampled_from([0, 1, 7, 64])
SMALL = st.integers(1, 4)


class Net(nn.Module):
    """A layer, something curved, and a head on everything."""

    def __init__(self, layer, numbers):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(numbers, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(x)).flatten(1))


@st.composite
def linear(draw):
    shape = draw(st.lists(SMALL, min_size=0, max_size=2))
    n, m = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    return nn.Linear(n, m, bias=draw(st.booleans())), [*shape, n], None


@st.composite
def convolution(draw, *, dimensions, modes=("zeros",)):
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    sizes = st.tuples(*[st.integers(1, 3)] * dimensions)
    kernel, dilation, stride = draw(sizes), draw(st.tuples(*[st.integers(1, 2)] * dimensions)), None
    groups = draw(st.integers(1, 3))
    padding = draw(st.tuples(*[st.integers(0, 2)] * dimensions))
    stride = draw(sizes)
    if draw(st.booleans()):
        padding, stride = "same", (1,) * dimensions
    least = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    spatial = [max(3, e) + draw(st.integers(0, 2)) for e in least]
    layer = kind(
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 3)),
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(modes)),
    )
    return layer, [layer.in_channels, *spatial], None


@st.composite
def embedding(draw, *, padding=False):
    rows = draw(st.integers(1, 9))
    index = draw(st.integers(0, rows - 1)) if padding else None
    layer = nn.Embedding(rows, draw(SMALL), padding_idx=index)
    return layer, draw(st.lists(SMALL, min_size=0, max_size=2)), rows


@st.composite
def embedding_bag(draw):
    rows = draw(st.integers(1, 9))
    index = draw(st.one_of(st.none(), st.integers(0, rows - 1)))
    mode = draw(st.sampled_from(["sum", "mean"]))
    return nn.EmbeddingBag(rows, draw(SMALL), mode=mode, padding_idx=index), [draw(SMALL)], rows


@st.composite
def layer_norm(draw, *, kind=nn.LayerNorm):
    shape = draw(st.lists(st.integers(2, 4), min_size=1, max_size=2))
    positions = draw(st.lists(SMALL, min_size=0, max_size=2))
    return kind(shape, elementwise_affine=draw(st.booleans())), [*positions, *shape], None


@st.composite
def group_norm(draw):
    groups = draw(st.integers(1, 3))
    channels = groups * draw(st.integers(1, 3))
    spatial = draw(st.lists(st.integers(2, 4), min_size=1, max_size=3))
    return nn.GroupNorm(groups, channels), [channels, *spatial], None


@st.composite
def instance_norm(draw):
    dimensions = draw(st.integers(1, 3))
    kind = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[dimensions - 1]
    channels = draw(st.integers(1, 4))
    spatial = [draw(st.integers(2, 4)) for _ in range(dimensions)]
    return kind(channels, affine=True), [channels, *spatial], None


def problem(layer, shape, rows, n):
    """Return a float64 model and a batch: what rounding does is tested elsewhere."""
    inputs = torch.randn(n, *shape).double() if rows is None else torch.randint(rows, (n, *shape))
    one = torch.zeros(1, *shape).double() if rows is None else torch.zeros(1, *shape).long()
    layer = layer.double()
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn_like(p))
        model = Net(layer, layer(one).numel()).double()
    return model, [inputs, torch.randint(3, (n,))]


def flat(clipper, batch):
    with clipper:
        return torch.cat([t.flatten() for t in clipper.clipped_sum(batch)])


def clip_norm_for(model, batch):
    """Return a norm that clips about half of the records."""
    if not len(batch[-1]):
        return 1.0
    with SingleClipper(model, CROSS_ENTROPY, clip=Clip(1.0)) as clipper:
        clipper.clipped_sum(batch)
        return float(clipper.norms.median()) * 1.01


def agree(layer, shape, rows, n, style, *, with_engine="hooks"):
    torch.manual_seed(n)
    model, batch = problem(layer, shape, rows, n)
    assert unsupported(model) is None
    clip_norm = clip_norm_for(model, batch)
    ours = per_example_clipper(
        model, CROSS_ENTROPY, clip_norm=clip_norm, engine="bookkeeping", style=style
    )
    if with_engine == "autograd":
        theirs = SingleClipper(model, CROSS_ENTROPY, clip=Clip(clip_norm, style))
    else:
        theirs = per_example_clipper(
            model, CROSS_ENTROPY, clip_norm=clip_norm, engine=with_engine, style=style
        )
    actual, expected = flat(ours, batch), flat(theirs, batch)
    assert actual.shape == expected.shape
    assert float((actual - expected).norm()) <= 1e-9 * float(expected.norm())


LAYERS = {
    "linear": linear(),
    "conv1d": convolution(dimensions=1),
    "conv2d": convolution(dimensions=2),
    "conv3d": convolution(dimensions=3),
    "embedding": embedding(),
    "layer-norm": layer_norm(),
    "group-norm": group_norm(),
    "instance-norm": instance_norm(),
}


@pytest.mark.parametrize("kind", list(LAYERS))
@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data(), n=BATCHES, style=st.sampled_from(ClipStyle))
def test_the_sum_is_that_of_opacus_hooks(kind, data, n, style):
    agree(*data.draw(LAYERS[kind]), n, style)


OPACUS_ERRS = {
    "embedding-padding": embedding(padding=True),
    "embedding-bag": embedding_bag(),
    "rms-norm": layer_norm(kind=nn.RMSNorm),
    "padding-modes": convolution(dimensions=2, modes=("reflect", "replicate", "circular")),
    "padding-modes-1d": convolution(dimensions=1, modes=("reflect", "replicate", "circular")),
}


@pytest.mark.parametrize("kind", list(OPACUS_ERRS))
@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data(), n=BATCHES, style=st.sampled_from(ClipStyle))
def test_the_sum_is_that_of_autograd_where_opacus_has_no_rule_or_a_wrong_one(kind, data, n, style):
    agree(*data.draw(OPACUS_ERRS[kind]), n, style, with_engine="autograd")


@pytest.mark.parametrize("n", [1, 7, 64])
@pytest.mark.parametrize("kind", list(LAYERS))
def test_in_float32_the_sum_is_within_a_millionth_of_opacus_hooks(kind, n):
    layers = {
        "linear": (nn.Linear(9, 6), [5, 9], None),
        "conv1d": (nn.Conv1d(4, 6, 3, groups=2), [4, 9], None),
        "conv2d": (nn.Conv2d(3, 6, 3, padding=1, stride=2), [3, 8, 8], None),
        "conv3d": (nn.Conv3d(2, 3, 2, dilation=2), [2, 5, 5, 5], None),
        "embedding": (nn.Embedding(11, 5), [6], 11),
        "layer-norm": (nn.LayerNorm(7), [3, 7], None),
        "group-norm": (nn.GroupNorm(2, 6), [6, 4, 4], None),
        "instance-norm": (nn.InstanceNorm2d(3, affine=True), [3, 5, 5], None),
    }
    torch.manual_seed(n)
    model, batch = problem(*layers[kind], n)
    model, batch = model.float(), [t.float() if t.is_floating_point() else t for t in batch]
    clip_norm = clip_norm_for(model, batch)
    ours, theirs = (
        flat(per_example_clipper(model, CROSS_ENTROPY, clip_norm=clip_norm, engine=engine), batch)
        for engine in ("bookkeeping", "hooks")
    )
    assert ours.dtype is torch.float32
    assert float((ours - theirs).norm()) <= 1e-6 * float(theirs.norm())


def test_wide_layers_on_few_positions_take_ghost_norms_and_agree():
    from dpfl_flower.client.per_sample import layers

    layer = nn.Linear(150, 130)
    assert isinstance(
        layers.contributions(layer, torch.randn(4, 3, 150), torch.randn(4, 3, 130))[0], layers.Ghost
    )
    for n in (1, 7, 64):
        for style in ClipStyle:
            agree(layer, [3, 150], None, n, style)
            agree(nn.Conv1d(60, 70, 3), [60, 5], None, n, style)


def test_a_layer_that_may_compute_something_else_has_no_rule():
    class Centred(nn.Linear):
        def forward(self, x):
            return super().forward(x - x.mean(0))

    assert unsupported(nn.Sequential(Centred(3, 2))) == "0: Centred"
    assert "max" in unsupported(nn.EmbeddingBag(3, 2, mode="max"))
    assert unsupported(nn.LSTM(3, 2)) == ": LSTM"
    assert unsupported(nn.Sequential(nn.LSTM(3, 2).requires_grad_(False), nn.Linear(2, 1))) is None
    extra = nn.Linear(3, 2)
    extra.shift = nn.Parameter(torch.zeros(2))
    assert unsupported(extra) == ": Linear"


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("n", [1, 7, 64])
def test_a_bag_is_averaged_over_what_is_not_padding(mode, n):
    layer = nn.EmbeddingBag(3, 4, mode=mode, padding_idx=1)
    agree(layer, [5], 3, n, ClipStyle.FLAT, with_engine="autograd")
