"""What no rule is for is trained by the next engine, exactly, or refused before a charge."""

import copy
import logging
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from dpfl_flower.client import (
    NODE_LOGGER,
    DPSGDClient,
    DPSGDConfig,
    GradientEngine,
    ModelRefused,
    NodeLedger,
)
from dpfl_flower.client.engine_choice import choose_engine
from dpfl_flower.client.per_example import Clip
from dpfl_flower.client.per_sample.bookkeeping import BookKeepingClipper
from dpfl_flower.client.per_sample.functorch import FunctorchClipper
from dpfl_flower.client.per_sample.opacus import HooksClipper
from dpfl_flower.client.separable import require_trainable

C = 0.3
N = 6
CROSS_ENTROPY = nn.CrossEntropyLoss(reduction="none")
AUTO, FUNCTORCH = GradientEngine.AUTO, GradientEngine.FUNCTORCH


class Bag(nn.Module):
    """A bag of ids, with a head on it."""

    def __init__(self, mode):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(7, 4, mode=mode), nn.Linear(4, 3)

    def forward(self, ids, weights=None):
        return self.head(self.bag(ids, per_sample_weights=weights))


class BagByOffsets(Bag):
    def forward(self, ids):
        return self.head(self.bag(ids.flatten(), torch.arange(len(ids)) * ids.shape[1]))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.both = nn.Bilinear(5, 4, 3)

    def forward(self, left, right):
        return self.both(left, right)


class TiedHead(nn.Module):
    """Uses its embedding's table to score the ids too."""

    def __init__(self):
        super().__init__()
        self.table, self.inner = nn.Embedding(7, 4), nn.Linear(4, 4)

    def forward(self, ids):
        return nn.functional.linear(self.inner(self.table(ids).mean(1)), self.table.weight)


class OwnParameter(nn.Module):
    """A parameter of its own, beside a buffer, which Opacus has nothing for."""

    def __init__(self, *, buffer):
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.linspace(0.5, 1.5, 5)), nn.Linear(5, 3)
        self.register_buffer("shift", torch.ones(5) if buffer else None)

    def forward(self, x):
        x = x * self.scale
        return self.head(x if self.shift is None else x + self.shift)


class CellFromInput(nn.Module):
    """A cell whose first state is made of the input."""

    def __init__(self, kind):
        super().__init__()
        self.first, self.cell, self.head = nn.Linear(5, 4), kind(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.cell(x, torch.tanh(self.first(x))))


class CellFromZeros(CellFromInput):
    def forward(self, x):
        return self.head(self.cell(x))


class Attention(nn.Module):
    def __init__(self, *, batch_first=True, **settings):
        super().__init__()
        self.layer = nn.MultiheadAttention(8, 2, batch_first=batch_first, **settings)
        self.head, self.batch_first = nn.Linear(8, 3), batch_first

    def forward(self, x, absent=None):
        x = x if self.batch_first else x.transpose(0, 1)
        attended = self.layer(x, x, x, key_padding_mask=absent)[0]
        return self.head(attended.mean(1 if self.batch_first else 0))


class AttentionAlone(Attention):
    """Asks for no weights, which takes another way through torch."""

    def forward(self, x):
        return self.head(self.layer(x, x, x, need_weights=False)[0].mean(1))


def weight_norm():
    with pytest.warns(FutureWarning):
        return nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(5, 3)))


def block(**settings):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **settings)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 3))


def ids(n):
    return torch.randint(7, (n, 3))


def rows(*shape):
    return lambda n: torch.randn(n, *shape)


FALLS_BACK = {
    "maximum-of-a-bag": (lambda: Bag("max"), [ids], FunctorchClipper),
    "weights-of-a-bag": (lambda: Bag("sum"), [ids, rows(3)], FunctorchClipper),
    "offsets-of-a-bag": (lambda: BagByOffsets("mean"), [ids], FunctorchClipper),
    "bilinear": (Pair, [rows(5), rows(4)], FunctorchClipper),
    "old-weight-norm": (weight_norm, [rows(5)], FunctorchClipper),
    "weight-norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 3))),
        [rows(5)],
        HooksClipper,
    ),
    "tied-table": (TiedHead, [ids], FunctorchClipper),
    "parameter": (lambda: OwnParameter(buffer=False), [rows(5)], HooksClipper),
    "parameter-and-buffer": (lambda: OwnParameter(buffer=True), [rows(5)], FunctorchClipper),
    "cell": (lambda: CellFromInput(nn.GRUCell), [rows(5)], FunctorchClipper),
}
ATTENTION = {
    "attention": (Attention, [rows(3, 8)]),
    "no-weights": (AttentionAlone, [rows(3, 8)]),
    "mask": (Attention, [rows(3, 8), lambda n: torch.tensor([[False, False, True]] * n)]),
    "records-second": (lambda: Attention(batch_first=False), [rows(3, 8)]),
    "bias-for-keys": (lambda: Attention(add_bias_kv=True), [rows(3, 8)]),
    "block": (lambda: block(dropout=0.0), [rows(3, 8)]),
}


def one(inputs):
    """Return shapes of one record."""
    return [*(torch.zeros_like(make(1)) for make in inputs), torch.zeros(1, dtype=torch.long)]


def clipped_one_by_one(build, state, batch):
    """Autograd, record by record, in float64: gradient, clip, sum."""
    model = build()  # no copy: old weight_norm keeps a weight that cannot be copied
    model.load_state_dict(state)
    model.double()
    parameters = list(model.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    gradients = []
    for record in zip(*(t.split(1) for t in batch), strict=True):
        *inputs, target = (t.double() if t.is_floating_point() else t for t in record)
        loss = CROSS_ENTROPY(model(*inputs), target).sum()
        gradients.append(
            torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        )
        factor = min(1.0, C / float(length(gradients[-1])))
        for so_far, gradient in zip(total, gradients[-1], strict=True):
            so_far += factor * gradient
    assert any(float(length(gradient)) > C for gradient in gradients)
    return total


def length(tensors):
    return torch.linalg.vector_norm(torch.cat([t.double().flatten() for t in tensors]))


def require_exact(kind, build, batch):
    """The sum is autograd's to 1e-6, and no record adds more than C."""
    model = build()
    expected = clipped_one_by_one(build, model.state_dict(), batch)
    with kind(model, CROSS_ENTROPY, clip=Clip(C)) as clipper:
        total = clipper.clipped_sum(batch)
        off = [a.double() - e for a, e in zip(total, expected, strict=True)]
        assert float(length(off)) <= 1e-6 * float(length(expected))
        for i in range(N):
            alone = clipper.clipped_sum([t[i : i + 1] for t in batch])
            assert float(length(alone)) <= C * (1 + 1e-6)


def batch_of(inputs, classes=3):
    return [*(make(N) for make in inputs), torch.randint(classes, (N,))]


@pytest.mark.parametrize("name", list(FALLS_BACK))
def test_what_has_no_rule_is_trained_exactly_by_the_next_engine(name, caplog):
    torch.manual_seed(0)
    build, inputs, expected = FALLS_BACK[name]
    model = build()
    require_trainable(model)
    with caplog.at_level(logging.INFO, NODE_LOGGER):
        chosen = choose_engine(model, CROSS_ENTROPY, AUTO, one(inputs), public=True)
    assert chosen is expected
    said = [r.getMessage() for r in caplog.records if r.name == NODE_LOGGER]
    assert len(said) == 1 and said[0].startswith(("Functorch bounds", "Opacus' hooks bound"))
    require_exact(chosen, build, batch_of(inputs))


@pytest.mark.parametrize("name", list(ATTENTION))
def test_torchs_attention_is_trained_exactly_by_functorch_and_by_no_other(name):
    torch.manual_seed(0)
    build, inputs = ATTENTION[name]
    model, example = build(), one(inputs)
    for engine in (engine for engine in GradientEngine if engine is not FUNCTORCH):
        with pytest.raises(ModelRefused, match=r"DPMultiheadAttention.*engine 'functorch'"):
            require_trainable(model, engine=engine)
    require_trainable(model, engine=FUNCTORCH)
    chosen = choose_engine(model, CROSS_ENTROPY, FUNCTORCH, example, public=True)
    assert chosen is FunctorchClipper
    require_exact(chosen, build, batch_of(inputs))


def test_dropout_inside_attention_passes_too_and_stays():
    model = block(dropout=0.25)
    require_trainable(model, engine=FUNCTORCH)
    choose_engine(model, CROSS_ENTROPY, FUNCTORCH, one([rows(3, 8)]), public=True)
    assert model[0].self_attn.dropout == model[0].dropout1.p == 0.25
    with FunctorchClipper(model, CROSS_ENTROPY, clip=Clip(C)) as clipper:
        for _ in range(5):
            assert float(length(clipper.clipped_sum(batch_of([rows(3, 8)])))) <= N * C * (1 + 1e-6)


@pytest.mark.parametrize("kind", [nn.RNNCell, nn.GRUCell])
def test_what_no_engine_gets_right_is_refused_with_what_to_use_instead(kind):
    with pytest.raises(ModelRefused, match=rf"opacus\.layers\.dp_rnn\.DP{kind.__name__} .*cell"):
        choose_engine(CellFromZeros(kind), CROSS_ENTROPY, AUTO, one([rows(5)]), public=True)


def test_the_cells_that_are_named_are_trained_exactly():
    from opacus.layers import dp_rnn

    for kind in (dp_rnn.DPRNNCell, dp_rnn.DPGRUCell):
        build = partial(CellFromZeros, partial(kind, bias=True))
        chosen = choose_engine(build(), CROSS_ENTROPY, AUTO, one([rows(5)]), public=True)
        require_exact(chosen, build, batch_of([rows(5)]))


@pytest.mark.parametrize("engine", [e for e in GradientEngine if e not in (AUTO, FUNCTORCH)])
@pytest.mark.parametrize("name", ["maximum-of-a-bag", "bilinear", "old-weight-norm", "tied-table"])
def test_an_engine_that_breaks_on_a_layer_refuses_and_names_another(engine, name):
    build, inputs, _ = FALLS_BACK[name]
    with pytest.raises(ModelRefused, match=r"engine '(functorch|hooks)'"):
        choose_engine(build(), CROSS_ENTROPY, engine, one(inputs), public=True)


class FailsUnderAutocast(nn.Linear):
    """Multiplies by a table of float32, which autocast does not convert."""

    def forward(self, x):
        h = super().forward(x)
        if h.dtype is not torch.float32:
            raise TypeError("not float32")
        return h


def collects_in_float32(outputs, targets):
    return torch.zeros(len(targets)).index_add(0, torch.arange(len(targets)), outputs[:, 0])


@pytest.mark.parametrize(
    ("model", "loss_fn"),
    [(nn.Linear(3, 1), collects_in_float32), (FailsUnderAutocast(3, 1), lambda o, t: o[:, 0] - t)],
    ids=["loss", "model"],
)
@pytest.mark.parametrize("engine", [AUTO, FUNCTORCH, GradientEngine.HOOKS])
def test_what_raises_in_mixed_precision_only_is_refused_before_a_charge(
    model, loss_fn, engine, tmp_path
):
    def client(*, mixed_precision, path):
        return DPSGDClient(
            copy.deepcopy(model),
            TensorDataset(torch.randn(20, 3), torch.rand(20)),
            config=DPSGDConfig(
                sampling_rate=1.0,
                steps_per_round=1,
                planned_rounds=10,
                clip_norm=C,
                expected_batch_size=10.0,
                delta=1e-5,
                noise_multiplier=1.0,
                mixed_precision=mixed_precision,
            ),
            loss_fn=loss_fn,
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
            ledger=NodeLedger("heart", path=path),
            engine=engine,
            example=[torch.zeros(3), torch.tensor(0.0)],
            device="cpu",
        )

    charged = client(mixed_precision=False, path=tmp_path / "float32.jsonl")
    charged.fit(charged.get_parameters({}), {})
    refused = client(mixed_precision=True, path=tmp_path / "mixed.jsonl")
    with pytest.raises(ModelRefused, match="mixed precision"):
        refused.fit(refused.get_parameters({}), {})
    assert not (tmp_path / "mixed.jsonl").exists()


def test_what_runs_in_mixed_precision_passes():
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    for style in ("flat", "per-layer", "automatic"):
        chosen = choose_engine(
            model, CROSS_ENTROPY, AUTO, one([rows(5)]), public=True, style=style, autocast=True
        )
        assert chosen is BookKeepingClipper
