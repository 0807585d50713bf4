"""A node of many users answers one integer sum, and nothing else leaves it."""

import logging
import pickle

import cloudpickle
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from dpfl_flower import FixedClipping, records
from dpfl_flower.accounting import EveryoneSampling
from dpfl_flower.client import NODE_LOGGER, NodeErrorCode
from dpfl_flower.client.users import CohortRequest, UserCohort, app, user_cohort_app
from dpfl_flower.quantize import IntegerGrid
from dpfl_flower.simulation import InProcessGrid
from dpfl_strategies import DPFedAvg
from tests.support.node import all_bytes, context, message
from tests.support.users import example_of, global_arrays, mlp, recipe, records_of, request_for

SECRET = "patient-4711-8.31415926"
BUILT = []


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch):
    monkeypatch.setattr(app, "_cohorts", {})
    BUILT.clear()


def update(arrays, step):
    if step == SECRET:
        raise ValueError(SECRET)
    return {name: array + step for name, array in arrays.items()}


def cohort_fn(ctx):
    BUILT.append(ctx.node_id)
    return UserCohort({"ann": 1.0, "bob": 2.0, "eve": SECRET}, local_update=update)


def content(request=None, **changes):
    request = request or request_for(4, clip_norm=100.0)
    return RecordDict(
        {
            records.ARRAYS: ArrayRecord({"w": Array(np.zeros((2, 2), np.float32))}),
            records.CONFIG: ConfigRecord({records.SERVER_ROUND: 1}),
            records.COHORT: ConfigRecord(dict(request.to_config()) | changes),
        }
    )


def ask(sent, ctx=None, fn=cohort_fn):
    return user_cohort_app(fn)(message("train", sent), ctx or context())


def test_the_reply_is_one_int64_array_and_nothing_else():
    request = request_for(4, clip_norm=100.0)
    reply = ask(content(request))
    assert list(reply.content) == [records.INTEGER_SUM]
    assert list(reply.content[records.INTEGER_SUM]) == [records.SUM]
    total = reply.content[records.INTEGER_SUM][records.SUM].numpy()
    assert total.dtype == np.int64
    expected = request.open_sum()
    for step in (1.0, 2.0):
        expected.add([np.full(4, step, np.float32)])
    np.testing.assert_array_equal(total, expected.total)


def test_nothing_of_an_exception_leaves(caplog):
    def broken(ctx):
        raise RuntimeError(SECRET)

    with caplog.at_level(logging.INFO, NODE_LOGGER):
        for fn in (cohort_fn, broken):
            assert SECRET.encode() not in all_bytes(ask(content(), fn=fn))
    assert ask(content(), fn=broken).error.code == NodeErrorCode.CLIENT_FAILED
    assert SECRET in caplog.text


def array(stype, data):
    return Array("float32", (4,), stype, data)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda sent: sent.pop(records.COHORT),
        lambda sent: sent.pop(records.ARRAYS),
        lambda sent: sent[records.COHORT].update({"clip-norm": -1.0}),
        lambda sent: sent[records.COHORT].update({"sampling-rate": 2.0}),
        lambda sent: sent[records.COHORT].update({"dimension": 5}),
        lambda sent: sent[records.COHORT].update({"surprise": 1}),
        lambda sent: sent[records.ARRAYS].update({"w": array("other", b"12")}),
        lambda sent: sent[records.ARRAYS].update({"w": array("numpy.ndarray", b"")}),
    ],
)
def test_a_malformed_request_is_answered_with_its_code(spoil):
    sent = content()
    spoil(sent)
    assert ask(sent).error.code == NodeErrorCode.MALFORMED_REQUEST


def test_a_server_may_not_name_the_users():
    request = request_for(4, sampling_rate=None, users=("ann",))
    assert ask(content(request)).error.code == NodeErrorCode.POLICY_REFUSED


def test_the_nodes_own_policy_holds():
    request = request_for(4, noise_multiplier=0.7, clip_norm=100.0)
    refused = ask(content(request), context(min_noise_multiplier=0.8))
    assert refused.error.code == NodeErrorCode.POLICY_REFUSED
    assert not BUILT
    assert not ask(content(request), context(min_noise_multiplier=0.6)).has_error()
    # A node that draws no noise cannot keep a bound on epsilon, so it does not pretend to.
    bounded = ask(content(request), context(max_epsilon=3.0, max_delta=1e-5))
    assert bounded.error.code == NodeErrorCode.POLICY_REFUSED


def test_the_cohort_stays_in_the_process_although_flower_pickles_the_app():
    sent = content()
    for _ in range(3):
        shipped = pickle.loads(cloudpickle.dumps(user_cohort_app(cohort_fn)))
        assert not shipped(message("train", sent), context()).has_error()
    assert BUILT == [42]
    ask(sent, context(node_id=43))
    assert BUILT == [42, 43]
    ask(sent, context(run_id=6))  # a new run lets the data of the last one go
    assert BUILT == [42, 43, 42]
    assert len(app._cohorts) == 1


def test_metrics_are_answered_with_a_code():
    reply = user_cohort_app(cohort_fn)(message("evaluate", content()), context())
    assert reply.error.code == NodeErrorCode.NOT_IMPLEMENTED


def nodes_of_many(ctx):
    part, parts = ctx.node_config["partition-id"], ctx.node_config["num-partitions"]
    users = {user: records_of(mlp, 5 + user, user) for user in range(part, 12, parts)}
    return UserCohort(
        users,
        model_fn=mlp,
        training=recipe(shuffle=False),
        example=example_of(mlp),
        device="cpu",
    )


def run(fn, num_nodes, rounds=3):
    strategy = DPFedAvg(
        noise_multiplier=0.0,
        sampling=EveryoneSampling(12),
        clipping=FixedClipping(0.5),
        unit="user",
        num_nodes=num_nodes,
    )
    initial = ArrayRecord({name: Array(a) for name, a in global_arrays(mlp).items()})
    with InProcessGrid(user_cohort_app(fn), num_supernodes=num_nodes) as grid:
        result = strategy.start(grid, initial, num_rounds=rounds)
    return {name: array.numpy() for name, array in result.arrays.items()}


def test_how_users_are_spread_over_nodes_moves_no_bit_of_the_model():
    one, three = run(nodes_of_many, 1), run(nodes_of_many, 3)
    start = global_arrays(mlp)
    for name, array in one.items():
        np.testing.assert_array_equal(array, three[name])
        assert (array != start[name]).any()


def test_a_request_reaches_the_node_as_the_strategy_meant_it():
    seen = []

    def spy(ctx):
        return UserCohort({}, local_update=update)

    spied = user_cohort_app(spy, mods=[lambda m, c, n: (seen.append(m.content), n(m, c))[1]])
    strategy = DPFedAvg(
        noise_multiplier=1.3,
        sampling=EveryoneSampling(20),
        clipping=FixedClipping(0.25),
        unit="user",
        num_nodes=2,
        rounding="dithered",
    )
    with InProcessGrid(spied, num_supernodes=2) as grid:
        strategy.start(grid, ArrayRecord({"w": Array(np.zeros(3))}), num_rounds=2)
    requests = [CohortRequest.from_config(sent[records.COHORT]) for sent in seen]
    assert [request.server_round for request in requests] == [1, 1, 2, 2]
    assert {request.clip_norm for request in requests} == {0.25}
    assert {request.sampling_rate for request in requests} == {1.0}
    grid_asked = IntegerGrid.for_noise_multiplier(1.3, 3, rounding="dithered")
    assert {request.grid for request in requests} == {grid_asked}
    assert len({request.dither_seed for request in requests}) == 2
