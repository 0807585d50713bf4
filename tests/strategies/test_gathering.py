"""Nodes that hold many units: the strategy adds their integer sums and never sees a unit."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Error, RecordDict

from dpfl_flower import records
from dpfl_flower.accounting import (
    CappedPoissonSampling,
    EveryoneSampling,
    Gaussian,
    PoissonSampled,
    PoissonSampling,
    PrivacyBudget,
    epsilon,
)
from dpfl_flower.client.users.request import CohortRequest
from dpfl_flower.clipping import AdaptiveClipping, FixedClipping
from dpfl_strategies import AllClientsFailed, DPFedAvg, NumExamplesWeighting
from tests.support.recording_grid import RecordingGrid, record, reply

NODES = 3
USERS = 30


def strategy(**changes):
    arguments = {
        "noise_multiplier": 0.0,
        "sampling": EveryoneSampling(USERS),
        "clipping": FixedClipping(10.0),
        "unit": "user",
        "num_nodes": NODES,
        "wait_seconds": 0.0,
    } | changes
    return DPFedAvg(**arguments)


def request_of(message):
    return CohortRequest.from_config(message.content[records.COHORT])


def answer(total):
    return RecordDict({records.INTEGER_SUM: ArrayRecord({records.SUM: Array(total)})})


def holding(updates):
    """Return a client of nodes that hold the users whose updates are given."""

    def client(message):
        total = request_of(message).open_sum()
        for update in updates(message):
            total.add([update])
        return answer(total.total)

    return client


def model():
    return record(np.zeros(4, np.float32))


def test_units_inside_nodes_give_the_model_that_units_as_nodes_give():
    updates = np.random.default_rng(0).normal(size=(USERS, 4)).astype(np.float32)
    grid = RecordingGrid(holding(lambda m: updates[m.metadata.dst_node_id - 100 :: NODES]), NODES)
    inside = strategy().start(grid, model(), num_rounds=1)
    alone = strategy(num_nodes=None, unit="node").start(
        RecordingGrid(lambda m: reply(record(updates[m.metadata.dst_node_id - 100])), USERS),
        model(),
        num_rounds=1,
    )
    np.testing.assert_array_equal(inside.arrays["a0"].numpy(), alone.arrays["a0"].numpy())


def test_every_node_is_asked_with_the_rounds_public_constants_and_no_list_of_users():
    grid = RecordingGrid(holding(lambda m: []), NODES)
    private = strategy(noise_multiplier=1.0, sampling=PoissonSampling(3, USERS))
    result = private.start(grid, model(), num_rounds=2)
    assert [m.metadata.dst_node_id for m in grid.pushed] == 2 * grid.node_ids
    request = request_of(grid.pushed[0])
    assert request.sampling_rate == 0.1
    assert request.users is None
    assert request.grid.noise_units == 2**14
    events = [PoissonSampled(0.1, Gaussian(1.0))] * 2
    assert result.privacy.epsilon == pytest.approx(
        epsilon(events, delta=result.privacy.delta, relation="add-or-remove-one"), rel=1e-5
    )
    assert result.privacy.unit == "user"


def test_nodes_share_a_rounds_dither_and_rounds_do_not():
    grid = RecordingGrid(holding(lambda m: []), NODES)
    strategy(rounding="dithered").start(grid, model(), num_rounds=2)
    seeds = [request_of(m).dither_seed for m in grid.pushed]
    assert len(set(seeds[:NODES])) == 1
    assert len(set(seeds)) == 2


def test_the_indicator_rides_inside_the_sum():
    adaptive = AdaptiveClipping(initial=1.0, learning_rate=0.5)
    private = strategy(noise_multiplier=0.01, clipping=adaptive)
    grid = RecordingGrid(holding(lambda m: [np.full(4, 9.0, np.float32)] * (USERS // NODES)), NODES)
    norms = []
    private.start(
        grid, model(), num_rounds=2, evaluate_fn=lambda r, a: norms.append(private.clip_norm)
    )
    assert norms[2] > norms[1] > norms[0]


@pytest.mark.parametrize(
    "malformed",
    [
        lambda total: answer(total.astype(np.float64)),
        lambda total: answer(total[:-1]),
        lambda total: answer(total.reshape(1, -1)),
        lambda total: answer(np.full_like(total, 2**62)),
        lambda total: answer(np.full_like(total, np.iinfo(np.int64).min)),
        lambda total: reply(record(np.ones(4, np.float32))),
        lambda total: RecordDict(),
        lambda total: Error(2),
    ],
)
def test_a_malformed_sum_is_a_dropout(malformed):
    honest = holding(lambda m: [np.full(4, 0.5, np.float32)] * (USERS // NODES))

    def client(message):
        if message.metadata.dst_node_id == 100:
            return malformed(request_of(message).open_sum().total)
        return honest(message)

    result = strategy().start(RecordingGrid(client, NODES), model(), num_rounds=1)
    np.testing.assert_allclose(result.arrays["a0"].numpy(), 0.5 * 2 / 3, rtol=1e-4)


def test_all_nodes_failing_is_an_error():
    with pytest.raises(AllClientsFailed):
        strategy().start(RecordingGrid(lambda m: Error(2), NODES), model(), num_rounds=5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unit": "node"}, "unit='node'"),
        ({"sampling": CappedPoissonSampling(3, USERS, 5)}, "sampling=CappedPoisson"),
        ({"weighting": NumExamplesWeighting(10)}, "weighting="),
        ({"num_nodes": 0}, "num_nodes=0"),
        ({"budget": PrivacyBudget(1.0, 1e-5)}, "unit="),
    ],
)
def test_bad_combinations_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        strategy(**changes)
