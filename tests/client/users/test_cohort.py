"""What leaves a node moves by one user's bounded contribution, and by nothing else."""

import functools
import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpfl_flower.client import NODE_LOGGER, NodeError, NodeErrorCode
from dpfl_flower.client.users import Engine, LazyUsers, UserCohort
from dpfl_flower.client.users.registry import UserRegistry
from dpfl_flower.clipping import Norm
from dpfl_flower.quantize import BoundedSum, IntegerGrid, Rounding
from dpfl_flower.rng import SeededRandom, secure
from tests.support.users import (
    cnn,
    dimension,
    example_of,
    global_arrays,
    mlp,
    odd,
    recipe,
    records_of,
    request_for,
    updates_by_user,
    words,
)

COUNTS = (0, 1, 3, 7, 8, 30, 12, 5)


def people(model_fn, counts=COUNTS):
    return {user: records_of(model_fn, n, user) for user, n in enumerate(counts)}


def cohort_of(users, model_fn=mlp, **changes):
    arguments = {
        "model_fn": model_fn,
        "training": recipe(),
        "example": example_of(mlp if model_fn is None else model_fn),
        "obeys_lists": True,
        "device": "cpu",
    } | changes
    return UserCohort(users, **arguments)


@functools.cache
def shared(model_fn, engine):
    """One cohort for many questions, since an engine is traced and checked when it is built."""
    return cohort_of(people(model_fn), model_fn, engine=engine)


def listing(grid, users):
    return ask(grid, sampling_rate=None, users=tuple(users))


def grids(size):
    make = IntegerGrid.for_noise_multiplier
    return {
        "plain": make(1.0, size),
        "indicator": make(1.0, size, indicator_noise=3.0),
        "dithered": make(1.0, size, rounding=Rounding.DITHERED, indicator_noise=3.0),
        "l1": make(1.0, size, norm=Norm.L1, max_inflation=10.0),
        "fine": make(0.0, size),
    }


def ask(grid, **changes):
    seed = b"public" if grid.rounding is Rounding.DITHERED else None
    return request_for(grid.dimension, grid=grid, dither_seed=seed, **changes)


def length(total, grid):
    vector = total[: grid.dimension].astype(object)
    if grid.norm is Norm.L1:
        return int(abs(vector).sum())
    return float(int((vector**2).sum())) ** 0.5


@pytest.mark.parametrize(
    ("model_fn", "engine"),
    [(mlp, "stacked"), (odd, "stacked"), (words, "stacked"), (mlp, "loop"), (cnn, "loop")],
)
@pytest.mark.parametrize("kind", ["plain", "indicator", "dithered", "l1", "fine"])
def test_a_user_more_or_less_moves_the_sum_by_that_users_bounded_contribution(
    model_fn, engine, kind
):
    arrays, grid = global_arrays(model_fn), grids(dimension(model_fn))[kind]
    cohort = shared(model_fn, engine)
    everybody = cohort.answer(ask(grid), arrays)
    for user in (0, 1, 7):
        rest = cohort.answer(listing(grid, set(range(len(COUNTS))) - {user}), arrays)
        alone = cohort.answer(listing(grid, {user}), arrays)
        np.testing.assert_array_equal(everybody - rest, alone)
        assert length(alone, grid) <= grid.sensitivity_units
        if grid.indicator_units:
            assert abs(alone[-1]) == (grid.indicator_units if COUNTS[user] else 0)
        assert alone.any() == bool(COUNTS[user])


@pytest.mark.parametrize("engine", ["loop", "stacked"])
def test_a_registry_without_the_user_is_as_good_as_a_list_without(engine):
    arrays, grid = global_arrays(mlp), grids(4130)["indicator"]
    users = people(mlp)
    del users[5]
    found = cohort_of(users, engine=engine).answer(ask(grid), arrays)
    listed = shared(mlp, engine).answer(listing(grid, users), arrays)
    np.testing.assert_array_equal(found, listed)


HOSTILE = {
    "nan": lambda x, y: (torch.full_like(x, torch.nan), y),
    "inf": lambda x, y: (torch.full_like(x, torch.inf), y),
    "huge": lambda x, y: (x * 1e30, y),
    "far": lambda x, y: (x * 100, y),
    "class out of range": lambda x, y: (x, torch.full_like(y, 99)),
    "rows missing": lambda x, y: (x[1:], y),
    "another shape": lambda x, y: (x[:, :5], y),
    "integers": lambda x, y: (x.long(), y),
    "half": lambda x, y: (x.half(), y),
    "no tensors": lambda x, y: ("what", "ever"),
    "nothing": lambda x, y: None,
    "only inputs": lambda x, y: (x,),
    "no records": lambda x, y: (x[:0], y[:0]),
}


@pytest.mark.parametrize("engine", ["loop", "stacked"])
@pytest.mark.parametrize("kind", list(HOSTILE))
def test_whatever_a_user_holds_the_others_contribute_what_they_did(engine, kind):
    arrays, grid = global_arrays(mlp), grids(4130)["indicator"]
    without = shared(mlp, engine).answer(listing(grid, {0, 1, 2, 3, 4, 6, 7}), arrays)
    users = people(mlp)
    users[5] = HOSTILE[kind](*users[5])
    hostile = cohort_of(users, engine=engine)
    hostile._engine = shared(mlp, engine)._engine  # spares its checks
    total = hostile.answer(ask(grid), arrays)
    moved = total - without
    assert length(moved, grid) <= grid.sensitivity_units
    assert abs(moved[-1]) <= grid.indicator_units
    if kind not in ("far", "huge"):
        assert not moved.any()
    else:
        assert moved.any() == (kind == "far")


def test_why_a_user_contributes_zeros_is_said_in_the_nodes_log_only(caplog):
    users = people(mlp) | {5: HOSTILE["class out of range"](*records_of(mlp, 3, 5))}
    with caplog.at_level(logging.INFO, NODE_LOGGER):
        cohort_of(users, engine="stacked").answer(ask(grids(4130)["plain"]), global_arrays(mlp))
    said = [record for record in caplog.records if record.name == NODE_LOGGER]
    assert [record.getMessage() for record in said] == [
        "StackedEngine: 64 users at a time, at most 4.8 MiB",
        "User 5 contributes zeros",
    ]


@settings(max_examples=12, deadline=None)
@given(order=st.permutations(range(len(COUNTS))), engine=st.sampled_from(["loop", "stacked"]))
def test_the_order_of_the_users_moves_nothing(order, engine):
    arrays, grid = global_arrays(mlp), grids(4130)["indicator"]
    expected = shared(mlp, engine).answer(ask(grid), arrays)
    found = shared(mlp, engine).answer(listing(grid, order), arrays)
    np.testing.assert_array_equal(found, expected)


def test_a_sum_is_that_of_a_bounded_sum_over_the_updates():
    arrays, grid = global_arrays(mlp), grids(4130)["dithered"]
    cohort = shared(mlp, "stacked")
    total = cohort.answer(ask(grid), arrays)
    by_hand = BoundedSum(grid, clip_norm=0.4, dither_seed=b"public")
    updates = updates_by_user(cohort._engine, UserRegistry(people(mlp)), arrays)
    for update in updates.values():
        by_hand.add([update])
    np.testing.assert_array_equal(total, by_hand.total)


def test_both_engines_answer_the_same_but_for_rounding():
    arrays, grid = global_arrays(mlp), grids(4130)["indicator"]
    loop, stack = (shared(mlp, engine).answer(ask(grid), arrays) for engine in ("loop", "stacked"))
    assert loop[-1] == stack[-1]
    assert np.abs(loop - stack)[:-1].max() <= 2
    assert np.linalg.norm(loop[:-1]) > 10_000


def counting(count):
    """Users who each add one, in a closed form: the sum tells how many took part."""
    return UserCohort(
        dict.fromkeys(range(count), 1.0), local_update=lambda arrays, one: {"x": arrays["x"] + one}
    )


def took_part(cohort, *, rate, server_round=1):
    grid = IntegerGrid.for_noise_multiplier(1.0, 1)
    request = request_for(
        1, grid=grid, clip_norm=1.0, sampling_rate=rate, server_round=server_round
    )
    total = cohort.answer(request, {"x": np.zeros(1)})
    return round(float(total[0]) * grid.unit_size(1.0))


def test_each_user_joins_by_a_fair_coin_of_the_stated_rate():
    cohort = counting(2000)
    found = [took_part(cohort, rate=0.05) for _ in range(60)]
    # 60 * 2000 coins: the mean is within 5 standard deviations, and 10 % off would not be.
    expected, deviation = 2000 * 0.05, (2000 * 0.05 * 0.95 / 60) ** 0.5
    assert abs(np.mean(found) - expected) < 5 * deviation < 0.1 * expected
    assert 0.5 < np.var(found) / (2000 * 0.05 * 0.95) < 2


def test_coins_are_fresh_for_every_message_also_of_the_same_round():
    users = {name: index for index, name in enumerate("abcdefghij")}
    seen = set()

    def note(arrays, index):
        drawn.add(index)
        return arrays

    cohort = UserCohort(users, local_update=note)
    request = request_for(1, sampling_rate=0.5)
    for _ in range(40):
        drawn = set()
        cohort.answer(request, {"x": np.zeros(1)})
        seen.add(frozenset(drawn))
    assert len(seen) > 30


def test_everybody_joins_at_rate_one_and_a_seeded_source_repeats():
    assert took_part(counting(50), rate=1.0) == 50
    kwargs = {"local_update": lambda arrays, one: {"x": arrays["x"] + one}}
    users = dict.fromkeys(range(50), 1.0)
    first, again = (
        UserCohort(users, rng=SeededRandom(3), obeys_lists=True, **kwargs) for _ in range(2)
    )
    assert took_part(first, rate=0.5) == took_part(again, rate=0.5)


def test_a_list_is_obeyed_only_where_the_app_says_so():
    arrays = {"x": np.zeros(1)}
    update = {"local_update": lambda arrays, one: {"x": arrays["x"] + one}}
    request = request_for(1, sampling_rate=None, users=("bob",), clip_norm=10.0)
    with pytest.raises(NodeError) as refused:
        UserCohort({"ann": 1.0, "bob": 2.0}, **update).answer(request, arrays)
    assert refused.value.code is NodeErrorCode.POLICY_REFUSED
    obedient = UserCohort({"ann": 1.0, "bob": 2.0}, obeys_lists=True, **update)
    assert obedient.answer(request, arrays)[0] == round(2.0 / request.grid.unit_size(10.0))
    with pytest.raises(ValueError, match="'eve' is not registered"):
        obedient.answer(request_for(1, sampling_rate=None, users=("eve",)), arrays)
    empty = obedient.answer(request_for(1, sampling_rate=None, users=()), arrays)
    assert not empty.any()


def test_a_closed_form_is_bounded_and_isolated_like_any_training():
    arrays = {"a": np.zeros(3, np.float32), "count": np.array(4), "b": np.array(1.0)}
    grid = IntegerGrid.for_noise_multiplier(1.0, 4, indicator_noise=4.0)

    def solve(given, data):
        if data == "writes":
            given["a"] += 1.0
        if data == "wrong":
            return {"a": given["a"]}
        if data == "raises":
            raise RuntimeError
        step = data * (1 + given["a"].sum())
        return {"a": given["a"] + step, "count": np.array(9), "b": given["b"] - step}

    def answer(*data):
        return UserCohort(dict(enumerate(data)), local_update=solve).answer(
            request_for(4, grid=grid, clip_norm=1.0), arrays
        )

    one = answer(0.1)
    np.testing.assert_array_equal(one[:3], [round(0.1 / grid.unit_size(1.0))] * 3)
    assert one[4] == grid.indicator_units
    assert answer(100.0)[4] == -grid.indicator_units
    assert length(answer(100.0), grid) <= grid.sensitivity_units
    np.testing.assert_array_equal(answer(0.0), [0, 0, 0, 0, grid.indicator_units])  # valid, zero
    for other in ("writes", "wrong", "raises", float("nan")):
        np.testing.assert_array_equal(answer(0.1, other, 0.1), 2 * one)


def test_a_node_without_a_single_record_answers_zeros():
    for users in ({}, LazyUsers(lambda i: None, 3), people(mlp, (0, 0))):
        cohort = cohort_of(users, engine="loop")
        assert not cohort.answer(ask(grids(4130)["indicator"]), global_arrays(mlp)).any()
        assert cohort.population == len(users if isinstance(users, dict) else range(3))


@pytest.mark.parametrize("kind", ["another shape", "half", "integers", "no tensors"])
def test_an_odd_first_user_changes_neither_the_engine_nor_anybody_elses_contribution(kind):
    arrays, grid = global_arrays(mlp), grids(4130)["indicator"]
    users = people(mlp, (3, 5, 9))
    expected = cohort_of(users).answer(listing(grid, (1, 2)), arrays)
    odd_first = cohort_of(users | {0: HOSTILE[kind](*users[0])})
    moved = odd_first.answer(ask(grid), arrays) - expected
    assert type(odd_first._engine).__name__ == "StackedEngine"
    assert length(moved, grid) <= grid.sensitivity_units
    assert not moved.any()


def test_who_leaves_an_empty_place_moves_nobody_elses_contribution():
    # Shuffling is seeded by name, and a place's number stays its user's.
    arrays, grid = global_arrays(mlp), grids(4130)["indicator"]
    users = people(mlp)

    def leaving(i):
        if i == 2:
            raise LookupError
        return users[i]

    full = LazyUsers(lambda i: users[i], len(users))
    everybody = cohort_of(full, engine="loop").answer(ask(grid), arrays)
    alone = shared(mlp, "loop").answer(listing(grid, {2}), arrays)
    rest = cohort_of(LazyUsers(leaving, len(users)), engine="loop").answer(ask(grid), arrays)
    np.testing.assert_array_equal(everybody - rest, alone)
    # The test sees renaming: had those behind moved up, their contributions would be others.
    moved_up = cohort_of({i - (i > 2): u for i, u in users.items() if i != 2}, engine="loop")
    assert (moved_up.answer(ask(grid), arrays) != rest).any()


def test_users_without_names_are_refused():
    for users in ([1.0], (1.0,), range(3)):
        with pytest.raises(ValueError, match="must be a mapping from names to data, or LazyUsers"):
            UserCohort(users, local_update=lambda arrays, one: arrays)


def test_coins_that_follow_a_seed_are_for_simulations_only():
    kwargs = {"local_update": lambda arrays, one: arrays}
    with pytest.raises(ValueError, match=r"rng=.* must protect: coins that follow a seed"):
        UserCohort({}, rng=SeededRandom(3), **kwargs)
    assert UserCohort({}, rng=SeededRandom(3), obeys_lists=True, **kwargs).population == 0
    assert UserCohort({}, rng=secure(), **kwargs).population == 0


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"model_fn": None}, "model_fn=None"),
        ({"training": None}, "training=None"),
        ({"local_update": lambda a, d: a}, "local_update="),
        ({"engine": "fast"}, "fast"),
        ({"example": None}, "example=None must be given with model_fn"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(changes, culprit):
    with pytest.raises(ValueError, match=culprit):
        cohort_of({}, **changes)
    with pytest.raises(ValueError, match="all int or all str"):
        cohort_of({"ann": 1, 2: 3})


def test_arrays_that_do_not_fit_the_grid_or_the_model_are_refused():
    cohort = cohort_of(people(mlp))
    with pytest.raises(ValueError, match="dimension=4129 must be the model's, 4130"):
        cohort.answer(request_for(4129), global_arrays(mlp))
    with pytest.raises(ValueError, match="missing"):
        cohort.answer(request_for(dimension(odd)), global_arrays(odd))


def test_a_round_trains_with_its_own_number():
    cohort, arrays = shared(mlp, "stacked"), global_arrays(mlp)
    first, again, second = (
        cohort.answer(request_for(4130, server_round=number), arrays) for number in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != second).any()  # another order of the records


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("model_fn", [mlp, odd, words, cnn])
def test_a_gpu_stacks_what_vmap_supports_and_agrees_with_the_cpu(model_fn):
    arrays, grid = (
        global_arrays(model_fn),
        IntegerGrid.for_noise_multiplier(1.0, dimension(model_fn)),
    )
    totals = [
        cohort_of(people(model_fn), model_fn, device=device, engine=engine).answer(
            ask(grid), arrays
        )
        for device, engine in (("cpu", Engine.LOOP), ("cuda", Engine.STACKED))
    ]
    assert np.linalg.norm(totals[0] - totals[1]) < 1e-2 * np.linalg.norm(totals[0])
