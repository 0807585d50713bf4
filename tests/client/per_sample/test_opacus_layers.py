"""Recurrent layers and attention: Opacus' own are trained exactly, torch's are refused by name."""

import logging

import pytest
import torch
from opacus.grad_sample import GradSampleModule
from opacus.layers import DPGRU, DPLSTM, DPRNN, DPMultiheadAttention
from torch import nn

from dpfl_flower.client import GradientEngine, ModelRefused
from dpfl_flower.client.engine_choice import choose_engine
from dpfl_flower.client.errors import NODE_LOGGER
from dpfl_flower.client.per_example import Clip, per_example_clipper
from dpfl_flower.client.per_sample.bookkeeping import BookKeepingClipper
from dpfl_flower.client.per_sample.functorch import FunctorchClipper
from dpfl_flower.client.per_sample.opacus import HooksClipper
from dpfl_flower.client.per_sample.single import SingleClipper
from dpfl_flower.client.separable import require_trainable

# Opacus hooks the first layer too, whose input needs no gradient.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")
CROSS_ENTROPY = nn.CrossEntropyLoss(reduction="none")
WIDTH, LENGTH = 4, 5
ONE = [torch.zeros(1, LENGTH, WIDTH), torch.zeros(1, dtype=torch.long)]
TWO_WAYS = {"num_layers": 2, "bidirectional": True}


class Recurrent(nn.Module):
    """The last state of a recurrent layer, and a head on it."""

    def __init__(self, kind, **settings):
        super().__init__()
        self.layer = kind(WIDTH, 6, batch_first=True, **settings)
        self.head = nn.Linear(6 * (2 if settings.get("bidirectional") else 1), 3)

    def forward(self, x):
        return self.head(self.layer(x)[0][:, -1])


class Attention(nn.Module):
    """The mean of what attends to itself, and a head on it."""

    def __init__(self, kind, *, batch_first=True):
        super().__init__()
        self.layer, self.head = kind(WIDTH, 2, batch_first=batch_first), nn.Linear(WIDTH, 3)
        self.batch_first = batch_first

    def forward(self, x):
        x = x if self.batch_first else x.transpose(0, 1)
        return self.head(self.layer(x, x, x)[0].mean(1 if self.batch_first else 0))


OPACUS = {
    "rnn": (lambda: Recurrent(DPRNN), HooksClipper),
    "lstm": (lambda: Recurrent(DPLSTM), HooksClipper),
    "gru": (lambda: Recurrent(DPGRU), HooksClipper),
    "lstm-two-ways": (lambda: Recurrent(DPLSTM, **TWO_WAYS), HooksClipper),
    "attention": (lambda: Attention(DPMultiheadAttention), BookKeepingClipper),
}


def opacus_gradients(model, batch):
    """Return each record's gradient as Opacus holds it: ``(records, numbers)``."""
    *inputs, targets = batch
    hooked = GradSampleModule(model, loss_reduction="sum")
    CROSS_ENTROPY(hooked(*inputs), targets).sum().backward()
    gradients = torch.cat([p.grad_sample.flatten(1) for p in model.parameters()], 1).detach()
    hooked.remove_hooks()
    hooked.cleanup()
    return gradients


def flat(clipper, batch):
    with clipper:
        return torch.cat([t.flatten() for t in clipper.clipped_sum(batch)])


@pytest.mark.parametrize("n", [1, 7, 64])
@pytest.mark.parametrize("kind", list(OPACUS))
def test_the_default_gives_opacus_clipped_sum_and_autograds(kind, n):
    torch.manual_seed(n)
    model = OPACUS[kind][0]().double()
    batch = [torch.randn(n, LENGTH, WIDTH).double(), torch.randint(3, (n,))]
    gradients = opacus_gradients(model, batch)
    norms = gradients.norm(dim=1)
    clip_norm = float(norms.median()) * 1.01  # about half of the records are clipped
    factors = (clip_norm * (1 - 2.0**-22) / norms).clamp(max=1.0)  # with the margin of `Clip`
    opacus = (factors[:, None] * gradients).sum(0)
    ours = flat(per_example_clipper(model, CROSS_ENTROPY, clip_norm=clip_norm), batch)
    autograd = flat(SingleClipper(model, CROSS_ENTROPY, clip=Clip(clip_norm)), batch)
    assert float((ours - opacus).norm()) <= 1e-6 * float(opacus.norm())
    assert float((ours - autograd).norm()) <= 1e-6 * float(autograd.norm())
    assert float((gradients.sum(0) - opacus).norm()) > 1e-3 * float(opacus.norm()) or n == 1


@pytest.mark.parametrize("kind", list(OPACUS))
def test_an_empty_sample_adds_nothing(kind):
    batch = [torch.zeros(0, LENGTH, WIDTH), torch.zeros(0, dtype=torch.long)]
    ours = flat(per_example_clipper(OPACUS[kind][0](), CROSS_ENTROPY, clip_norm=1.0), batch)
    assert not bool(ours.any())


@pytest.mark.parametrize("kind", list(OPACUS))
def test_falling_back_to_hooks_is_said_in_one_line(kind, caplog):
    build, expected = OPACUS[kind]
    model = build()
    require_trainable(model)
    with caplog.at_level(logging.INFO, NODE_LOGGER):
        chosen = choose_engine(model, CROSS_ENTROPY, GradientEngine.AUTO, ONE, public=True)
    assert chosen is expected
    said = [r.getMessage() for r in caplog.records if r.name == NODE_LOGGER]
    assert len(said) == (1 if expected is HooksClipper else 0)
    assert all("Opacus' hooks" in line and "layer" in line for line in said)


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_torchs_recurrent_layers_are_refused_with_what_to_use_instead(kind):
    with pytest.raises(ModelRefused, match=rf"^layer: .*opacus\.layers\.DP{kind.__name__} "):
        require_trainable(Recurrent(kind))
    model = Recurrent(kind)
    model.layer.requires_grad_(False)
    require_trainable(model)  # what is not trained is not clipped either


def test_torchs_attention_is_refused_with_what_to_use_instead():
    with pytest.raises(ModelRefused, match=r"^layer: .*opacus\.layers\.DPMultiheadAttention "):
        require_trainable(Attention(nn.MultiheadAttention))
    block = nn.TransformerEncoderLayer(WIDTH, 2, 8, batch_first=True)
    with pytest.raises(ModelRefused, match=r"^0\.self_attn: .*opacus\.layers\.DPMultihead"):
        require_trainable(nn.Sequential(block))
    attention = Attention(nn.MultiheadAttention)
    attention.layer.in_proj_weight.requires_grad_(False)  # the other projections are trained
    with pytest.raises(ModelRefused, match="DPMultiheadAttention"):
        require_trainable(attention)


SECOND = {
    "attention": (
        lambda: Attention(DPMultiheadAttention, batch_first=False),
        r"batch_first=True",
    ),
    # Opacus' bias for keys has its records second, whatever batch_first says.
    "bias-for-keys": (
        lambda: Attention(lambda *a, **k: DPMultiheadAttention(*a, add_bias_kv=True, **k)),
        r"engine 'hooks' fails on a batch of 3 records",
    ),
}


@pytest.mark.parametrize("kind", list(SECOND))
def test_layers_whose_records_come_second_fall_back_to_functorch_and_are_exact(kind, caplog):
    build, reason = SECOND[kind]
    torch.manual_seed(0)
    model = build()
    with caplog.at_level(logging.INFO, NODE_LOGGER):
        chosen = choose_engine(model, CROSS_ENTROPY, GradientEngine.AUTO, ONE, public=True)
    assert chosen is FunctorchClipper
    said = [r.getMessage() for r in caplog.records if r.name == NODE_LOGGER]
    assert len(said) == 1 and said[0].startswith("Functorch bounds")
    with pytest.raises(ModelRefused, match=reason):
        choose_engine(model, CROSS_ENTROPY, GradientEngine.HOOKS, ONE, public=True)
    model = model.double()
    batch = [torch.randn(7, LENGTH, WIDTH).double(), torch.randint(3, (7,))]
    ours = flat(chosen(model, CROSS_ENTROPY, clip=Clip(0.5)), batch)
    autograd = flat(SingleClipper(model, CROSS_ENTROPY, clip=Clip(0.5)), batch)
    assert float((ours - autograd).norm()) <= 1e-6 * float(autograd.norm())
