"""A model whose records meet anywhere but in the sum of losses is refused, with the fix named."""

import pytest
import torch
from opacus.grad_sample import GradSampleModule
from opacus.validators import ModuleValidator
from torch import nn

from dpfl_flower.client import GradientEngine, ModelRefused, NodeErrorCode
from dpfl_flower.client.separable import (
    buffer_places,
    require_separable,
    require_trainable,
    restored_buffers,
    unchanged_buffers,
)

CROSS_ENTROPY = nn.CrossEntropyLoss(reduction="none")
ENGINES = [e for e in GradientEngine if e is not GradientEngine.AUTO]
ONE = [torch.zeros(1, 5), torch.zeros(1, dtype=torch.long)]


def head(*layers):
    return nn.Sequential(nn.Linear(5, 4), *layers, nn.Linear(4, 3))


def frozen(layer):
    return layer.requires_grad_(False)


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(4),
        nn.BatchNorm1d(4, affine=False),
        frozen(nn.BatchNorm1d(4)),
        nn.BatchNorm1d(4, track_running_stats=False),
        nn.SyncBatchNorm(4),
        nn.LazyBatchNorm1d(),
        nn.Sequential(nn.Identity(), nn.InstanceNorm1d(4, track_running_stats=True)),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_a_layer_that_couples_or_remembers_records_is_refused_by_name(layer):
    with pytest.raises(ModelRefused, match=r"ModuleValidator\.fix") as refused:
        require_trainable(head(layer))
    assert refused.value.code is NodeErrorCode.MODEL_REFUSED
    assert isinstance(refused.value, ValueError)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_an_embedding_that_writes_to_itself_or_counts_over_the_batch_is_refused(kind, option):
    with pytest.raises(ModelRefused, match=next(iter(option))):
        require_trainable(nn.Sequential(kind(5, 3, **option)))


def test_the_fix_that_is_named_works():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 9, 3))
    fixed = ModuleValidator.fix(model)
    require_trainable(fixed)
    for engine in ENGINES:
        require_separable(fixed, CROSS_ENTROPY, [torch.zeros(1, 1, 5, 5), ONE[1]], engine=engine)


def test_a_model_without_anything_to_train_is_refused():
    with pytest.raises(ModelRefused, match="no trainable parameter"):
        require_trainable(nn.Sequential(nn.Flatten()))
    with pytest.raises(ModelRefused, match="no trainable parameter"):
        require_trainable(frozen(nn.Linear(2, 2)))


def test_a_model_that_opacus_wraps_is_refused():
    with pytest.raises(ModelRefused, match="hand over the model itself"):
        require_trainable(GradSampleModule(nn.Linear(2, 2)))


def test_checking_leaves_the_models_mode_alone():
    model = head().eval()
    require_trainable(model)
    assert not model.training


class Adds(nn.Module):
    """Adds to each record what ``of`` makes of the batch."""

    def __init__(self, of):
        super().__init__()
        self.of = of

    def forward(self, x):
        return x + self.of(x)


@pytest.mark.parametrize(
    "of",
    [
        lambda x: x.mean(0),
        lambda x: x.roll(1, 0),
        lambda x: torch.softmax(x, 0),
        lambda x: x.detach().mean(0),
        lambda x: x.detach().max(),
        lambda x: torch.tensor(float(len(x))),
    ],
    ids=["mean", "neighbour", "softmax", "detached-mean", "detached-max", "batch-size"],
)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_model_whose_records_meet_is_refused(engine, of):
    with pytest.raises(ModelRefused, match="record"):
        require_separable(head(Adds(of)), CROSS_ENTROPY, ONE, engine=engine)


class AddsInTraining(Adds):
    """Adds nothing in evaluation, and may draw besides."""

    def __init__(self, of, *, draws):
        super().__init__(of)
        self.draws = draws

    def forward(self, x):
        if not self.training:
            return x
        x = super().forward(x)
        return nn.functional.dropout(x, 0.2) if self.draws else x


@pytest.mark.parametrize("draws", [False, True])
@pytest.mark.parametrize("of", [lambda x: -x.detach().mean(0), lambda x: x.detach().max()])
def test_records_that_meet_without_gradients_in_training_only_are_found(of, draws):
    torch.manual_seed(0)
    layer = AddsInTraining(of, draws=draws)
    for model in (head(layer), head(nn.Dropout(0.5), layer)):
        with pytest.raises(ModelRefused, match="record"):
            require_separable(model, CROSS_ENTROPY, ONE, engine=GradientEngine.HOOKS)
        assert all(m.p == 0.5 for m in model.modules() if isinstance(m, nn.Dropout))


def test_a_batch_that_is_counted_in_training_only_is_found():
    model = head(AddsInTraining(lambda x: torch.tensor(float(len(x))), draws=False))
    with pytest.raises(ModelRefused, match="alone"):
        require_separable(model, CROSS_ENTROPY, ONE, engine=GradientEngine.HOOKS)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_model_that_draws_in_its_own_way_passes(engine):
    model = head(AddsInTraining(torch.zeros_like, draws=True), nn.Dropout(0.5))
    require_separable(model, CROSS_ENTROPY, ONE, engine=engine)
    assert model.training and model[2].p == 0.5


def test_a_loss_whose_records_meet_is_refused():
    def loss_fn(outputs, targets):
        return CROSS_ENTROPY(outputs - outputs.mean(0), targets)

    with pytest.raises(ModelRefused, match="record"):
        require_separable(head(), loss_fn, ONE, engine=GradientEngine.HOOKS)


class Tied(nn.Module):
    """Uses a weight in its own layer and, unseen by hooks, as the output layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3, bias=False)

    def forward(self, x):
        return self.layer(x) + nn.functional.linear(x * x, self.layer.weight)


def reflecting():
    model = nn.Sequential(
        nn.Conv1d(1, 2, 3, padding=1, padding_mode="reflect"), nn.Flatten(), nn.Linear(10, 3)
    )
    return model, [torch.zeros(1, 1, 5), ONE[1]]


@pytest.mark.parametrize("engine", ["bookkeeping", "ghost", "hooks"])
def test_a_parameter_that_hooks_do_not_see_is_refused(engine):
    with pytest.raises(ModelRefused, match="autograd's"):
        require_separable(Tied(), CROSS_ENTROPY, ONE, engine=GradientEngine(engine))


@pytest.mark.parametrize("engine", ["ghost", "hooks"])
def test_gradients_that_opacus_gets_wrong_are_refused(engine):
    model, example = reflecting()
    with pytest.raises(ModelRefused, match="autograd's"):
        require_separable(model, CROSS_ENTROPY, example, engine=GradientEngine(engine))


def test_where_opacus_is_wrong_another_engine_is_right():
    assert require_separable(Tied(), CROSS_ENTROPY, ONE, engine=GradientEngine.FUNCTORCH)
    model, example = reflecting()
    for engine in (GradientEngine.BOOKKEEPING, GradientEngine.FUNCTORCH):
        assert require_separable(model, CROSS_ENTROPY, example, engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("model", "example"),
    [
        (head(nn.ReLU(), nn.Dropout(0.5)), ONE),
        (head(nn.LayerNorm(4), nn.Dropout(0.5)), ONE),
        (
            nn.Sequential(nn.Embedding(6, 4, padding_idx=0), nn.Flatten(), nn.Linear(8, 3)),
            [torch.zeros(1, 2, dtype=torch.long), ONE[1]],
        ),
    ],
    ids=["dropout", "layer-norm", "embedding"],
)
def test_a_sound_model_passes_and_keeps_its_weights(model, example, engine):
    before = {name: t.clone() for name, t in model.state_dict().items()}
    random_state = torch.random.get_rng_state()
    require_separable(model, CROSS_ENTROPY, example, engine=engine)
    assert torch.equal(random_state, torch.random.get_rng_state())
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_binary_and_regression_targets_pass():
    single = nn.Sequential(nn.Linear(5, 1), nn.Flatten(0))
    for loss_fn in (nn.BCEWithLogitsLoss(reduction="none"), nn.MSELoss(reduction="none")):
        require_separable(single, loss_fn, [ONE[0], torch.zeros(1)], engine=GradientEngine.GHOST)


class Picky(nn.Module):
    """Accepts probabilities only, which made-up records are not."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x):
        if (x < 0).any():
            raise ValueError("not probabilities")
        return self.layer(x)


def test_a_model_that_cannot_be_checked_is_refused_in_ghost_mode_only():
    require_separable(Picky(), CROSS_ENTROPY, ONE, engine=GradientEngine.HOOKS)
    with pytest.raises(ModelRefused, match="use engine 'hooks'"):
        require_separable(Picky(), CROSS_ENTROPY, ONE, engine=GradientEngine.GHOST)


class Counts(nn.Module):
    """Keeps a sum of what it saw in a buffer."""

    def __init__(self, *, persistent=True):
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.register_buffer("seen", torch.zeros(5), persistent=persistent)

    def forward(self, x):
        self.seen += x.detach().sum(0)
        return self.layer(x)


@pytest.mark.parametrize("persistent", [True, False])
def test_a_buffer_that_training_writes_is_refused_and_restored(persistent):
    model = nn.Sequential(Counts(persistent=persistent))
    with pytest.raises(ModelRefused, match=r"0\.seen"), unchanged_buffers(model):
        model(torch.ones(2, 5))
    assert model[0].seen.abs().sum() == 0
    with pytest.raises(ModelRefused, match="buffers that change"):
        require_separable(model, CROSS_ENTROPY, ONE, engine=GradientEngine.HOOKS)


def test_a_buffer_is_restored_after_an_exception_too():
    model = Counts()
    with pytest.raises(KeyError), unchanged_buffers(model):
        model(torch.ones(2, 5))
        raise KeyError
    assert model.seen.abs().sum() == 0


def test_new_and_replaced_buffers_are_refused():
    model = Counts()
    with pytest.raises(ModelRefused, match="extra"), unchanged_buffers(model):
        model.register_buffer("extra", torch.zeros(1))
    with pytest.raises(ModelRefused, match="seen"), unchanged_buffers(model):
        model.seen = torch.zeros(7)


def test_constant_buffers_pass_even_with_nan_in_them():
    model = Counts()
    model.seen[0] = torch.nan
    with unchanged_buffers(model):
        model.layer(torch.ones(2, 5))


class Remembering(nn.Module):
    """Puts another buffer in the place of its own, as counters of batches do."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1)
        self.register_buffer("seen", torch.zeros(1))
        self.register_buffer("last", None)

    def forward(self, x):
        self.seen, self.last = self.seen + x.sum(), x
        return self.linear(x)


def test_a_buffer_that_is_replaced_is_given_back():
    model = nn.Sequential(Remembering(), nn.BatchNorm1d(1))
    first = model[0].seen
    with restored_buffers(buffer_places(model)):
        model(torch.ones(4, 2))
        assert model[0].seen.item() == 8
    assert model[0].seen is first
    assert model[0].last is None
    assert first.item() == 0
    assert not model[1].running_mean.any()
