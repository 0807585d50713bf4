"""A bound is at least the norm of what is summed, and a broken record leaves no trace."""

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dpfl_flower.client import ModelRefused
from dpfl_flower.client.per_example import Clip, ClipStyle, per_example_clipper
from dpfl_flower.client.per_sample.contributions import Ghost, Held, Outer, Rows
from dpfl_flower.client.per_sample.single import SingleClipper

RECORDS = 6


def parameters(*shapes):
    return tuple(nn.Parameter(torch.zeros(shape)) for shape in shapes)


def outer(scale=1.0):
    return Outer(parameters((4, 5), (4,)), scale * torch.randn(RECORDS, 5), torch.randn(RECORDS, 4))


def ghost(scale=1.0):
    return Ghost(
        parameters((4, 5), (4,)), scale * torch.randn(RECORDS, 3, 5), torch.randn(RECORDS, 3, 4)
    )


def rows(scale=1.0):
    ids = torch.randint(4, (RECORDS, 7))
    return Rows(*parameters((4, 5)), ids, scale * torch.randn(RECORDS, 7, 5))


def held(scale=1.0):
    return Held(parameters((4, 5)), [scale * torch.randn(RECORDS, 20)])


def norm(tensors):
    return float(torch.linalg.vector_norm(torch.cat([t.double().flatten() for t in tensors])))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(3)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("make", [outer, ghost, rows, held])
def test_the_square_is_that_of_the_held_gradients_and_the_sum_is_theirs(make, scale):
    part = make(scale)
    gradients = [g.double() for g in part.held()]
    squares = sum(g.square().sum(1) for g in gradients)
    ratio = (part.squares() / squares).sqrt()
    assert float(ratio.min()) > 1 - 1e-7 and float(ratio.max()) < 1 + 1e-5
    factors = torch.rand(RECORDS, dtype=torch.float64)
    for total, gradient in zip(part.weighted_sums(factors, None), gradients, strict=True):
        expected = (factors @ gradient).reshape(total.shape)
        assert norm([total - expected]) <= 1e-6 * norm([expected])


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("make", [outer, ghost, rows, held])
def test_a_dropped_record_leaves_no_trace(make, value):
    part = make()
    factors = torch.rand(RECORDS, dtype=torch.float64)
    dropped = torch.zeros(RECORDS, dtype=torch.bool)
    dropped[2] = True
    factors[2] = 0.0
    clean = part.weighted_sums(factors, dropped)
    for name in ("inputs", "gradients", "_inputs", "_gradients", "_sums"):
        tensors = getattr(part, name, None)
        for tensor in tensors if isinstance(tensors, list) else [tensors]:
            if tensor is not None and name != "_sums":
                tensor[2] = value
            elif tensor is not None:
                tensor[part._owners == 2] = value
    for before, after in zip(clean, part.weighted_sums(factors, dropped), strict=True):
        assert torch.equal(before, after)
    if not math.isfinite(value):
        assert not bool(torch.isfinite(part.squares()[2]))
        assert bool(torch.isfinite(part.squares()[[0, 1, 3, 4, 5]]).all())


def test_positions_that_cancel_do_not_carry_a_record_past_the_clip_norm():
    """The float32 product of a record's positions rounds by far more than its norm."""
    positions, n, m = 4, 60, 50
    inputs = torch.randn(1, 1, n).repeat(1, positions, 1) * 1e5
    inputs += torch.randn(1, positions, n)
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0])[None, :, None]
    part = Ghost(parameters((m, n)), inputs, signs * torch.randn(1, 1, m))
    true = (part._gradients.double().transpose(1, 2) @ part._inputs.double()).norm()
    bound = part.squares().sqrt()
    assert float(true) < 1e-3 * float(inputs.norm()), "the positions do cancel"
    for clip_norm in (float(true) / 2, float(true) / 1000):
        factors = Clip(clip_norm).scaling([part.squares()]).factors[0]
        (total,) = part.weighted_sums(factors, None)
        assert norm([total]) <= clip_norm
    assert float(true) <= float(bound)


def test_an_input_beyond_what_factors_can_scale_is_not_finite():
    part = outer()
    part.inputs[1] = 3e38
    assert math.isinf(float(part.squares()[1]))


CROSS_ENTROPY = nn.CrossEntropyLoss(reduction="none")


@pytest.mark.parametrize("style", list(ClipStyle))
@pytest.mark.parametrize("engine", ["bookkeeping", "hooks", "functorch"])
def test_one_record_moves_the_sum_by_at_most_the_clip_norm_in_every_style(engine, style):
    model = nn.Sequential(
        nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 3)
    )
    batch = [100 * torch.randn(7, 2, 4), torch.randint(3, (7,))]
    with per_example_clipper(
        model, CROSS_ENTROPY, clip_norm=0.01, engine=engine, style=style
    ) as clipper:
        whole = clipper.clipped_sum(batch)
        for i in range(7):
            others = [j for j in range(7) if j != i]
            rest = clipper.clipped_sum([t[others] for t in batch])
            moved = norm([a - b for a, b in zip(whole, rest, strict=True)])
            assert moved <= 0.01 * (1 + 1e-5)


def test_per_layer_clipping_gives_each_layer_its_share():
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    with per_example_clipper(
        model, CROSS_ENTROPY, clip_norm=1e-3, style=ClipStyle.PER_LAYER
    ) as clipper:
        total = clipper.clipped_sum([torch.randn(1, 5), torch.zeros(1, dtype=torch.long)])
    for layer in (total[:2], total[2:]):
        assert norm(layer) == pytest.approx(1e-3 / math.sqrt(2), rel=1e-5)


def test_automatic_clipping_scales_small_gradients_up():
    model = nn.Linear(1, 1, bias=False)
    with per_example_clipper(
        model, lambda o, t: o[:, 0], clip_norm=2.0, style=ClipStyle.AUTOMATIC
    ) as clipper:
        for size in (1e-3, 1.0, 1e3):
            (total,) = clipper.clipped_sum([torch.tensor([[size]]), torch.zeros(1)])
            assert float(total) == pytest.approx(2.0 * size / (size + 0.01), rel=1e-6)


def test_layers_after_which_tensors_change_in_place_are_right_or_refused():
    batch = [torch.randn(7, 5), torch.randint(3, (7,))]
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Linear(6, 3))
    with per_example_clipper(model, CROSS_ENTROPY, clip_norm=0.1) as ours:
        actual = ours.clipped_sum(batch)
    with SingleClipper(model, CROSS_ENTROPY, clip=Clip(0.1)) as single:
        expected = single.clipped_sum(batch)
    assert norm([a - b for a, b in zip(actual, expected, strict=True)]) < 1e-6

    class ChangesItsInput(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, x):
            x = x.clone()
            y = self.layer(x)
            x.zero_()
            return y

    with (
        per_example_clipper(ChangesItsInput(), CROSS_ENTROPY, clip_norm=0.1) as clipper,
        pytest.raises(ModelRefused, match="changed in place"),
    ):
        clipper.clipped_sum(batch)


class Recomputed(nn.Module):
    """Uses one layer twice and another for nothing; the backward pass runs the middle again."""

    def __init__(self):
        super().__init__()
        self.first, self.twice, self.unused = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        self.unused(x)
        x = checkpoint(lambda y: self.twice(torch.tanh(self.twice(y))), x, use_reentrant=False)
        return self.last(x)


def test_a_layer_counts_as_often_as_it_is_used_and_not_when_it_is_run_again():
    model, batch = Recomputed().double(), [torch.randn(7, 5).double(), torch.randint(3, (7,))]
    for style in ClipStyle:
        with per_example_clipper(
            model, CROSS_ENTROPY, clip_norm=0.5, engine="bookkeeping", style=style
        ) as ours:
            actual = ours.clipped_sum(batch)
        with SingleClipper(model, CROSS_ENTROPY, clip=Clip(0.5, style)) as single:
            expected = single.clipped_sum(batch)
        off = norm([a - b for a, b in zip(actual, expected, strict=True)])
        assert off <= 1e-9 * norm(expected)


@pytest.mark.parametrize("engine", ["bookkeeping", "hooks"])
def test_bfloat16_autocast_keeps_the_bound_and_comes_close(engine):
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 3))
    batch = [torch.randn(16, 20), torch.randint(3, (16,))]

    def total(autocast, batch):
        with per_example_clipper(
            model, CROSS_ENTROPY, clip_norm=0.1, engine=engine, autocast=autocast
        ) as clipper:
            return clipper.clipped_sum(batch)

    mixed, plain = total(True, batch), total(False, batch)
    assert all(t.dtype is torch.float32 for t in mixed)
    off = norm([a - b for a, b in zip(mixed, plain, strict=True)])
    assert 0 < off < 0.05 * norm(plain)
    one = total(True, [t[:1] for t in batch])
    assert norm(one) <= 0.1
