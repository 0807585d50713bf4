"""Strategies with secure aggregation: the same run, with less for the server to see."""

import logging

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from dpfl_flower import records
from dpfl_flower.accounting import (
    CustomSampling,
    EveryoneSampling,
    FixedSizeSampling,
    PoissonSampling,
    PrivacyBudget,
)
from dpfl_flower.client import secure_aggregation_mod
from dpfl_flower.client.contribution import UpdateRequest, contribution_for
from dpfl_flower.clipping import AdaptiveClipping, FixedClipping
from dpfl_flower.secagg import (
    RoundAbandoned,
    SecAggPlus,
    SecureAggregation,
    SecureExchange,
    SecureSum,
)
from dpfl_flower.simulation import Fault, InProcessGrid
from dpfl_strategies import (
    AllClientsFailed,
    CheckpointError,
    DPFedAvg,
    NumExamplesWeighting,
    Weighting,
)
from tests.support import integer_sums

NODES = 6


def train(message, context):
    """Move the weights by something of the node's own; count and metrics go along."""
    index = context.node_config["partition-id"]
    rng = np.random.default_rng(index)
    arrays = {}
    for name, array in message.content["arrays"].items():
        step = 0.1 * (index + 1) * rng.normal(size=array.shape)
        arrays[name] = Array(np.asarray(array.numpy() + step, dtype=array.dtype))
    metrics = MetricRecord({"num-examples": 10 * (index + 1), "loss": 1.0})
    return Message(
        RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics}), reply_to=message
    )


def app(*, secure, function=train):
    made = ClientApp()
    made.train(mods=[secure_aggregation_mod] if secure else None)(function)
    return made


def model():
    return ArrayRecord(
        {
            "w": Array(np.zeros((3, 4), np.float32)),
            "steps": Array(np.array(3, np.int64)),
            "b": Array(np.zeros(3)),
        }
    )


def strategy(**changes):
    arguments = {
        "noise_multiplier": 0.5,
        "relation": "zero-out",
        "sampling": EveryoneSampling(NODES),
        "clipping": FixedClipping(0.5),
        "wait_seconds": 0.0,
    } | changes
    return DPFedAvg(**arguments)


def run(made, *, secure, rounds=3, function=train, fault=None, nodes=NODES):
    with InProcessGrid(
        app(secure=secure, function=function), num_supernodes=nodes, fault=fault
    ) as grid:
        return made.start(grid, model(), num_rounds=rounds)


def same(first, second):
    for name, array in first.items():
        np.testing.assert_array_equal(array.numpy(), second[name].numpy())


class First(CustomSampling):
    """The first nodes of the registry, in every round."""

    population = NODES

    def __init__(self, size):
        self._size = size

    def __repr__(self):
        return f"First({self._size})"

    @property
    def expected_cohort(self):
        return self._size

    def draw(self, registry, rng):
        return list(registry)[: self._size]


@pytest.mark.parametrize("sampling", [PoissonSampling(5, NODES), FixedSizeSampling(5, NODES)])
def test_coins_of_nodes_are_refused_since_abandoned_rounds_would_falsify_their_price(sampling):
    """In rounds with at least 3 of 3 nodes, each of which joins at rate 0.1, everybody is there."""
    relation = "replace-one" if isinstance(sampling, FixedSizeSampling) else "zero-out"
    with pytest.raises(ValueError, match=r"sampling=.* must be EveryoneSampling"):
        strategy(secure_aggregation=SecAggPlus(), sampling=sampling, relation=relation)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sampling": First(5)},
        {"sampling": First(5), "relation": "replace-one"},
        {"clipping": AdaptiveClipping(initial=0.5)},
        {"weighting": NumExamplesWeighting(w_max=40, mean_weight=0.6)},
        {"rounding": "dithered"},
        {"noise_multiplier": 0.0},
    ],
)
@pytest.mark.parametrize("neighbours", [None, 4])
def test_a_run_is_the_same_to_the_last_bit_with_and_without(changes, neighbours):
    plain = run(strategy(noise_seed=4, **changes), secure=False)
    secure = SecAggPlus(neighbours=neighbours)
    masked = run(strategy(noise_seed=4, secure_aggregation=secure, **changes), secure=True)
    same(plain.arrays, masked.arrays)
    assert np.any(masked.arrays["w"].numpy())
    other = run(strategy(noise_seed=5, secure_aggregation=secure, **changes), secure=True)
    assert changes.get("noise_multiplier") == 0 or np.any(
        other.arrays["w"].numpy() != masked.arrays["w"].numpy()
    )


def test_nodes_of_many_units_answer_the_same_sum():
    changes = {"num_nodes": NODES, "sampling": PoissonSampling(50, 1000), "noise_seed": 4}
    changes |= {"unit": "user", "relation": "add-or-remove-one"}
    plain = run(strategy(**changes), secure=False, function=integer_sums.train)
    masked = run(
        strategy(secure_aggregation=SecAggPlus(), **changes),
        secure=True,
        function=integer_sums.train,
    )
    same(plain.arrays, masked.arrays)


def dropping(*, stage, count=1, rounds=(1,)):
    """Return a fault: the first nodes are silent from a stage on, in some rounds."""
    order = ["advertise", "share", "mask", "unmask"]

    def fault(message):
        server_round, _, found = message.metadata.group_id.partition("/")
        gone = message.metadata.dst_node_id < 1000 + count
        late = found in order and order.index(found) >= order.index(stage)
        return Fault.SILENT if gone and late and int(server_round) in rounds else None

    return fault


@pytest.mark.parametrize("stage", ["advertise", "share", "mask", "unmask"])
def test_a_node_that_drops_out_is_missing_from_the_sum_from_its_vector_on(stage):
    gone = lambda m: Fault.SILENT if m.metadata.dst_node_id == 1000 else None  # noqa: E731
    secure = SecAggPlus()
    masked = run(
        strategy(noise_seed=4, secure_aggregation=secure),
        secure=True,
        rounds=1,
        fault=dropping(stage=stage),
    )
    fault = None if stage == "unmask" else gone
    same(run(strategy(noise_seed=4), secure=False, rounds=1, fault=fault).arrays, masked.arrays)


def test_masked_vectors_of_64_nodes_travel_on_a_grid_half_as_fine_and_cost_the_same_epsilon():
    asked, spent = {}, {}
    big = ArrayRecord({"w": Array(np.zeros(5000, np.float32))})

    def note(message):
        if "update" in message.content:
            request = UpdateRequest.from_config(message.content["update"])
            asked[request.parties] = request.grid

    for nodes in (63, 64):
        made = strategy(
            noise_multiplier=1.0,
            sampling=EveryoneSampling(nodes),
            secure_aggregation=SecAggPlus(neighbours=4),
        )
        with InProcessGrid(app(secure=True), num_supernodes=nodes, fault=note) as grid:
            spent[nodes] = made.start(grid, big, num_rounds=1).privacy.epsilon
    assert asked[63].noise_units == 2 * asked[64].noise_units == 2**14
    assert asked[63].noise_multiplier == asked[64].noise_multiplier == 1.0
    assert spent[63] == pytest.approx(spent[64], rel=1e-9)


@pytest.mark.parametrize("stage", ["advertise", "share", "mask", "unmask"])
def test_a_round_with_too_few_is_abandoned_uncharged_and_the_next_goes_on(stage, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="flwr.dpfl")
    made = strategy(secure_aggregation=SecAggPlus(min_cohort=4), checkpoint_dir=tmp_path)
    seen = {}
    with InProcessGrid(
        app(secure=True), num_supernodes=NODES, fault=dropping(stage=stage, count=3, rounds=(2,))
    ) as grid:
        result = made.start(
            grid, model(), num_rounds=3, evaluate_fn=lambda r, a: seen.update({r: a}) or None
        )
    same(seen[1], seen[2])
    assert np.any(seen[3]["w"].numpy() != seen[2]["w"].numpy())
    assert result.privacy.releases == 2
    assert result.rounds == 3
    assert set(result.signal_to_noise) == {1, 3}
    assert caplog.text.count("nothing released") == 1


def test_abandoned_rounds_in_a_row_end_the_run():
    made = strategy(secure_aggregation=SecAggPlus(), give_up_after=2)
    with pytest.raises(AllClientsFailed, match="in 2 rounds in a row"):
        run(made, secure=True, rounds=9, fault=dropping(stage="mask", count=4, rounds=range(9)))
    scattered = dropping(stage="mask", count=4, rounds=(1, 3, 5))
    assert run(made, secure=True, rounds=5, fault=scattered).privacy.releases == 2


def test_a_cohort_that_is_drawn_too_small_is_abandoned_before_anyone_is_asked():
    made = strategy(secure_aggregation=SecAggPlus(), sampling=First(1), give_up_after=3)
    asked = []
    with pytest.raises(AllClientsFailed):
        run(made, secure=True, rounds=9, fault=asked.append)
    assert asked == []


def test_nodes_that_do_not_run_the_protocol_are_never_asked_for_more(caplog):
    seen = []

    def fault(message):
        seen.append(set(message.content))

    with pytest.raises(AllClientsFailed):
        run(strategy(secure_aggregation=SecAggPlus()), secure=False, fault=fault)
    assert seen == [{records.SECAGG}] * 18


def test_the_model_goes_to_the_nodes_once_and_nothing_but_the_vector_comes_back():
    stages = []

    def fault(message):
        stages.append((message.metadata.group_id, records.ARRAYS in message.content))

    made = strategy(secure_aggregation=SecAggPlus(), metrics="not_private", fraction_evaluate=0.1)
    result = run(made, secure=True, rounds=1, fault=fault)
    trained = [item for item in stages if "/" in item[0]]
    assert len(trained) == 4 * NODES
    assert {group for group, carried in trained if carried} == {"1/mask"}
    assert result.train_metrics_clientapp == {}


def test_late_and_foreign_replies_are_ignored():
    made = strategy(noise_seed=4, secure_aggregation=SecAggPlus())
    with InProcessGrid(app(secure=True), num_supernodes=NODES) as grid:
        arrays = made.prepare(model(), 1)
        messages = made.configure_train(1, arrays, ConfigRecord({}), grid)
        earlier = []
        while messages is not None:
            replies = list(grid.send_and_receive(messages))
            messages = made.continue_train(1, [*earlier, *replies, *replies])
            earlier += replies
        released, _ = made.aggregate_train(1, earlier)
        made.close()
    same(run(strategy(noise_seed=4), secure=False, rounds=1).arrays, released)


def test_a_loop_of_ones_own_has_to_go_through_all_stages():
    made = strategy(secure_aggregation=SecAggPlus())
    with InProcessGrid(app(secure=True), num_supernodes=NODES) as grid:
        arrays = made.prepare(model(), 1)
        replies = grid.send_and_receive(made.configure_train(1, arrays, ConfigRecord({}), grid))
        with pytest.raises(RuntimeError, match="waits for further messages"):
            made.aggregate_train(1, replies)
        made.close()


# Configuration.


class HalfWeighting(Weighting):
    mean_weight = 0.5

    def weigh(self, num_examples):
        return 0.5


class OwnWeigh(DPFedAvg):
    def weigh(self, num_examples):
        return 0.5


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"relation": "add-or-remove-one"}, "must be 'zero-out' or 'replace-one'"),
        ({"relation": None}, "must be 'zero-out' or 'replace-one'"),
        (
            {
                "budget": PrivacyBudget(epsilon=8.0, delta=1e-5, unit="node"),
                "noise_multiplier": None,
                "relation": None,
            },
            "must be 'zero-out' or 'replace-one'",
        ),
        ({"weighting": HalfWeighting()}, "nodes weigh themselves"),
        ({"secure_aggregation": SecAggPlus(max_cohort=NODES - 1)}, "max_cohort=5 must be >= 6"),
        ({"secure_aggregation": True}, "secure_aggregation=True must be SecAggPlus"),
        ({"secure_aggregation": SecAggPlus(max_cohort=2**37)}, "max_cohort=137438953472 is too"),
        ({"secure_aggregation": SecAggPlus(min_cohort=7)}, "min_cohort=7"),
        ({"secure_aggregation": SecAggPlus(threshold=6)}, "threshold=6 must be < 6, the nodes"),
        ({"secure_aggregation": SecAggPlus(colluders=5)}, "colluders=5"),
    ],
)
def test_what_could_not_hold_is_refused_at_configuration(changes, match):
    with pytest.raises(ValueError, match=match):
        strategy(**{"secure_aggregation": SecAggPlus()} | changes)


def test_a_weigh_of_ones_own_is_refused_and_not_ignored():
    arguments = {
        "noise_multiplier": 1.0,
        "relation": "zero-out",
        "sampling": EveryoneSampling(NODES),
        "clipping": FixedClipping(1.0),
    }
    OwnWeigh(**arguments)
    with pytest.raises(ValueError, match=r"weigh\(\) that of DPFedAvg"):
        OwnWeigh(secure_aggregation=SecAggPlus(), **arguments)


def test_more_nodes_than_the_modulus_has_room_for_are_refused_before_anyone_is_asked():
    asked = []
    made = strategy(secure_aggregation=SecAggPlus())
    both = r"max_cohort=6 must be >= 7.*\(population or num_nodes\), or give .* larger max_cohort"
    with pytest.raises(ValueError, match=both):
        run(made, secure=True, nodes=NODES + 1, fault=asked.append)
    assert asked == []
    roomy = strategy(secure_aggregation=SecAggPlus(max_cohort=7))
    assert run(roomy, secure=True, nodes=NODES + 1).privacy.releases == 3


def test_the_modulus_has_room_for_the_largest_cohort_and_no_byte_more():
    widths = {}

    def fault(message):
        record = message.content.config_records[records.SECAGG]
        if "bits" in record:
            widths[cohort] = record["bits"]

    for cohort in (NODES, 2**20):
        made = strategy(secure_aggregation=SecAggPlus(max_cohort=cohort), noise_multiplier=1.0)
        run(made, secure=True, rounds=1, fault=fault)
    # 2^14 units of noise, z = 1: entries of at most 2^14 units.
    assert widths == {NODES: 24, 2**20: 40}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"threshold": 0.5}, "threshold=0.5 must be > 0.5"),
        ({"threshold": 1.5}, "threshold=1.5"),
        ({"threshold": 0}, "threshold=0 must be in .*, or an integer >= 2"),
        ({"threshold": -3}, "threshold=-3"),
        ({"threshold": True}, "threshold=True"),
        ({"threshold": 7, "neighbours": 6}, "threshold=7 must be <= neighbours=6"),
        ({"neighbours": 5}, "neighbours=5 must be even"),
        ({"neighbours": 4, "colluders": 4}, "colluders=4 must be < neighbours=4"),
        ({"min_cohort": 1}, "min_cohort=1 must be >= 2"),
        ({"max_cohort": 2}, "max_cohort=2 must be >= min_cohort=3"),
        ({"colluders": -1}, "colluders=-1"),
    ],
)
def test_settings_that_make_no_sense(changes, match):
    with pytest.raises(ValueError, match=match):
        SecAggPlus(**changes)


def test_a_checkpoint_of_one_trust_is_not_gone_on_with_under_another(tmp_path):
    run(strategy(checkpoint_dir=tmp_path), secure=False, rounds=1)
    with pytest.raises(CheckpointError, match="nodes="):
        run(
            strategy(checkpoint_dir=tmp_path, secure_aggregation=SecAggPlus()),
            secure=True,
            rounds=2,
        )


def test_the_log_names_the_trust(caplog):
    caplog.set_level(logging.INFO)
    run(strategy(secure_aggregation=SecAggPlus()), secure=True, rounds=1)
    assert any("Trust: secure" in logged.getMessage() for logged in caplog.records)


# The extension point.


class Notary(SecureAggregation):
    """Not secure at all: one exchange, sums in the clear. What another protocol has to bring."""

    max_cohort = None
    min_cohort = 4
    colluders = 0
    nodes_learn_sum = False

    def check_population(self, population):
        pass

    def begin(self, request):
        return NotaryExchange(request)


class NotaryExchange(SecureExchange):
    stage = "notary"
    carries_task = True

    def __init__(self, request):
        self.request = request

    @property
    def requests(self):
        record = ConfigRecord({"width": self.request.width, "bits": self.request.bits})
        return {node: RecordDict({"notary": record}) for node in self.request.nodes}

    def receive(self, replies):
        if len(replies) < 4:
            raise RoundAbandoned("too few came to the notary")
        parts = [reply["notary"]["sum"].numpy() for reply in replies.values()]
        return SecureSum(np.sum(parts, axis=0), tuple(replies))


def notary_mod(message, context, call_next):
    told = message.content["notary"]
    made = contribution_for(message.content, {}, width=told["width"], bits=told["bits"])
    message.content = made.task
    vector = made.vector(call_next(message, context).content)
    return Message(RecordDict({"notary": ArrayRecord({"sum": Array(vector)})}), reply_to=message)


def test_another_protocol_takes_two_classes_and_a_mod():
    other = ClientApp()
    other.train(mods=[notary_mod])(train)
    made = strategy(noise_seed=4, secure_aggregation=Notary())
    with InProcessGrid(other, num_supernodes=NODES) as grid:
        released = made.start(grid, model(), num_rounds=2).arrays
    same(run(strategy(noise_seed=4), secure=False, rounds=2).arrays, released)
    silent = dropping_all_but(3)
    with (
        InProcessGrid(other, num_supernodes=NODES, fault=silent) as grid,
        pytest.raises(AllClientsFailed),
    ):
        strategy(secure_aggregation=Notary()).start(grid, model(), num_rounds=5)


def dropping_all_but(count):
    return lambda m: Fault.SILENT if m.metadata.dst_node_id >= 1000 + count else None
