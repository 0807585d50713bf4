"""What a user adds is the same to the last bit, whoever else takes part and in whatever order."""

import logging

import numpy as np
import pytest
import torch
from torch import nn

from dpfl_flower.client import ModelRefused
from dpfl_flower.client.users import Engine, step_graph
from dpfl_flower.client.users.isolation import require_isolated
from dpfl_flower.client.users.loop import LoopEngine
from dpfl_flower.client.users.registry import Member
from dpfl_flower.client.users.selection import select_engine
from dpfl_flower.client.users.stacked import StackedEngine
from tests.support.users import (
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

CPU = torch.device("cpu")
USERS = 150


def members(model_fn, *, hostile=False):
    """Users of ragged sizes; the hostile twin of one sends what overflows."""
    rng = np.random.default_rng(4)
    scale = 1e30 if hostile and model_fn is not words else 1.0

    def data(user, count):
        return lambda: records_of(model_fn, count, user, scale)

    return [Member(user, data(user, int(count))) for user, count in enumerate(
        rng.integers(1, 40, USERS)
    )]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "model_fn", "threads"),
    [
        (Engine.STACKED, mlp, 1),
        (Engine.STACKED, mlp, 2),
        (Engine.STACKED, odd, 1),
        (Engine.STACKED, odd, 2),
        (Engine.STACKED, words, 2),
        (Engine.LOOP, odd, 1),
        (Engine.LOOP, cnn, 1),
    ],
)
def test_company_and_order_move_no_bit(kind, model_fn, threads):
    training, arrays = recipe(lr=0.3, batch_size=16), global_arrays(model_fn)
    engine = (
        LoopEngine(model_fn, training, device=CPU)
        if kind is Engine.LOOP
        else StackedEngine(model_fn, training, device=CPU, example=example_of(model_fn))
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        honest, hostile = members(model_fn), members(model_fn, hostile=True)
        if kind is Engine.LOOP:
            honest, hostile = honest[:12], hostile[:12]
        together = updates_by_user(engine, honest, arrays)
        rng = np.random.default_rng(1)
        for _ in range(3):
            chosen = rng.permutation(len(honest))
            mine = set(chosen[: len(chosen) // 3].tolist())
            company = [honest[i] if i in mine else hostile[i] for i in chosen.tolist()]
            found = updates_by_user(engine, company, arrays)
            for user in mine:
                assert np.array_equal(found[user], together[user]), user
        alone = updates_by_user(engine, honest[5:6], arrays)
        assert np.array_equal(alone[5], together[5])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("model_fn", [mlp, cnn])
def test_where_a_users_records_lie_in_memory_moves_no_bit(model_fn):
    # Users are often views into one table, so who comes before decides where one begins.
    engine = LoopEngine(model_fn, recipe(shuffle=False), device=CPU)
    inputs, targets = records_of(model_fn, 9, 1)
    found = []
    for offset in (0, 1, 3):
        table = torch.zeros(inputs.numel() + offset)
        table[offset:] = inputs.reshape(-1)
        mine = table[offset:].view(inputs.shape)
        one = Member(0, lambda mine=mine: (mine, targets))
        found.append(updates_by_user(engine, [one], global_arrays(model_fn))[0])
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])


class Remembers(nn.Module):
    """Keeps something of the last user in a plain attribute."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(30, 2)
        self.last = torch.zeros(30)

    def forward(self, x):
        y = self.layer(x + self.last)
        self.last = x.detach().mean(0)
        return y


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(30, 2)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.layer(x) * self.calls


class DrawsNumpy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(30, 2)

    def forward(self, x):
        return self.layer(x) * float(np.random.default_rng(GLOBAL_STATE.pop()).random())


GLOBAL_STATE = list(range(100_000))


@pytest.mark.parametrize(
    ("model_fn", "engine"),
    [
        (Remembers, Engine.LOOP),
        (Remembers, Engine.AUTO),
        (Counts, Engine.LOOP),
        (DrawsNumpy, Engine.LOOP),
    ],
)
def test_a_model_that_carries_something_from_user_to_user_is_refused(model_fn, engine):
    with pytest.raises(ModelRefused, match="depends on who else"):
        select_engine(
            engine,
            model_fn,
            recipe(),
            device=CPU,
            example=example_of(mlp),
            global_arrays=global_arrays(model_fn),
        )


class RaisesBackward(torch.autograd.Function):
    """Raises in the backward pass, for a gradient that only one user has."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if gradient.isnan().any():
            raise RuntimeError
        return gradient


class Wide(nn.Module):
    """Its large layer's gradient is there when an earlier layer's backward pass raises."""

    def __init__(self):
        super().__init__()
        self.narrow, self.wide = nn.Linear(30, 128), nn.Linear(128, 130)

    def forward(self, x):
        return self.wide(RaisesBackward.apply(self.narrow(x)))


def test_what_a_user_whose_training_raised_left_is_forgotten():
    arrays = global_arrays(Wide)
    engine = LoopEngine(Wide, recipe(), device=CPU)
    inputs, targets = records_of(mlp, 10, 1)
    broken = Member(0, lambda: (torch.full_like(inputs, torch.nan), targets))
    honest = Member(1, lambda: (inputs, targets))
    after = updates_by_user(engine, [broken, honest], arrays)
    assert after.keys() == {1}
    assert np.array_equal(after[1], updates_by_user(engine, [honest], arrays)[1])


class Replaces(nn.Module):
    """Writes and replaces buffers: they go back to their global values for the next user."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(30, 2)
        self.register_buffer("written", torch.zeros(30))
        self.register_buffer("replaced", torch.zeros(30), persistent=False)
        self.register_buffer("running", torch.zeros(2))

    def forward(self, x):
        with torch.no_grad():
            self.written += x.mean(0)
            self.replaced = self.replaced + x.mean(0)
            self.running = 0.9 * self.running + 0.1
        return self.layer(x + self.written + self.replaced)


def test_buffers_go_back_between_users_and_are_released_as_they_are():
    arrays, training = global_arrays(Replaces), recipe()
    engine = select_engine(
        Engine.LOOP, Replaces, training, device=CPU, example=example_of(mlp), global_arrays=arrays
    )
    people = [Member(i, lambda i=i: records_of(mlp, 10, i)) for i in range(3)]
    together = updates_by_user(engine, people, arrays)
    alone = updates_by_user(engine, people[2:], arrays)
    assert np.array_equal(together[2], alone[2])
    assert list(arrays)[:2] == ["written", "running"]
    np.testing.assert_allclose(together[2][30:32], [0.19, 0.19], rtol=1e-6)


def test_dropout_is_each_users_own():
    def model_fn():
        return nn.Sequential(nn.Linear(30, 40), nn.Dropout(0.5), nn.Linear(40, 2))

    arrays = global_arrays(model_fn)
    engine = LoopEngine(model_fn, recipe(), device=CPU)
    same = records_of(mlp, 10, 1)
    people = [Member(i, lambda: same) for i in range(3)]
    torch.manual_seed(11)
    state = torch.random.get_rng_state()
    together = updates_by_user(engine, people, arrays)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(12)
    alone = updates_by_user(engine, people[1:2], arrays)
    assert np.array_equal(together[1], alone[1])
    assert not np.array_equal(together[0], together[1])


def stacked(model_fn):
    return StackedEngine(model_fn, recipe(), device=CPU, example=example_of(model_fn))


def check(engine, model_fn):
    require_isolated(
        engine, example_of(model_fn), global_arrays(model_fn), batch_size=7, exact=True
    )


def test_the_check_finds_slots_that_begin_anywhere(monkeypatch):
    check(stacked(odd), odd)
    if not torch.backends.mkl.is_available():
        pytest.skip("other matrix products may not care where an operand begins")
    monkeypatch.setattr(step_graph, "_align_products", lambda graph: None)
    with pytest.raises(ModelRefused, match="depends on who else"):
        check(stacked(odd), odd)


def test_slots_without_the_factor_would_depend_on_their_place(monkeypatch):
    # The last entries of a vector loop are rounded differently: that is why slots come in 32s.
    monkeypatch.setattr("dpfl_flower.client.users.stacked.SLOT_MULTIPLE", 33)
    monkeypatch.setattr("dpfl_flower.client.users.stacked._CPU_BYTES", 1)
    engine, arrays = stacked(odd), global_arrays(odd)
    assert engine.chunk.users == 33
    people = [Member(i, lambda i=i: records_of(odd, 14, i)) for i in range(33)]
    together = updates_by_user(engine, people, arrays)
    moved = 0
    for first in range(33):
        turned = updates_by_user(engine, people[first:] + people[:first], arrays)
        moved += sum(not np.array_equal(turned[user], together[user]) for user in together)
    assert moved


def test_a_model_that_trains_on_nothing_is_an_error_and_not_silence(caplog):
    def model_fn():
        return nn.Sequential(nn.Linear(29, 2))

    with caplog.at_level(logging.CRITICAL), pytest.raises(ModelRefused, match="made-up records"):
        select_engine(
            Engine.AUTO,
            model_fn,
            recipe(),
            device=CPU,
            example=example_of(mlp),
            global_arrays=global_arrays(model_fn),
        )
