"""Federated dropout in the strategy: smaller models out, the right mean and the same bound back."""

import numpy as np
import pytest
from flwr.app import ConfigRecord

from dpfl_flower.accounting import EveryoneSampling, PoissonSampling
from dpfl_flower.clipping import FixedClipping
from dpfl_flower.federated_dropout import FederatedDropout
from dpfl_flower.hidden_layers import Axis, HiddenLayer
from dpfl_strategies import CheckpointError, DPFedAvg
from tests.support.recording_grid import RecordingGrid, record, reply

NODES = 6
HIDDEN = HiddenLayer((Axis("a0", 0), Axis("a1", 0), Axis("a2", 1)))
DROPOUT = FederatedDropout(rate=0.5, layers=(HIDDEN,))


def strategy(**changes):
    arguments = {
        "noise_multiplier": 0.0,
        "sampling": EveryoneSampling(NODES),
        "clipping": FixedClipping(100.0),
        "wait_seconds": 0.0,
        "federated_dropout": DROPOUT,
    } | changes
    return DPFedAvg(**arguments)


def model():
    """Eight hidden units; every entry is a number of its own, so that it can be told by it."""
    return record(
        np.arange(1.0, 25.0).reshape(8, 3),
        np.arange(25.0, 33.0),
        np.arange(33.0, 49.0).reshape(2, 8),
        np.arange(49.0, 51.0),
        np.array(3),
    )


def flat(arrays):
    return np.concatenate([a.numpy().ravel() for a in list(arrays.values())[:4]])


def plus_one(message):
    return reply(record(*[a.numpy() + 1 for a in message.content["arrays"].values()]))


def test_every_node_is_sent_half_of_the_hidden_units_and_its_own():
    grid = RecordingGrid(plus_one, NODES)
    strategy().start(grid, model(), num_rounds=1)
    shapes = [[a.numpy().shape for a in m.content["arrays"].values()] for m in grid.pushed]
    assert shapes == [[(4, 3), (4,), (2, 4), (2,), ()]] * NODES
    assert len({tuple(m.content["arrays"]["a1"].numpy()) for m in grid.pushed}) > 1


def test_the_mean_is_divided_by_how_likely_an_entry_is_to_be_trained():
    grid = RecordingGrid(plus_one, NODES)
    result = strategy().start(grid, model(), num_rounds=1)
    before, after = flat(model()), flat(result.arrays)
    times = np.zeros(before.size)
    for message in grid.pushed:
        times += np.isin(before, flat(message.content["arrays"]))
    assert set(times[48:]) == {NODES}
    probability = np.where(before < 49, 0.5, 1.0)
    np.testing.assert_allclose(after - before, times / NODES / probability, atol=1e-3)
    assert result.arrays["a4"].numpy() == 3


def test_dropped_entries_and_other_nodes_are_not_moved_by_what_a_node_answers():
    """One node more or less moves the integer sum by one bounded contribution, where it trains."""

    def hostile(message):
        arrays = [a.numpy() for a in message.content["arrays"].values()]
        return reply(record(*[(a + 1e6).astype(a.dtype) for a in arrays]))

    subject = strategy(noise_multiplier=1.0, clipping=FixedClipping(1.0))
    subject.prepare(model(), 1)
    grid = RecordingGrid(hostile, NODES)
    messages = list(subject.configure_train(1, model(), ConfigRecord(), grid))
    replies = grid.send_and_receive(messages)
    run, asked = subject._rounds.running(), subject._rounds.asked
    everyone = subject._gathering.gather(run, asked, replies).total
    for one, message in enumerate(messages):
        others = subject._gathering.gather(run, asked, replies[:one] + replies[one + 1 :]).total
        moved = everyone - others
        bound = run.open_sum(asked.dither_seed)._grid.sensitivity_units
        assert 0.9 * bound**2 <= int((moved.astype(object) ** 2).sum()) <= bound**2
        trained = np.isin(flat(model()), flat(message.content["arrays"]))
        assert not moved[: trained.size][~trained].any()
        assert moved[: trained.size][trained].all()
    subject.close()


def test_a_reply_of_another_shape_is_a_dropout():
    def whole(message):
        return reply(model())

    subject = strategy(give_up_after=None)
    result = subject.start(RecordingGrid(whole, NODES), model(), num_rounds=1)
    np.testing.assert_allclose(flat(result.arrays), flat(model()), atol=1e-6)


def test_it_is_refused_where_nodes_hold_many_units_or_the_model_has_other_arrays():
    with pytest.raises(ValueError, match="federated_dropout="):
        strategy(
            num_nodes=2,
            unit="user",
            sampling=PoissonSampling(expected_cohort=5, population=50),
        )
    with pytest.raises(ValueError, match="must name one of the model's arrays"):
        strategy().start(RecordingGrid(plus_one, NODES), record(np.zeros(3)), num_rounds=1)


def test_a_run_does_not_go_on_with_another_dropout(tmp_path):
    grid = RecordingGrid(plus_one, NODES)
    settings = {"checkpoint_dir": tmp_path, "noise_multiplier": 1.0}
    strategy(**settings).start(grid, model(), num_rounds=1)
    other = FederatedDropout(rate=0.25, layers=(HIDDEN,))
    with pytest.raises(CheckpointError, match="federated_dropout"):
        strategy(**settings, federated_dropout=other).start(grid, model(), num_rounds=2)
