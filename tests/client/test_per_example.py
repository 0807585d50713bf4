"""Every engine sums single clipped gradients; one record moves the sum by at most C."""

import copy
import math

import pytest
import torch
from torch import nn

from dpfl_flower.client import ModelRefused
from dpfl_flower.client.per_example import (
    Clip,
    GradientEngine,
    per_example_clipper,
    per_example_losses,
)
from dpfl_flower.client.per_sample.single import SingleClipper

CROSS_ENTROPY = nn.CrossEntropyLoss(reduction="none")
C = 0.5
ENGINES = [engine for engine in GradientEngine if engine is not GradientEngine.AUTO]
BY_HOOKS = ["hooks", "ghost"]


class TwoInputs(nn.Module):
    """Embeds two ids, as a recommender does."""

    def __init__(self):
        super().__init__()
        self.users, self.items, self.head = nn.Embedding(9, 4), nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, user, item):
        return self.head(self.users(user) * self.items(item))


class Scaled(nn.Module):
    """A layer Opacus has no rule for."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 5))
        self.inner = nn.Linear(5, 3)

    def forward(self, x):
        return self.inner(x * self.scale)


MODELS = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)),
        lambda n: [torch.randn(n, 5)],
    ),
    "sequence": (
        lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Flatten(), nn.Linear(32, 3)),
        lambda n: [torch.randn(n, 4, 5)],
    ),
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
        ),
        lambda n: [torch.randn(n, 1, 8, 8)],
    ),
    "two-inputs": (TwoInputs, lambda n: [torch.randint(9, (n,)), torch.randint(7, (n,))]),
    "custom": (Scaled, lambda n: [torch.randn(n, 5)]),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(1)


def batch_of(name, n):
    return [*MODELS[name][1](n), torch.randint(3, (n,))]


def clipped_sum(model, batch, *, engine, clip_norm=C, loss_fn=CROSS_ENTROPY):
    with per_example_clipper(model, loss_fn, clip_norm=clip_norm, engine=engine) as clipper:
        return clipper.clipped_sum(batch)


def reference(model, batch, *, clip_norm=C):
    """One backward pass per record, in float64: gradient, clip, sum."""
    model = copy.deepcopy(model).double()
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = [torch.zeros_like(p) for p in parameters]
    *inputs, targets = batch
    for i in range(len(targets)):
        one = [t[i : i + 1].double() if t.is_floating_point() else t[i : i + 1] for t in inputs]
        loss = CROSS_ENTROPY(model(*one), targets[i : i + 1]).sum()
        gradient = torch.autograd.grad(loss, parameters)
        scale = min(1.0, clip_norm / float(norm(gradient)))
        for so_far, g in zip(total, gradient, strict=True):
            so_far += scale * g
    return total


def norm(tensors):
    return torch.linalg.vector_norm(torch.cat([t.detach().double().flatten() for t in tensors]))


def distance(left, right):
    return float(norm([a.double() - b.double() for a, b in zip(left, right, strict=True)]))


@pytest.mark.parametrize("n", [0, 1, 7, 64])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", list(MODELS))
def test_the_sum_is_that_of_clipped_single_gradients(name, engine, n):
    if name == "custom" and engine == "bookkeeping":
        pytest.skip("no rule for a layer of one's own: refused below")
    model = MODELS[name][0]()
    batch = batch_of(name, n)
    expected = reference(model, batch)
    actual = clipped_sum(model, batch, engine=engine)
    assert [t.shape for t in actual] == [t.shape for t in expected]
    assert distance(actual, expected) <= 1e-6 * float(norm(expected))


@pytest.mark.parametrize("engine", ENGINES)
def test_small_gradients_are_not_scaled(engine):
    model, batch = MODELS["mlp"][0](), batch_of("mlp", 7)
    loss = CROSS_ENTROPY(model(batch[0]), batch[1]).sum()
    plain = torch.autograd.grad(loss, list(model.parameters()))
    actual = clipped_sum(model, batch, engine=engine, clip_norm=1e6)
    assert distance(actual, plain) <= 1e-6 * float(norm(plain))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_frozen_parameter_is_left_out(engine):
    model, batch = MODELS["mlp"][0](), batch_of("mlp", 7)
    model[0].weight.requires_grad_(False)
    assert distance(clipped_sum(model, batch, engine=engine), reference(model, batch)) < 1e-6


@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine != "ghost"])
def test_half_precision_models_are_summed_in_float32(engine):
    model = MODELS["mlp"][0]().bfloat16()
    batch = [torch.randn(7, 5, dtype=torch.bfloat16), torch.randint(3, (7,))]
    actual = clipped_sum(model, batch, engine=engine)
    assert all(t.dtype is torch.float32 for t in actual)
    expected = reference(model, batch)
    assert distance(actual, expected) < 0.05 * float(norm(expected))


HOSTILE = {
    "huge": 1e5,
    "enormous": 1e30,
    "tiny": 1e-23,
    "nan": math.nan,
    "inf": math.inf,
    "largest": 3e38,
}


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["mlp", "sequence", "cnn"])
def test_one_record_moves_the_sum_by_at_most_the_clip_norm(name, engine, value):
    model = MODELS[name][0]()
    *inputs, targets = batch_of(name, 6)
    inputs[0][3] = inputs[0][3] * value if math.isfinite(value) else value
    keep = [0, 1, 2, 4, 5]
    with_it = clipped_sum(model, [*inputs, targets], engine=engine)
    without = clipped_sum(model, [t[keep] for t in (*inputs, targets)], engine=engine)
    assert all(torch.isfinite(t).all() for t in with_it)
    moved = distance(with_it, without)
    assert moved <= C * (1 + 1e-5)
    if not math.isfinite(value):
        assert moved <= 1e-6


def test_ghost_norms_survive_cancellation_between_positions():
    """Two positions of 1e5 whose gradients all but cancel: float32 norms would be noise."""
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Flatten())
    inputs = torch.tensor([[[1e5, 1.0], [1e5, -1.0]]])

    def loss_fn(outputs, targets):
        return outputs[:, 0] - outputs[:, 1]

    batch = [inputs, torch.zeros(1)]
    ghost = clipped_sum(model, batch, engine="ghost", loss_fn=loss_fn, clip_norm=1.0)
    torch.testing.assert_close(ghost[0], torch.tensor([[0.0, 1.0]]))


@pytest.mark.parametrize("engine", ENGINES)
def test_only_broken_records_give_zeros(engine):
    model, batch = MODELS["mlp"][0](), batch_of("mlp", 3)
    batch[0][:] = math.nan
    assert float(norm(clipped_sum(model, batch, engine=engine))) == 0


def hooks_and_leftovers(model):
    """Count everything that Opacus hangs on a model."""
    count = 0
    for module in model.modules():
        count += len(module._forward_hooks) + len(module._backward_hooks)
        count += len(module._forward_pre_hooks) + len(module._backward_pre_hooks)
        left = {"activations", "max_batch_len", "autograd_grad_sample_hooks"}
        left.add("ft_compute_sample_grad")
        count += len(left & module.__dict__.keys())
    for p in model.parameters():
        count += len(p.__dict__) + (p.grad is not None) + len(p._backward_hooks or ())
    return count


class FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("in the backward pass")


def fails_in_forward(outputs, targets):
    raise RuntimeError("in the loss")


def fails_in_backward(outputs, targets):
    return CROSS_ENTROPY(FailsBackward.apply(outputs), targets)


@pytest.mark.parametrize(
    ("name", "engine"),
    [(name, engine) for name in ("mlp", "custom") for engine in BY_HOOKS]
    + [("mlp", "bookkeeping")],
)
def test_nothing_stays_on_the_model(name, engine):
    model, batch = MODELS[name][0](), batch_of(name, 4)
    for loss_fn in (CROSS_ENTROPY, fails_in_forward, CROSS_ENTROPY, fails_in_backward):
        clipper = per_example_clipper(model, loss_fn, clip_norm=C, engine=engine)
        try:
            with clipper:
                assert hooks_and_leftovers(model) > 0
                clipper.clipped_sum(batch)
        except RuntimeError as error:
            assert loss_fn is not CROSS_ENTROPY, error
        else:
            assert loss_fn is CROSS_ENTROPY
        assert hooks_and_leftovers(model) == 0
    assert distance(clipped_sum(model, batch, engine=engine), reference(model, batch)) < 1e-6


@pytest.mark.parametrize("engine", ENGINES)
def test_a_failed_batch_leaves_nothing_for_the_next(engine):
    model, batch = MODELS["mlp"][0](), batch_of("mlp", 4)
    expected = reference(model, batch)
    fail = [True]

    def loss_fn(outputs, targets):
        if fail.pop() if fail else False:
            raise RuntimeError
        return CROSS_ENTROPY(outputs, targets)

    with per_example_clipper(model, loss_fn, clip_norm=C, engine=engine) as clipper:
        with pytest.raises(RuntimeError):
            clipper.clipped_sum(batch)
        assert distance(clipper.clipped_sum(batch), expected) < 1e-6


class SkipsALayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.skipped = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x):
        self.skipped(x)
        return self.used(x)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_parameter_that_the_loss_does_not_need_gets_zeros(engine):
    model, batch = SkipsALayer(), batch_of("mlp", 4)
    for _ in range(2):
        total = clipped_sum(model, batch, engine=engine)
        assert float(norm(total[:2])) > 0 and float(norm(total[2:])) == 0


class UsesAWeightDirectly(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x):
        return nn.functional.linear(x, self.layer.weight)


@pytest.mark.parametrize("engine", [*BY_HOOKS, "bookkeeping"])
def test_a_parameter_that_no_hook_sees_is_refused(engine):
    with pytest.raises(ModelRefused, match="outside the forward of its own module"):
        clipped_sum(UsesAWeightDirectly(), batch_of("mlp", 4), engine=engine)


class Unrolls(nn.Module):
    """Puts the positions of a sequence where the records should be."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x):
        return self.layer(x.reshape(-1, 5)).reshape(len(x), -1, 3).sum(1)


class TrainsBesideABuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(5))
        self.register_buffer("shift", torch.ones(5))
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(x.mean(1) * self.scale + self.shift)


@pytest.mark.parametrize("engine", BY_HOOKS)
@pytest.mark.parametrize("kind", [Unrolls, TrainsBesideABuffer])
def test_what_opacus_has_no_single_gradients_for_is_refused(kind, engine):
    model = kind()
    with pytest.raises(ModelRefused, match="Opacus"):
        clipped_sum(model, batch_of("sequence", 4), engine=engine)
    assert hooks_and_leftovers(model) == 0


def test_book_keeping_refuses_what_it_has_no_rule_for():
    with pytest.raises(ModelRefused, match="must count the records"):
        clipped_sum(Unrolls(), batch_of("sequence", 4), engine="bookkeeping")
    for kind in (TrainsBesideABuffer, Scaled):
        with pytest.raises(ModelRefused, match=f"no rule .* {kind.__name__}"):
            clipped_sum(kind(), batch_of("sequence", 4), engine="bookkeeping")


def test_a_parameter_that_no_hook_sees_is_functorchs():
    for kind, name in ((UsesAWeightDirectly, "mlp"), (TrainsBesideABuffer, "sequence")):
        model, batch = kind(), batch_of(name, 4)
        actual = clipped_sum(model, batch, engine="functorch")
        model.requires_grad_(True)
        with SingleClipper(model, CROSS_ENTROPY, clip=Clip(C)) as clipper:
            assert distance(actual, clipper.clipped_sum(batch)) < 1e-6


def test_shared_parameters_are_summed_by_hooks_and_refused_by_ghost():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.head(self.second(torch.tanh(self.first(x))))

    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(self.layer(torch.tanh(self.layer(x))))

    for kind in (Twice, Again):
        model, batch = kind(), batch_of("mlp", 4)
        for engine in ("hooks", "bookkeeping", "functorch"):
            actual = clipped_sum(model, batch, engine=engine)
            assert distance(actual, reference(model, batch)) < 1e-6
        with pytest.raises(ModelRefused):
            clipped_sum(model, batch, engine="ghost")
        assert hooks_and_leftovers(model) == 0


@pytest.mark.parametrize("loss_fn", [nn.CrossEntropyLoss(), lambda o, t: o, lambda o, t: o[:2, 0]])
def test_a_loss_that_is_not_one_per_record_is_refused(loss_fn):
    with pytest.raises(ValueError, match='reduction="none"'):
        clipped_sum(MODELS["mlp"][0](), batch_of("mlp", 4), engine="hooks", loss_fn=loss_fn)


def test_a_column_of_losses_is_one_per_record():
    outputs = torch.randn(4, 1)
    losses = per_example_losses(outputs, torch.zeros(4, 1), nn.MSELoss(reduction="none"))
    assert losses.shape == (4,)


def test_bad_arguments():
    with pytest.raises(ValueError, match="clip_norm=0"):
        per_example_clipper(nn.Linear(1, 1), CROSS_ENTROPY, clip_norm=0)
    with pytest.raises(ValueError, match="quantum"):
        per_example_clipper(nn.Linear(1, 1), CROSS_ENTROPY, clip_norm=1, engine="quantum")


@pytest.fixture
def without_tf32():
    """Let convolutions on CUDA keep float32's 24 bits: by default cuDNN takes 11 of them."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", list(MODELS))
def test_the_sum_is_the_same_on_cuda(name, engine, without_tf32):
    if name == "custom" and engine == "bookkeeping":
        pytest.skip("no rule for a layer of one's own: refused above")
    model, batch = MODELS[name][0](), batch_of(name, 7)
    expected = reference(model, batch)
    actual = clipped_sum(model.cuda(), [t.cuda() for t in batch], engine=engine)
    assert distance([t.cpu() for t in actual], expected) <= 1e-5 * float(norm(expected))
