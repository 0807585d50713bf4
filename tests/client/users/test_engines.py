"""Both engines do what a plain PyTorch loop does, to float tolerance, for users of any size."""

import copy
import logging

import numpy as np
import pytest
import torch
from torch import nn

from dpfl_flower.client import NODE_LOGGER, ModelRefused
from dpfl_flower.client.users import Engine, LazyUsers
from dpfl_flower.client.users.loop import LoopEngine
from dpfl_flower.client.users.model import ResidentModel
from dpfl_flower.client.users.registry import UserRegistry
from dpfl_flower.client.users.selection import select_engine
from dpfl_flower.client.users.stacked import StackedEngine
from tests.support.users import (
    PER_RECORD,
    cnn,
    example_of,
    global_arrays,
    mlp,
    odd,
    recipe,
    records_of,
    updates_by_user,
    words,
)

SIZES = (0, 1, 2, 6, 7, 8, 20, 20, 61)
CPU = torch.device("cpu")


def registry_of(model_fn, sizes=SIZES):
    return UserRegistry({seed: records_of(model_fn, n, seed) for seed, n in enumerate(sizes)})


def plain_pytorch(model_fn, training, data, arrays, user, server_round=1):
    """What a textbook would do for one user."""
    model = model_fn()
    model.load_state_dict({name: torch.from_numpy(a.copy()) for name, a in arrays.items()})
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
    settings = {"lr": training.lr}
    if training.momentum:
        settings["momentum"] = training.momentum
    optimizer = kinds[training.optimizer](model.parameters(), **settings)
    inputs, targets = data
    for epoch in range(training.epochs):
        order = training.order(len(inputs), server_round=server_round, user=user, epoch=epoch)
        for picks in torch.split(order, training.batch_size):
            optimizer.zero_grad()
            PER_RECORD(model(inputs[picks]), targets[picks]).mean().backward()
            optimizer.step()
    after = model.state_dict()
    return np.concatenate([(after[k].numpy() - arrays[k]).reshape(-1) for k in arrays])


def distance(update, expected):
    """How far off, in norms of what is expected."""
    return np.linalg.norm(update - expected) / np.linalg.norm(expected)


def engine_of(kind, model_fn, training):
    if kind is Engine.LOOP:
        return LoopEngine(model_fn, training, device=CPU)
    return StackedEngine(model_fn, training, device=CPU, example=example_of(model_fn))


def in_float64(model_fn):
    return lambda: model_fn().double()


def records_in_float64(model_fn, count, seed):
    inputs, targets = records_of(model_fn, count, seed)
    return (inputs.double() if inputs.is_floating_point() else inputs), targets


IN_ORDER = {"shuffle": False, "batch_size": 50}
MOMENTUM = {"momentum": 0.9, "epochs": 3, "batch_size": 4}
ADAM = {"optimizer": "adam", "lr": 0.01, "epochs": 2}


@pytest.mark.parametrize("kind", [Engine.LOOP, Engine.STACKED])
@pytest.mark.parametrize(
    ("model_fn", "changes"),
    [
        *((model_fn, {}) for model_fn in (mlp, odd, words, cnn)),
        *((mlp, changes) for changes in (IN_ORDER, MOMENTUM, ADAM)),
        (words, ADAM),
        (cnn, MOMENTUM),
    ],
)
def test_an_engine_trains_as_plain_pytorch(kind, model_fn, changes):
    # In float64, since many steps of a small normalised model magnify what float32 rounds.
    training, wide = recipe(**changes), in_float64(model_fn)
    arrays = {name: a.astype(np.float64) for name, a in global_arrays(model_fn).items()}
    if kind is Engine.LOOP:
        engine = LoopEngine(wide, training, device=CPU)
    else:
        example = [part[0] for part in records_in_float64(model_fn, 1, 0)]
        engine = StackedEngine(wide, training, device=CPU, example=example)
    registry = UserRegistry({i: records_in_float64(model_fn, n, i) for i, n in enumerate(SIZES)})
    found = updates_by_user(engine, registry, arrays)
    assert found.keys() == {user for user, n in enumerate(SIZES) if n}
    for user, update in found.items():
        expected = plain_pytorch(wide, training, registry[user].load(), arrays, user)
        assert np.abs(expected).max() > 1e-3
        assert distance(update, expected) < 1e-6


@pytest.mark.parametrize("kind", [Engine.LOOP, Engine.STACKED])
@pytest.mark.parametrize("model_fn", [mlp, words, cnn])
def test_in_float32_an_engine_is_off_by_rounding_only(kind, model_fn):
    training, arrays = recipe(), global_arrays(model_fn)
    registry = registry_of(model_fn)
    for user, update in updates_by_user(
        engine_of(kind, model_fn, training), registry, arrays
    ).items():
        expected = plain_pytorch(model_fn, training, registry[user].load(), arrays, user)
        assert distance(update, expected) < 1e-4


@pytest.mark.parametrize("kind", [Engine.LOOP, Engine.STACKED])
def test_more_users_than_slots_and_lazily_read_ones_are_trained_alike(kind):
    training, arrays = recipe(), global_arrays(mlp)
    sizes = [1 + (i * 13) % 30 for i in range(150)]
    engine = engine_of(kind, mlp, training)
    assert engine.chunk.users < len(sizes)
    lazy = UserRegistry(LazyUsers(lambda i: records_of(mlp, sizes[i], i), len(sizes)))
    named = UserRegistry({i: records_of(mlp, n, i) for i, n in enumerate(sizes)})
    first = updates_by_user(engine, named, arrays)
    again = updates_by_user(engine, lazy, arrays)
    assert all(np.array_equal(first[user], again[user]) for user in first)
    for user in (0, 77, 149):
        expected = plain_pytorch(mlp, training, named[user].load(), arrays, user)
        assert distance(first[user], expected) < 1e-4


def test_numpy_records_are_as_good_as_tensors():
    arrays = global_arrays(mlp)
    inputs, targets = records_of(mlp, 20, 1)
    frozen = inputs.numpy().copy()
    frozen.flags.writeable = False
    engine = LoopEngine(mlp, recipe(), device=CPU)
    found = updates_by_user(
        engine, UserRegistry({0: (inputs, targets), 1: (frozen, targets.numpy())}), arrays
    )
    alike = updates_by_user(engine, UserRegistry({1: (inputs, targets)}), arrays)
    assert np.array_equal(found[1], alike[1])
    assert found.keys() == {0, 1}


class Frozen(nn.Module):
    """A frozen layer, a tied one, buffers of all kinds, and an unused parameter."""

    def __init__(self):
        super().__init__()
        self.still = nn.Linear(30, 10)
        self.still.requires_grad_(False)
        self.there, self.back = nn.Linear(10, 4, bias=False), nn.Linear(4, 2)
        self.same = self.there
        self.unused = nn.Parameter(torch.ones(3))
        self.register_buffer("scale", torch.full((10,), 0.5))
        self.register_buffer("seen", torch.tensor(5))
        self.register_buffer("shift", torch.ones(10), persistent=False)

    def forward(self, x):
        x = self.still(x).tanh() * self.scale + self.shift
        return self.back(self.there(x) + self.same(x).sin())


@pytest.mark.parametrize("kind", [Engine.LOOP, Engine.STACKED])
@pytest.mark.parametrize("changes", [{}, {"momentum": 0.5}])
def test_frozen_tied_and_unused_parameters_and_buffers(kind, changes):
    torch.manual_seed(0)
    built = Frozen()
    training, arrays = recipe(**changes), {k: v.numpy() for k, v in built.state_dict().items()}
    data = records_of(mlp, 20, 1)
    model_fn = lambda: copy.deepcopy(built)  # noqa: E731
    if kind is Engine.LOOP:
        engine = LoopEngine(model_fn, training, device=CPU)
    else:
        engine = StackedEngine(model_fn, training, device=CPU, example=example_of(mlp))
    found = updates_by_user(engine, UserRegistry({0: data}), arrays)[0]
    floating = {name: a for name, a in arrays.items() if a.dtype == np.float32}
    assert "same.weight" in floating and "seen" not in floating
    model = copy.deepcopy(built)
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=training.lr, **changes
    )
    order = training.order(20, server_round=1, user=0)
    for picks in torch.split(order, training.batch_size):
        optimizer.zero_grad()
        PER_RECORD(model(data[0][picks]), data[1][picks]).mean().backward()
        optimizer.step()
    after = model.state_dict()
    expected = np.concatenate([(after[k].numpy() - a).reshape(-1) for k, a in floating.items()])
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)


def test_updates_follow_the_order_of_the_global_arrays():
    training, arrays = recipe(), global_arrays(mlp)
    turned = dict(reversed(arrays.items()))
    for kind in (Engine.LOOP, Engine.STACKED):
        engine = engine_of(kind, mlp, training)
        straight = updates_by_user(engine, registry_of(mlp, (9,)), arrays)[0]
        back = updates_by_user(engine, registry_of(mlp, (9,)), turned)[0]
        sizes = [a.size for a in arrays.values()]
        parts = np.split(straight, np.cumsum(sizes)[:-1])
        np.testing.assert_array_equal(np.concatenate(parts[::-1]), back)


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.pop("0.bias"),
        lambda a: a.update(more=np.zeros(3, np.float32)),
        lambda a: a.update({"0.bias": np.zeros(63, np.float32)}),
        lambda a: a.update({"0.bias": np.zeros(64, np.int64)}),
    ],
)
def test_arrays_that_are_not_the_models_are_refused(change):
    arrays = global_arrays(mlp)
    change(arrays)
    engine = LoopEngine(mlp, recipe(), device=CPU)
    with pytest.raises(ValueError, match=r"bias|more"):
        updates_by_user(engine, registry_of(mlp, (9,)), arrays)


def automatic(model_fn, training, example=None):
    return select_engine(
        Engine.AUTO,
        model_fn,
        training,
        device=CPU,
        example=example or example_of(model_fn),
        global_arrays=global_arrays(model_fn),
    )


def large():
    return nn.Sequential(nn.Linear(30, 2000), nn.ReLU(), nn.Linear(2000, 200), nn.Linear(200, 2))


def dropping():
    return nn.Sequential(nn.Linear(30, 8), nn.Dropout(0.5), nn.Linear(8, 2))


def normalising():
    return nn.Sequential(nn.Linear(30, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(30, 2)

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else -self.layer(x)


@pytest.mark.parametrize(
    ("model_fn", "example_like", "expected"),
    [
        (mlp, mlp, StackedEngine),
        (odd, odd, StackedEngine),
        (words, words, StackedEngine),
        (cnn, cnn, LoopEngine),
        (large, mlp, LoopEngine),
        (dropping, mlp, LoopEngine),
        (normalising, mlp, LoopEngine),
        (Branching, mlp, LoopEngine),
    ],
)
def test_the_engine_is_chosen_by_the_model(model_fn, example_like, expected):
    engine = automatic(model_fn, recipe(), example_of(example_like))
    assert type(engine) is expected
    sizes = (3, 8)
    found = updates_by_user(engine, registry_of(example_like, sizes), global_arrays(model_fn))
    assert found.keys() <= {0, 1}


@pytest.mark.parametrize("model_fn", [dropping, normalising, Branching])
def test_a_stack_refuses_what_it_would_train_differently(model_fn):
    with pytest.raises(ModelRefused):
        select_engine(
            Engine.STACKED,
            model_fn,
            recipe(),
            device=CPU,
            example=example_of(mlp),
            global_arrays=global_arrays(model_fn),
        )


def test_the_memory_of_a_chunk_follows_from_the_model_alone():
    small, wide = automatic(mlp, recipe()), automatic(mlp, recipe(batch_size=70))
    assert small.chunk.users == 64
    assert wide.chunk.users == 32
    assert 64 * 4130 * 4 * 4 < small.chunk.bytes < 6 << 20
    with_state = automatic(mlp, recipe(optimizer="adam"))
    assert with_state.chunk.users == 32
    loop = automatic(cnn, recipe())
    assert loop.chunk.users == 1
    assert loop.chunk.bytes == 3 * 4 * sum(p.numel() for p in cnn().parameters())


def test_a_model_whose_state_dict_holds_more_than_its_tensors_is_refused():
    class Noted(nn.Linear):
        def get_extra_state(self):
            return torch.zeros(2)

        def set_extra_state(self, state):
            pass

    with pytest.raises(ValueError, match="_extra_state"):
        ResidentModel(lambda: Noted(2, 2), device="cpu")


def test_users_with_other_shapes_or_very_many_steps_go_through_the_loop(caplog):
    training, arrays = recipe(batch_size=1), global_arrays(words)
    engine = engine_of(Engine.STACKED, words, training)
    longer = (torch.randint(0, 50, (5, 9)), torch.randint(0, 3, (5,)))
    many = records_of(words, 1030, 5)
    registry = UserRegistry(dict(enumerate([records_of(words, 6, 0), longer, many])))
    with caplog.at_level(logging.WARNING):
        found = updates_by_user(engine, registry, arrays)
    assert not [record for record in caplog.records if record.name == NODE_LOGGER]
    for user in range(3):
        expected = plain_pytorch(words, training, registry[user].load(), arrays, user)
        assert distance(found[user], expected) < 1e-2
