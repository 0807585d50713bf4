import json
import logging
import math

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Error, RecordDict

from dpfl_flower.accounting import Gaussian
from dpfl_strategies import AllClientsFailed, CheckpointError, FedAvgM, SampleLevelFedAvg
from tests.support.recording_grid import RecordingGrid, adding, record, reply

NODES = 4


def claiming(step, *, weight=1, noise_multiplier=5.0):
    """Return a client that adds ``step(node index)`` and claims one Gaussian release a round."""

    def client(message):
        index = message.metadata.dst_node_id - 100
        answer = adding(step(index))(message)
        rounds = message.content["config"]["server-round"]
        answer["metrics"]["num-examples"] = weight if isinstance(weight, int) else weight(index)
        answer["privacy"] = ConfigRecord(
            {
                "dataset": f"site {index}",
                "epsilon": 0.0,
                "delta": 1e-5,
                "unit": "example",
                "relation": "add-or-remove-one",
                "durable": True,
                "events": json.dumps([Gaussian(noise_multiplier + index).to_json()] * rounds),
            }
        )
        return answer

    return client


def strategy(**changes):
    return SampleLevelFedAvg(**{"population": NODES, "wait_seconds": 0.0} | changes)


def values(arrays):
    return np.concatenate([a.numpy().ravel().astype(float) for a in arrays.values()])


def start_model():
    return record(np.zeros(3, np.float32), np.array(3, np.int64))


def test_updates_are_averaged_by_public_weights():
    client = claiming(lambda i: float(i), weight=lambda i: i + 1)
    weighted = strategy(weigh_by_num_examples=True)
    result = weighted.start(RecordingGrid(client, NODES), start_model(), 1)
    expected = sum(i * (i + 1) for i in range(4)) / 10
    np.testing.assert_allclose(values(result.arrays), [expected] * 3 + [3], rtol=1e-6)
    uniform = strategy().start(RecordingGrid(client, NODES), start_model(), 1)
    np.testing.assert_allclose(values(uniform.arrays), [1.5] * 3 + [3], rtol=1e-6)


def test_every_node_is_asked_and_the_worst_and_the_composition_are_reported():
    grid = RecordingGrid(claiming(lambda i: 0.0), NODES)
    result = strategy().start(grid, start_model(), 2)
    assert len(grid.pushed) == 2 * NODES
    report = result.node_privacy
    assert set(report.claims) == set(grid.node_ids)
    assert report.worst.dataset == "site 0"
    assert report.epsilon_everywhere() > report.worst.epsilon > 0
    assert "at most epsilon" in repr(result)


def test_a_reply_without_a_readable_claim_never_enters_the_model():
    honest = claiming(lambda i: 1.0)

    def client(message):
        answer = honest(message)
        if message.metadata.dst_node_id == 100:
            del answer["privacy"]
            answer["arrays"] = adding(1000.0)(message)["arrays"]
        if message.metadata.dst_node_id == 101:
            answer["privacy"]["events"] = "nonsense"
            answer["arrays"] = adding(1000.0)(message)["arrays"]
        return answer

    result = strategy().start(RecordingGrid(client, NODES), start_model(), 1)
    np.testing.assert_allclose(values(result.arrays)[:3], 1.0, rtol=1e-6)
    assert len(result.node_privacy.claims) == 2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_dropped(bad):
    client = claiming(lambda i: bad if i == 0 else 2.0)
    result = strategy().start(RecordingGrid(client, NODES), start_model(), 1)
    np.testing.assert_allclose(values(result.arrays)[:3], 2.0, rtol=1e-6)


def test_the_log_tells_of_a_round_that_nobody_answered(caplog):
    caplog.set_level(logging.INFO, logger="flwr.dpfl")
    honest = claiming(lambda i: 1.0)

    def client(message):
        late = message.metadata.group_id == "2"
        return Error(101) if late else honest(message)

    strategy().start(RecordingGrid(client, NODES), start_model(), 3)
    lines = [m for m in caplog.messages if "[ROUND" in m]
    assert ["nobody answered" in line for line in lines] == [False, True, False]


def test_all_failing_is_an_error():
    with pytest.raises(AllClientsFailed) as failed:
        strategy().start(RecordingGrid(lambda m: Error(101), NODES), start_model(), 5)
    np.testing.assert_array_equal(values(failed.value.result.arrays), values(start_model()))
    assert failed.value.result.node_privacy.claims == {}
    mute = RecordingGrid(lambda m: reply(m.content["arrays"]), NODES)
    with pytest.raises(AllClientsFailed):
        strategy().start(mute, start_model(), 5)


def test_resuming_goes_on_with_the_momentum(tmp_path):
    def run(rounds, directory):
        optimizer = FedAvgM(momentum=0.9)
        parts = strategy(server_optimizer=optimizer, checkpoint_dir=directory)
        return parts.start(RecordingGrid(claiming(lambda i: 1.0), NODES), start_model(), rounds)

    whole = run(4, tmp_path / "whole")
    run(2, tmp_path / "parts")
    parts = run(4, tmp_path / "parts")
    np.testing.assert_array_equal(values(whole.arrays), values(parts.arrays))
    with pytest.raises(CheckpointError, match="settings="):
        strategy(checkpoint_dir=tmp_path / "parts").start(
            RecordingGrid(claiming(lambda i: 1.0), NODES), start_model(), 5
        )


def test_metrics_pass_only_as_not_private():
    honest = claiming(lambda i: 0.0)

    def client(message):
        if message.metadata.message_type == "evaluate":
            answer = reply(ArrayRecord(), 2, auc=0.5)
            return RecordDict({"metrics": answer["metrics"]})
        return honest(message)

    quiet = strategy().start(RecordingGrid(client, NODES), start_model(), 1)
    assert not quiet.evaluate_metrics_clientapp
    loud = strategy(metrics="not_private").start(RecordingGrid(client, NODES), start_model(), 1)
    assert dict(loud.evaluate_metrics_clientapp[1]) == {"not_private/auc": 0.5}


def test_a_round_is_aggregated_once():
    lone = strategy()
    with pytest.raises(RuntimeError, match="round 1"):
        lone.aggregate_train(1, [])


def test_what_was_spent_counts_also_where_the_arrays_are_malformed():
    honest = claiming(lambda i: 1.0)

    def client(message):
        answer = honest(message)
        if message.metadata.dst_node_id == 100:
            answer["arrays"] = record(np.zeros(9, np.float32))
        return answer

    result = strategy().start(RecordingGrid(client, NODES), start_model(), 1)
    assert len(result.node_privacy.claims) == NODES


def test_a_resumed_run_remembers_what_nodes_without_a_ledger_file_claimed(tmp_path):
    def forgetful(message):
        answer = claiming(lambda i: 0.0)(message)
        answer["privacy"]["durable"] = False
        answer["privacy"]["events"] = json.dumps([Gaussian(5.0).to_json()])
        return answer

    def run(rounds):
        parts = strategy(checkpoint_dir=tmp_path)
        return parts.start(RecordingGrid(forgetful, NODES), start_model(), rounds).node_privacy

    before, after = run(1), run(2)
    assert after.worst.epsilon > before.worst.epsilon
    assert len(after.worst.events) == 2


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"give_up_after": 0}, "give_up_after=0"),
        ({"give_up_after": "x"}, "give_up_after='x'"),
        ({"server_optimizer": "x"}, "server_optimizer='x'"),
        ({"checkpoint_dir": 5}, "checkpoint_dir=5"),
    ],
)
def test_a_bad_argument_is_named_with_its_value(changes, named):
    with pytest.raises(ValueError, match=named):
        SampleLevelFedAvg(population=4, **changes)
