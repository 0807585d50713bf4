"""Every layer's clipped sum is that of Opacus' single gradients, or autograd's where those err."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.grad_sample import GradSampleModule
from torch import nn

from dpfl_flower.client.per_example import ClipStyle, per_example_clipper
from dpfl_flower.client.per_sample import layers
from dpfl_flower.client.per_sample.layers import unsupported

pytestmark = [
    # torch copies its input then, and says so.
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
    # Opacus hooks the first layer too, whose input needs no gradient.
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
]
CROSS_ENTROPY = nn.CrossEntropyLoss(reduction="none")
SIZES = [0, 1, 7, 64]
KEPT = 1 - 2.0**-22  # of C: the rest is for rounding, see `Clip`
STYLES = st.sampled_from(ClipStyle)
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
def embedding(draw, *, padding=False, sparse=False):
    rows = draw(st.integers(1, 9))
    index = draw(st.integers(0, rows - 1)) if padding else None
    layer = nn.Embedding(rows, draw(SMALL), padding_idx=index, sparse=sparse)
    return layer, draw(st.lists(SMALL, min_size=0, max_size=2)), rows


@st.composite
def embedding_bag(draw):
    rows = draw(st.integers(1, 9))
    index = draw(st.one_of(st.none(), st.integers(0, rows - 1)))
    settings = {"mode": draw(st.sampled_from(["sum", "mean"])), "sparse": draw(st.booleans())}
    layer = nn.EmbeddingBag(rows, draw(SMALL), padding_idx=index, **settings)
    return layer, [draw(SMALL)], rows


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


def gradients_of_opacus(model, batch):
    """Return each record's gradient as Opacus holds it, by parameter: ``(records, numbers)``."""
    hooked = GradSampleModule(model, loss_reduction="sum")
    try:
        CROSS_ENTROPY(hooked(batch[0]), batch[1]).sum().backward()
        return {
            name: p.grad_sample.detach().flatten(1).double() for name, p in model.named_parameters()
        }
    finally:
        hooked.remove_hooks()
        hooked.cleanup()
        model.zero_grad()


def gradients_of_autograd(model, batch):
    """Return the same, one backward pass for each record."""
    found = []
    for i in range(len(batch[-1])):
        loss = CROSS_ENTROPY(model(batch[0][i : i + 1]), batch[1][i : i + 1]).sum()
        found.append(torch.autograd.grad(loss, list(model.parameters())))
    return {
        name: torch.stack([g.to_dense().flatten().double() for g in of_records])
        for (name, _), of_records in zip(
            model.named_parameters(), zip(*found, strict=True), strict=True
        )
    }


def clipped(gradients, clip_norm, style):
    """Return what the formulas make of single gradients."""
    layers = {}
    for name, gradient in gradients.items():
        layers.setdefault(name.split(".")[0], []).append(gradient)
    whole = [torch.cat(parts, 1) for parts in layers.values()]
    if style is not ClipStyle.PER_LAYER:
        whole = [torch.cat(whole, 1)]
    elif len(whole) > 1:
        clip_norm /= math.sqrt(len(whole))
    total = []
    for gradient in whole:
        norms = gradient.norm(dim=1)
        if style is ClipStyle.AUTOMATIC:
            factors = clip_norm / (norms + 0.01)
        else:
            factors = (clip_norm / norms).clamp(max=1.0)
        total.append(factors @ gradient)
    return torch.cat(total)


def about_half(gradients):
    """Return a norm that clips about half of the records."""
    return float(torch.cat(list(gradients.values()), 1).norm(dim=1).median()) * 1.01


def summed(model, batch, *, engine, clip_norm, style):
    with per_example_clipper(
        model, CROSS_ENTROPY, clip_norm=clip_norm, engine=engine, style=style
    ) as clipper:
        return torch.cat([t.flatten() for t in clipper.clipped_sum(batch)])


def within(relative, actual, expected):
    assert actual.shape == expected.shape
    assert float((actual - expected).norm()) <= relative * float(expected.norm())


def agree(layer, shape, rows, n, style, *, single=gradients_of_opacus):
    torch.manual_seed(n)
    model, batch = problem(layer, shape, rows, n)
    assert unsupported(model) is None
    engines = ["bookkeeping", "hooks"] if single is gradients_of_opacus else ["bookkeeping"]
    if not n:
        for engine in engines:
            total = summed(model, batch, engine=engine, clip_norm=1.0, style=style)
            assert total.tolist() == [0.0] * sum(p.numel() for p in model.parameters())
        return
    gradients = single(model, batch)
    clip_norm = about_half(gradients)
    expected = clipped(gradients, clip_norm * KEPT, style)
    for engine in engines:
        total = summed(model, batch, engine=engine, clip_norm=clip_norm, style=style)
        within(1e-9, total, expected)


LAYERS = {
    "linear": linear(),
    "conv1d": convolution(dimensions=1),
    "conv2d": convolution(dimensions=2),
    "conv3d": convolution(dimensions=3),
    "embedding": embedding(),
    "embedding-sparse": embedding(sparse=True),
    "layer-norm": layer_norm(),
    "group-norm": group_norm(),
    "instance-norm": instance_norm(),
}


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", list(LAYERS))
@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data(), style=STYLES)
def test_the_sum_is_that_of_opacus_single_gradients(kind, n, data, style):
    agree(*data.draw(LAYERS[kind]), n, style)


MODES = ("reflect", "replicate", "circular")
OPACUS_ERRS = {
    "embedding-padding": embedding(padding=True),
    "embedding-bag": embedding_bag(),
    "rms-norm": layer_norm(kind=nn.RMSNorm),
    "padding-modes-1d": convolution(dimensions=1, modes=MODES),
    "padding-modes-2d": convolution(dimensions=2, modes=MODES),
    "padding-modes-3d": convolution(dimensions=3, modes=MODES),
}


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", list(OPACUS_ERRS))
@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data(), style=STYLES)
def test_the_sum_is_that_of_autograd_where_opacus_has_no_rule_or_a_wrong_one(kind, n, data, style):
    agree(*data.draw(OPACUS_ERRS[kind]), n, style, single=gradients_of_autograd)


@pytest.mark.parametrize("n", [1, 7, 64])
@pytest.mark.parametrize("kind", list(LAYERS))
def test_in_float32_the_sum_is_within_a_millionth_of_that_of_opacus_gradients(kind, n):
    made = {
        "linear": (nn.Linear(9, 6), [5, 9], None),
        "conv1d": (nn.Conv1d(4, 6, 3, groups=2), [4, 9], None),
        "conv2d": (nn.Conv2d(3, 6, 3, padding=1, stride=2), [3, 8, 8], None),
        "conv3d": (nn.Conv3d(2, 3, 2, dilation=2), [2, 5, 5, 5], None),
        "embedding": (nn.Embedding(11, 5), [6], 11),
        "embedding-sparse": (nn.Embedding(11, 5, sparse=True), [6], 11),
        "layer-norm": (nn.LayerNorm(7), [3, 7], None),
        "group-norm": (nn.GroupNorm(2, 6), [6, 4, 4], None),
        "instance-norm": (nn.InstanceNorm2d(3, affine=True), [3, 5, 5], None),
    }
    torch.manual_seed(n)
    model, batch = problem(*made[kind], n)
    model, batch = model.float(), [t.float() if t.is_floating_point() else t for t in batch]
    gradients = gradients_of_opacus(model, batch)
    settled = {"clip_norm": about_half(gradients), "style": ClipStyle.FLAT}
    total = summed(model, batch, engine="bookkeeping", **settled)
    assert total.dtype is torch.float32
    within(1e-6, total.double(), clipped(gradients, **settled))


def test_wide_layers_on_few_positions_take_ghost_norms_and_agree():
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
    agree(layer, [5], 3, n, ClipStyle.FLAT, single=gradients_of_autograd)


@pytest.mark.parametrize(
    ("device", "least", "most"), [("cpu", 1 << 19, 1 << 20), ("meta", 1 << 25, 1 << 26)]
)
def test_patches_are_taken_in_parts_that_a_cache_or_a_device_holds(
    device, least, most, monkeypatch
):
    """Of ResNet-18's second convolution on 1024 images of 32 x 32: 600 million numbers."""
    taken = []

    def counted(module, inputs):
        taken.append(len(inputs) * 64 * 9 * 32 * 32)
        return torch.empty(len(inputs), 1, 64 * 9, 32 * 32, device=device)

    monkeypatch.setattr(layers, "patches", counted)
    images = 1024 if device == "meta" else 4
    layer = nn.Conv2d(64, 64, 3, padding=1, bias=False, device=device)
    inputs = torch.empty(images, 64, 32, 32, device=device)
    layers.contributions(layer, inputs, torch.empty_like(inputs))
    assert sum(taken) == images * 64 * 9 * 32 * 32
    assert max(taken) <= most and taken[0] >= least
    assert len(taken) <= 10
