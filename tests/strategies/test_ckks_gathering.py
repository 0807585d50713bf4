"""Strategies with CKKS: the same run as without, behind the same extension point."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from dpfl_flower import records
from dpfl_flower.accounting import EveryoneSampling, PoissonSampling
from dpfl_flower.client import ckks_mod
from dpfl_flower.clipping import AdaptiveClipping, FixedClipping
from dpfl_flower.secagg import CKKS
from dpfl_flower.secagg.ckks_key import PublicKey, make_key
from dpfl_flower.simulation import Fault, InProcessGrid
from dpfl_strategies import (
    AllClientsFailed,
    DistributedDPFedAvg,
    DPFedAvg,
    NoisedMetrics,
    NumExamplesWeighting,
)

NODES = 6


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_key(tmp_path_factory.mktemp("key"))


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    return make_key(tmp_path_factory.mktemp("other"))


def train(message, context):
    """Move the weights by something of the node's own; count and metrics go along."""
    index = context.node_config["partition-id"]
    rng = np.random.default_rng(index)
    arrays = {}
    for name, array in message.content["arrays"].items():
        step = 0.1 * (index + 1) * rng.normal(size=array.shape)
        arrays[name] = Array(np.asarray(array.numpy() + step, dtype=array.dtype))
    examples = 10 * (index + 1)
    metrics = MetricRecord({"num-examples": examples, "loss": 1.0, "examples-seen": examples})
    return Message(
        RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics}), reply_to=message
    )


def sums(message, context):
    """Answer an integer sum, as a node of many units does."""
    width = message.content["cohort"]["dimension"]
    vector = np.arange(width, dtype=np.int64) * (context.node_config["partition-id"] + 1)
    return Message(
        RecordDict({records.INTEGER_SUM: ArrayRecord({records.SUM: Array(vector)})}),
        reply_to=message,
    )


def model():
    return ArrayRecord({"w": Array(np.zeros((3, 4), np.float32)), "b": Array(np.zeros(3))})


def strategy(**changes):
    arguments = {
        "noise_multiplier": 0.5,
        "relation": "zero-out",
        "sampling": EveryoneSampling(NODES),
        "clipping": FixedClipping(0.5),
        "wait_seconds": 0.0,
        "noise_seed": 4,
    } | changes
    return DPFedAvg(**arguments)


def ckks(files, **settings):
    return CKKS(key=PublicKey.load(files.server), **settings)


def run(made, files=None, *, rounds=2, function=train, fault=None, odd=None):
    """Run; nodes have ``files``, the first one ``odd``, and without files no protocol."""
    app = ClientApp()
    app.train(mods=None if files is None else [ckks_mod])(function)
    configs = None
    if files is not None:
        configs = [{"ckks-key": str(files.nodes)} for _ in range(NODES)]
        if odd is not None:
            configs[0] = {"ckks-key": str(odd)}
    with InProcessGrid(app, num_supernodes=NODES, fault=fault, node_configs=configs) as grid:
        return made.start(grid, model(), num_rounds=rounds)


def same(first, second):
    for name, array in first.items():
        np.testing.assert_array_equal(array.numpy(), second[name].numpy())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sampling": EveryoneSampling(NODES)},
        {"sampling": EveryoneSampling(NODES), "relation": "replace-one"},
        {"clipping": AdaptiveClipping(initial=0.5)},
        {"weighting": NumExamplesWeighting(w_max=40, mean_weight=0.6)},
        {"rounding": "dithered"},
        {"noise_multiplier": 0.0},
        {"metrics": NoisedMetrics({"loss": (0.0, 1.0), "examples-seen": (0, 60)}, share=1.0)},
    ],
)
def test_a_run_is_the_same_to_the_last_bit_with_and_without(files, changes):
    plain = run(strategy(**changes))
    hidden = run(strategy(secure_aggregation=ckks(files), **changes), files)
    same(plain.arrays, hidden.arrays)
    assert plain.train_metrics_clientapp == hidden.train_metrics_clientapp
    assert set(hidden.train_metrics_clientapp) == ({1, 2} if "metrics" in changes else set())
    assert np.any(hidden.arrays["w"].numpy())
    other = run(strategy(secure_aggregation=ckks(files), **changes, noise_seed=5), files)
    assert changes.get("noise_multiplier") == 0 or np.any(
        other.arrays["w"].numpy() != hidden.arrays["w"].numpy()
    )


def test_nodes_of_many_units_answer_the_same_sum(files):
    changes = {"num_nodes": NODES, "sampling": PoissonSampling(50, 1000)}
    changes |= {"unit": "user", "relation": "add-or-remove-one"}
    plain = run(strategy(**changes), function=sums)
    hidden = run(strategy(secure_aggregation=ckks(files), **changes), files, function=sums)
    same(plain.arrays, hidden.arrays)


def silent(*, stage, nodes, rounds=(1, 2)):
    """Return a fault: some nodes are silent from a stage on, in some rounds."""
    order = ["encrypt", "decrypt"]

    def fault(message):
        server_round, _, found = message.metadata.group_id.partition("/")
        late = found in order and order.index(found) >= order.index(stage)
        gone = message.metadata.dst_node_id - 1000 in nodes
        return Fault.SILENT if gone and late and int(server_round) in rounds else None

    return fault


def test_a_node_that_drops_out_before_it_answers_is_missing_from_the_sum(files):
    hidden = run(
        strategy(secure_aggregation=ckks(files)), files, fault=silent(stage="encrypt", nodes={0})
    )
    gone = lambda m: Fault.SILENT if m.metadata.dst_node_id == 1000 else None  # noqa: E731
    same(run(strategy(), fault=gone).arrays, hidden.arrays)


def test_a_node_that_drops_out_before_it_decrypts_stays_in_the_sum(files):
    asked = []
    # Round 1 asks the nodes at places 2 and 3 of the survivors to decrypt.
    fault = silent(stage="decrypt", nodes={2})

    def watched(message):
        if message.metadata.group_id == "1/decrypt":
            asked.append(message.metadata.dst_node_id - 1000)
        return fault(message)

    hidden = run(strategy(secure_aggregation=ckks(files)), files, fault=watched, rounds=1)
    assert sorted(asked) == [2, 3]
    same(run(strategy(), rounds=1).arrays, hidden.arrays)


def test_a_round_that_nobody_decrypts_is_abandoned_and_the_next_goes_on(files):
    made = strategy(secure_aggregation=ckks(files), noise_seed=None)
    fault = silent(stage="decrypt", nodes=set(range(NODES)), rounds=(2,))
    assert run(made, files, fault=fault, rounds=3).privacy.releases == 2


def test_a_node_with_another_key_is_a_dropout(files, others):
    hidden = run(strategy(secure_aggregation=ckks(files)), files, odd=others.nodes)
    gone = lambda m: Fault.SILENT if m.metadata.dst_node_id == 1000 else None  # noqa: E731
    same(run(strategy(), fault=gone).arrays, hidden.arrays)


def test_a_vector_under_another_key_that_claims_to_be_under_this_one_ends_the_round(
    files, others, tmp_path
):
    """Never a wrong sum: the nodes see that what they decrypt is none."""
    forged = tmp_path / "forged"
    forged.write_bytes(files.nodes.read_bytes()[:32] + others.nodes.read_bytes()[32:])
    forged.chmod(0o600)
    made = strategy(secure_aggregation=ckks(files), give_up_after=2)
    with pytest.raises(AllClientsFailed):
        run(made, files, odd=forged, rounds=3)


def test_what_could_not_hold_is_refused_at_configuration(files):
    with pytest.raises(ValueError, match="must be 'zero-out' or 'replace-one'"):
        strategy(secure_aggregation=ckks(files), relation="add-or-remove-one")
    with pytest.raises(ValueError, match="min_cohort=7 must be <= 6, the nodes that there are"):
        strategy(secure_aggregation=ckks(files, min_cohort=7))
    with pytest.raises(ValueError, match="nodes=1048577"):
        strategy(secure_aggregation=ckks(files), sampling=EveryoneSampling(2**20 + 1))


def test_distributed_noise_is_refused_because_nodes_see_sums(files):
    with pytest.raises(ValueError, match="must not show nodes the sum"):
        DistributedDPFedAvg(
            noise_multiplier=1.0,
            unit="user",
            relation="add-or-remove-one",
            num_nodes=NODES,
            sampling=EveryoneSampling(100),
            clipping=FixedClipping(1.0),
            secure_aggregation=ckks(files),
        )
