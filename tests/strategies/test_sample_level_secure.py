"""DP-SGD nodes behind secure aggregation: the same mean and the same claims, and sums only."""

import json
import logging

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn
from torch.utils.data import TensorDataset

from dpfl_flower import records
from dpfl_flower.accounting import Gaussian, events_to_json
from dpfl_flower.client import (
    DPSGDClient,
    DPSGDConfig,
    NodeLedger,
    ckks_mod,
    numpy_client_app,
    secure_aggregation_mod,
)
from dpfl_flower.client.weighted_update import AverageRequest, WeightedUpdate
from dpfl_flower.secagg import CKKS, SecAggPlus
from dpfl_flower.secagg.ckks_key import PublicKey, make_key
from dpfl_flower.secagg.messages import Stage
from dpfl_flower.secagg.wire import decode_request
from dpfl_flower.simulation import Fault, InProcessGrid
from dpfl_strategies import AllClientsFailed, CheckpointError, FedAvgM, SampleLevelFedAvg
from tests.support.dropouts import KINDS, NODES, dropping
from tests.support.node import context, message

BOUND = 50.0
SECRET = 4711.0625
# Two neighbours of five may drop out: t = 3, and 2 t > 5.
PROTOCOL = SecAggPlus(threshold=0.6)


def claim(index, releases):
    event = Gaussian(5.0 + index)
    return ConfigRecord(
        {
            "dataset": f"site {index}",
            "epsilon": 0.0,
            "delta": 1e-5,
            "unit": "example",
            "relation": "add-or-remove-one",
            "durable": True,
            "events": json.dumps([event.to_json()] * releases),
        }
    )


def step(index, name, shape):
    """What a node's training changes: something of its own in each array."""
    return 0.1 * (index + 1) * np.random.default_rng([index, len(name)]).normal(size=shape)


def train(received, ctx):
    """Train, as a DP-SGD node does: weights, a public weight and a claim go back."""
    index = ctx.node_config["partition-id"]
    arrays = {}
    for name, array in received.content["arrays"].items():
        found = array.numpy()
        if found.dtype.kind == "f":
            found = found + step(index, name, found.shape)
        arrays[name] = Array(np.asarray(found, dtype=array.dtype))
    metrics = MetricRecord({"num-examples": 10 * (index + 1), "loss": SECRET})
    content = {"arrays": ArrayRecord(arrays), "metrics": metrics}
    content["privacy"] = claim(index, received.content["config"]["server-round"])
    return Message(RecordDict(content), reply_to=received)


def changed(change):
    """Return a train function whose answer ``change`` alters on the first node, before masks."""

    def function(received, ctx):
        reply = train(received, ctx)
        if ctx.node_config["partition-id"] == 0:
            change(reply.content)
        return reply

    return function


def app(function=train, *, mods=(secure_aggregation_mod,)):
    made = ClientApp()
    made.train(mods=list(mods))(function)
    return made


def model():
    return ArrayRecord(
        {
            "w": Array(np.zeros((3, 40), np.float32)),
            "steps": Array(np.array(3, np.int64)),
            "b": Array(np.zeros(30)),
        }
    )


def strategy(**changes):
    arguments = {"population": NODES, "wait_seconds": 0.0} | changes
    return SampleLevelFedAvg(**arguments)


def secure(**changes):
    return strategy(**{"secure_aggregation": PROTOCOL, "max_update_norm": BOUND} | changes)


def run(made, client=None, *, rounds=1, fault=None, **arguments):
    client = client or app()
    with InProcessGrid(client, num_supernodes=NODES, fault=fault) as grid:
        return made.start(grid, model(), num_rounds=rounds, **arguments)


def run_plain(made, function=train, **arguments):
    return run(made, app(function, mods=()), **arguments)


def flat(result):
    arrays = result.arrays
    return np.concatenate([arrays[name].numpy().ravel().astype(float) for name in ("w", "b")])


# --- the sum and the mean ----------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_the_mean_is_that_of_the_plain_strategy_to_the_fixed_points_accuracy(weighted):
    more = {"weigh_by_num_examples": True} if weighted else {}
    bound = {"max_num_examples": 100} if weighted else {}
    plain = run_plain(strategy(**more))
    masked = run(secure(**more, **bound))
    assert np.any(flat(plain))
    # Each of the six rounds by half a unit of 50 / 2^24; the weights of 10 to 60 are exact.
    lightest = 210 / 100 if weighted else NODES
    most = 1.01 * NODES / 2 * BOUND / 2**24 / lightest
    np.testing.assert_allclose(flat(masked), flat(plain), rtol=1e-6, atol=most)
    assert masked.arrays["steps"].numpy() == 3


def plain_fixed_point(way, arrays, server_round, request):
    """Return the next model from the plain integer sum of the survivors' vectors."""
    task = RecordDict({"arrays": arrays, "config": ConfigRecord({"server-round": server_round})})
    contribution = WeightedUpdate(request, task)
    total, survivors = np.zeros(request.width, np.int64), 0
    for index in range(NODES):
        if way.get(index, Stage.UNMASK) == Stage.UNMASK:
            answered = train(message("train", task), context(partition_id=index))
            total += contribution.vector(answered.content)
            survivors += 1
    mean = request.mean(total, survivors=survivors)
    before = {name: array.numpy() for name, array in arrays.items()}
    flat_before = np.concatenate([before[n].ravel().astype(float) for n in ("w", "b")])
    after = flat_before + mean
    return ArrayRecord(
        {
            "w": Array(after[:120].reshape(3, 40).astype(np.float32)),
            "steps": arrays["steps"],
            "b": Array(after[120:]),
        }
    )


def test_the_unmasked_sum_is_the_plain_sum_whoever_drops_out_at_whatever_stage():
    seen = {}
    client = app(mods=[dropping(KINDS), secure_aggregation_mod])
    more = {"weigh_by_num_examples": True, "max_num_examples": 40}  # the last two are at the bound
    result = run(
        secure(give_up_after=None, **more),
        client,
        rounds=len(KINDS),
        evaluate_fn=lambda r, arrays: seen.update({r: arrays}) or None,
    )
    request = AverageRequest(
        dimension=150, max_update_norm=BOUND, parties=NODES, max_num_examples=40
    )
    for server_round, way in enumerate(KINDS, start=1):
        expected = plain_fixed_point(way, seen[server_round - 1], server_round, request)
        for name, array in expected.items():
            np.testing.assert_array_equal(seen[server_round][name].numpy(), array.numpy())
        assert np.any(seen[server_round]["w"].numpy() != seen[server_round - 1]["w"].numpy())
    assert result.rounds == len(KINDS)


def test_an_update_above_the_bound_is_shortened_to_it_and_the_node_says_so(caplog):
    caplog.set_level(logging.WARNING)
    masked = run(secure(max_update_norm=0.5))
    updates = [flat_step(index) for index in range(NODES)]
    assert all(np.linalg.norm(update) > 0.5 for update in updates)
    expected = np.mean([0.5 * update / np.linalg.norm(update) for update in updates], axis=0)
    np.testing.assert_allclose(flat(masked), expected, atol=0.5 * 2**-14)
    own = [r for r in caplog.records if r.name == "dpfl_flower.node"]
    assert sum("max_update_norm" in r.getMessage() for r in own) == NODES


def warned(caplog):
    """What the server warns of, which has seen sums only."""
    return [
        r.getMessage() for r in caplog.records if r.name == "flwr.dpfl" and r.levelname == "WARNING"
    ]


@pytest.mark.parametrize("weighted", [{}, {"weigh_by_num_examples": True, "max_num_examples": 60}])
@pytest.mark.parametrize(
    ("bound", "said"),
    [
        (0.01, "as long as max_update_norm=0.01 lets it be"),
        (10.0, None),
        (1e8, "zero in every entry"),
    ],
)
def test_the_server_says_where_the_bound_leaves_nothing_of_a_mean_or_shortens_it(
    bound, said, weighted, caplog
):
    def same(received, ctx):
        reply = train(received, ctx)
        w = received.content["arrays"]["w"].numpy() + np.float32(0.1)
        reply.content["arrays"]["w"] = Array(w)
        reply.content["arrays"]["b"] = received.content["arrays"]["b"]
        return reply

    masked = run(secure(max_update_norm=bound, **weighted), app(same))
    lines = [line for line in warned(caplog) if "max_update_norm" in line]
    if said is None:
        assert not lines
    else:
        (line,) = lines
        assert said in line
        assert f"max_update_norm={bound:g}" in line
        assert "ten times the norm" in line
    assert np.any(flat(masked)) == (bound != 1e8)


def flat_step(index):
    return np.concatenate([step(index, "w", (3, 40)).ravel(), step(index, "b", (30,))])


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e200])
def test_numbers_that_are_not_finite_are_no_part_of_the_mean_and_cost_no_survivor(bad):
    def spoil(content):
        content["arrays"]["b"] = Array(np.full(30, bad))

    function = changed(spoil)
    masked = run(secure(secure_aggregation=SecAggPlus(min_cohort=NODES)), app(function))
    others = np.mean([flat_step(index) for index in range(1, NODES)], axis=0)
    if bad == 1e200:  # a number like any other, shortened
        others = (5 * others + BOUND * np.repeat([0, 1 / np.sqrt(30)], [120, 30])) / NODES
    np.testing.assert_allclose(flat(masked), others, atol=1e-4)


def test_counts_that_are_no_weights_weigh_nothing_and_large_ones_as_the_bound():
    def count(value):
        def spoil(content):
            content["metrics"]["num-examples"] = value

        return spoil

    more = {"weigh_by_num_examples": True, "max_num_examples": 60}
    weights = np.array([10.0 * (index + 1) for index in range(NODES)])
    for value, weight in ((-5, 0), (float("nan"), 0), (10**6, 60), (2.5, 2.5)):
        weights[0] = weight
        masked = run(secure(**more), app(changed(count(value))))
        updates = np.array([flat_step(index) for index in range(NODES)])
        np.testing.assert_allclose(flat(masked), weights @ updates / weights.sum(), atol=1e-4)


def test_the_log_tells_of_an_abandoned_round_and_how_many_are_in_a_mean_where_that_changes(caplog):
    caplog.set_level(logging.INFO, logger="flwr.dpfl")
    lost = {1: 4, 2: 0, 3: 1}

    def fault(m):
        server_round, stage = m.metadata.group_id.split("/")
        late = m.metadata.dst_node_id - 1000 < lost[int(server_round)]
        return Fault.SILENT if stage == "mask" and late else None

    run(secure(), rounds=len(lost), fault=fault)
    lines = [m for m in caplog.messages if "[ROUND" in m]
    assert ["nothing released" in line for line in lines] == [True, False, False]
    counts = [m.split("the mean is that of ")[1] for m in caplog.messages if "mean is that of" in m]
    assert counts == [f"{NODES} of {NODES} nodes", f"{NODES - 1} of {NODES} nodes"]
    assert all(m.startswith("NOT PRIVATE: ") for m in caplog.messages if "mean is that of" in m)


# --- claims ------------------------------------------------------------------------------------

CONFIG = DPSGDConfig(
    sampling_rate=0.5,
    steps_per_round=2,
    planned_rounds=4,
    clip_norm=1.0,
    expected_batch_size=10,
    delta=1e-3,
    noise_multiplier=2.0,
)


def hospital(ctx):
    index = int(ctx.node_config["partition-id"])
    generator = torch.Generator().manual_seed(index)
    return DPSGDClient(
        nn.Linear(3, 1),
        TensorDataset(
            torch.randn(20, 3, generator=generator), torch.randn(20, 1, generator=generator)
        ),
        config=CONFIG,
        loss_fn=nn.MSELoss(reduction="none"),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        ledger=NodeLedger.from_context(ctx, dataset=f"hospital {index}"),
        example=(torch.zeros(3), torch.zeros(1)),
    )


def test_dp_sgd_nodes_claim_under_masks_what_they_claim_without(tmp_path):
    start = ArrayRecord(nn.Linear(3, 1).state_dict())
    reports = []
    for kind, made, mods in (
        ("plain", strategy(), []),
        ("masked", secure(), [secure_aggregation_mod]),
    ):
        (tmp_path / kind).mkdir()
        configs = [{"ledger-path": str(tmp_path / kind / f"{i}.jsonl")} for i in range(NODES)]
        client = numpy_client_app(hospital, mods=mods)
        with InProcessGrid(client, num_supernodes=NODES, node_configs=configs) as grid:
            result = made.start(grid, start, num_rounds=2)
        reports.append(result.node_privacy)
        assert np.any(result.arrays["weight"].numpy() != start["weight"].numpy())
    plain, masked = reports
    assert masked == plain and len(masked.claims) == NODES
    assert masked.worst.epsilon > 0 and masked.worst.durable
    assert str(masked) == str(plain)


UNREADABLE = {
    "none": None,
    "no events": {"events": "nonsense"},
    "events of another kind": {"events": '[{"kind":"free"}]'},
    "no delta": {"delta": 1.0},
    "negative": {"epsilon": -1.0},
    "another unit": {"unit": "patient"},
    "a number for text": {"dataset": 5},
    "a relation without a price": {"unit": "node", "relation": "x"},
    "a durable that is no flag": {"durable": 1},
}


def unclaimed(kind):
    def spoil(content):
        if UNREADABLE[kind] is None:
            del content["privacy"]
        else:
            content["privacy"] = ConfigRecord({**content["privacy"], **UNREADABLE[kind]})
        content["arrays"]["b"] = Array(np.full(30, 9.0))

    return spoil


class Watched(InProcessGrid):
    """Keeps what came back from the nodes."""

    def pull_messages(self, message_ids):
        found = list(super().pull_messages(message_ids))
        self.came = [*getattr(self, "came", []), *found]
        return found


def answers_of(grid, node, stage):
    return [
        m
        for m in grid.came
        if m.metadata.src_node_id == node and m.metadata.group_id.endswith(f"/{stage}")
    ]


@pytest.mark.parametrize("kind", list(UNREADABLE))
def test_a_node_masks_no_answer_without_a_readable_claim(kind):
    with Watched(app(changed(unclaimed(kind))), num_supernodes=NODES) as grid:
        result = secure().start(grid, model(), num_rounds=1)
        [refused] = answers_of(grid, 1000, "mask")
    assert refused.has_error() and refused.error.code == 102
    others = np.mean([flat_step(index) for index in range(1, NODES)], axis=0)
    np.testing.assert_allclose(flat(result), others, atol=1e-4)
    assert 1000 not in result.node_privacy.claims


# The server reads the others as the strategy without masks does.
@pytest.mark.parametrize(
    "kind", sorted(UNREADABLE.keys() - {"a durable that is no flag", "a number for text"})
)
def test_the_server_takes_a_masked_vector_without_a_readable_claim_for_a_dropout(kind):
    """Should a node mask such an answer, it is left out before anything is unmasked."""

    def lying(received, ctx, call_next):
        reply = call_next(received, ctx)
        if ctx.node_config["partition-id"] == 0 and "masked" in reply.content:
            if UNREADABLE[kind] is None:
                del reply.content["privacy"]
            else:
                reply.content["privacy"] = ConfigRecord(
                    {**reply.content["privacy"], **UNREADABLE[kind]}
                )
        return reply

    asked = []

    def fault(sent):
        request = decode_request(sent.content)
        if request.stage is Stage.UNMASK:
            asked.append((sent.metadata.dst_node_id, request))

    client = app(mods=[lying, secure_aggregation_mod])
    result = run(secure(), client, fault=fault)
    others = np.mean([flat_step(index) for index in range(1, NODES)], axis=0)
    np.testing.assert_allclose(flat(result), others, atol=1e-4)
    assert 1000 not in result.node_privacy.claims
    assert len(asked) == NODES - 1
    assert all(r.dropped == (1000,) and node != 1000 for node, r in asked)


def test_nothing_leaves_but_the_masked_vector_and_the_fields_of_the_claim():
    def more(content):
        content["privacy"]["patients"] = SECRET
        content["privacy"]["statement"] = f"epsilon 1 for {SECRET} patients"
        content["privacy"]["events"] += " " * 47  # a valid list all the same
        content["notes"] = ConfigRecord({"mean-age": SECRET})

    with Watched(app(changed(more)), num_supernodes=NODES) as grid:
        secure(metrics="not_private", fraction_evaluate=0.1).start(grid, model(), num_rounds=1)
        [sent] = answers_of(grid, 1000, "mask")
    assert set(sent.content) == {records.SECAGG, records.MASKED, records.PRIVACY}
    events = events_to_json([Gaussian(5.0)])
    assert dict(sent.content["privacy"]) == dict(claim(0, 1)) | {"events": events}
    for reply in grid.came:
        if "/mask" not in reply.metadata.group_id and not reply.has_error():
            assert records.PRIVACY not in reply.content


def test_what_was_claimed_counts_also_where_the_round_comes_to_nothing():
    def gone(sent):
        return Fault.SILENT if sent.metadata.group_id == "2/unmask" else None

    result = run(secure(), rounds=3, fault=gone)
    assert {len(c.events) for c in result.node_privacy.claims.values()} == {3}
    result = run(secure(), rounds=2, fault=gone)
    assert {len(c.events) for c in result.node_privacy.claims.values()} == {2}


# --- rounds that are abandoned -----------------------------------------------------------------


def silent(*, stage, rounds, count=3):
    order = ["advertise", "share", "mask", "unmask"]

    def fault(sent):
        server_round, _, found = sent.metadata.group_id.partition("/")
        late = found in order and order.index(found) >= order.index(stage)
        gone = sent.metadata.dst_node_id < 1000 + count
        return Fault.SILENT if gone and late and int(server_round) in rounds else None

    return fault


@pytest.mark.parametrize("stage", ["advertise", "share", "mask", "unmask"])
def test_a_round_with_too_few_changes_nothing_and_the_next_goes_on(stage):
    protocol = SecAggPlus(min_cohort=4)

    def momentum(**more):
        return secure(
            secure_aggregation=protocol, server_optimizer=FedAvgM(lr=1.0, momentum=0.9), **more
        )

    seen = {}
    result = run(
        momentum(),
        rounds=3,
        fault=silent(stage=stage, rounds=(2,)),
        evaluate_fn=lambda r, arrays: seen.update({r: arrays}) or None,
    )
    for name, array in seen[1].items():
        np.testing.assert_array_equal(seen[2][name].numpy(), array.numpy())
    np.testing.assert_array_equal(flat(result), flat(run(momentum(), rounds=2)))
    assert result.rounds == 3


def test_a_round_whose_weights_add_up_to_nothing_changes_nothing(caplog):
    def uncounted(received, ctx):
        reply = train(received, ctx)
        if received.content["config"]["server-round"] == 2:
            reply.content["metrics"]["num-examples"] = 0
        return reply

    more = {"weigh_by_num_examples": True, "max_num_examples": 60}
    momentum = {"server_optimizer": FedAvgM(lr=1.0, momentum=0.9)}
    result = run(secure(**more, **momentum), app(uncounted), rounds=3)
    np.testing.assert_array_equal(flat(result), flat(run(secure(**more, **momentum), rounds=2)))
    assert sum("given up" in logged.getMessage() for logged in caplog.records) == 1


def test_a_sum_with_a_mask_left_in_it_is_given_up():
    def garbling(received, ctx, call_next):
        reply = call_next(received, ctx)
        if ctx.node_config["partition-id"] == 0 and "masked" in reply.content:
            sent = reply.content["masked"]["sum"].numpy()
            garbled = np.random.default_rng(1).integers(0, 256, sent.shape, np.uint8)
            garbled[-4:] = sent[-4:]  # the weight, by which it would be found out as well
            reply.content["masked"] = ArrayRecord({"sum": Array(garbled)})
        return reply

    result = run(secure(give_up_after=None), app(mods=[garbling, secure_aggregation_mod]))
    np.testing.assert_array_equal(flat(result), 0)
    assert len(result.node_privacy.claims) == NODES


def test_abandoned_rounds_in_a_row_end_the_run_with_the_last_model():
    made = secure(give_up_after=2)
    with pytest.raises(AllClientsFailed, match="in 2 rounds in a row") as failed:
        run(made, rounds=9, fault=silent(stage="mask", rounds=(2, 3), count=4))
    np.testing.assert_array_equal(flat(failed.value.result), flat(run(secure(), rounds=1)))


def test_nodes_that_run_no_protocol_are_never_sent_the_model():
    seen = []
    with pytest.raises(AllClientsFailed):
        run_plain(secure(give_up_after=1), fault=lambda m: seen.append(set(m.content)))
    assert seen == [{records.SECAGG}] * NODES


# --- going on ----------------------------------------------------------------------------------


def test_a_run_goes_on_from_its_checkpoint_under_the_same_protocol_only(tmp_path):
    optimizer = FedAvgM(lr=1.0, momentum=0.9)
    late = silent(stage="mask", rounds=(2,), count=4)
    whole = run(secure(server_optimizer=optimizer), rounds=3, fault=late)
    parts = {"server_optimizer": optimizer, "checkpoint_dir": tmp_path}
    run(secure(**parts), rounds=2, fault=late)
    for other in (
        strategy(**parts),
        secure(secure_aggregation=SecAggPlus(threshold=0.7), **parts),
        secure(max_update_norm=BOUND + 1, **parts),
    ):
        with pytest.raises(CheckpointError, match="settings="):
            run(other, rounds=3)
    result = run(secure(**parts), rounds=3)
    np.testing.assert_array_equal(flat(result), flat(whole))
    assert result.rounds == 3
    saved = json.loads((tmp_path / "state.json").read_text())
    assert set(saved["claims"]) == {str(1000 + index) for index in range(NODES)}


def test_nodes_forget_a_round_after_the_time_that_its_stages_may_take():
    told = set()

    def fault(sent):
        told.add(getattr(decode_request(sent.content), "seconds", None))

    run(secure(), timeout=60.0, fault=fault)
    assert told == {300.0, None}


def test_a_loop_of_ones_own_has_to_go_through_all_stages():
    made = secure()
    with InProcessGrid(app(), num_supernodes=NODES) as grid:
        messages = made.configure_train(1, model(), ConfigRecord(), grid)
        replies = list(grid.send_and_receive(messages))
        with pytest.raises(RuntimeError, match="waits for further messages"):
            made.aggregate_train(1, replies)
        earlier = []
        while (messages := made.continue_train(1, [*earlier, *replies, *replies])) is not None:
            earlier += replies
            replies = list(grid.send_and_receive(messages))
        released, _ = made.aggregate_train(1, replies)
        with pytest.raises(RuntimeError, match="round 1"):
            made.aggregate_train(1, replies)
        with pytest.raises(RuntimeError, match="round 1"):
            made.continue_train(1, replies)
    expected = run(secure()).arrays
    for name, array in expected.items():
        np.testing.assert_array_equal(released[name].numpy(), array.numpy())


def with_rosters(folder):
    """Return node configs with identities, one roster of them all, and a journal each."""
    keys = [Ed25519PrivateKey.generate() for _ in range(NODES)]
    roster = folder / "roster"
    lines = [key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) for key in keys]
    roster.write_bytes(b"\n".join(lines))
    configs = []
    for index, key in enumerate(keys):
        identity = folder / f"identity{index}"
        private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
        identity.write_bytes(private)
        identity.chmod(0o600)
        configs.append(
            {
                "secagg-identity": str(identity),
                "secagg-roster": str(roster),
                "secagg-journal": str(folder / f"journal{index}"),
            }
        )
    return configs


def test_nodes_with_rosters_sign_who_survived_and_the_mean_is_the_same(tmp_path):
    stages = set()

    def fault(sent):
        stages.add(sent.metadata.group_id)
        late = sent.metadata.group_id in {"2/mask", "2/acknowledge", "2/unmask"}
        return Fault.SILENT if late and sent.metadata.dst_node_id == 1000 else None

    made = secure(secure_aggregation=SecAggPlus(threshold=0.6, rosters=True))
    configs = with_rosters(tmp_path)
    with InProcessGrid(app(), num_supernodes=NODES, fault=fault, node_configs=configs) as grid:
        result = made.start(grid, model(), num_rounds=2)
    assert "2/acknowledge" in stages
    means = [np.mean([flat_step(i) for i in range(first, NODES)], axis=0) for first in (0, 1)]
    np.testing.assert_allclose(flat(result), sum(means), atol=1e-4)
    releases = {n: len(c.events) for n, c in result.node_privacy.claims.items()}
    assert releases == {1000: 1, **dict.fromkeys(range(1001, 1000 + NODES), 2)}


# --- another protocol, and what is refused -------------------------------------------------------


def test_ckks_sums_the_same_vectors_with_the_same_claims(tmp_path):
    files = make_key(tmp_path)
    key = {"ckks-key": str(files.nodes)}
    made = secure(secure_aggregation=CKKS(key=PublicKey.load(files.server)))
    client = app(mods=[ckks_mod])
    with InProcessGrid(client, num_supernodes=NODES, node_configs=[key] * NODES) as grid:
        result = made.start(grid, model(), num_rounds=1)
    masked = run(secure())
    np.testing.assert_array_equal(flat(result), flat(masked))
    assert result.node_privacy == masked.node_privacy
    silent_claim = app(changed(unclaimed("none")), mods=[ckks_mod])
    with InProcessGrid(silent_claim, num_supernodes=NODES, node_configs=[key] * NODES) as grid:
        left = made.start(grid, model(), num_rounds=1)
    others = np.mean([flat_step(index) for index in range(1, NODES)], axis=0)
    np.testing.assert_allclose(flat(left), others, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"max_update_norm": None}, "max_update_norm=None must be given"),
        ({"max_update_norm": 0.0}, "max_update_norm=0.0"),
        ({"max_update_norm": float("inf")}, "max_update_norm=inf"),
        ({"max_update_norm": "x"}, "max_update_norm='x'"),
        ({"secure_aggregation": None}, "max_update_norm=50.0 must be None"),
        (
            {"secure_aggregation": None, "max_update_norm": None, "max_num_examples": 5},
            "max_num_examples=5 must be None",
        ),
        ({"secure_aggregation": True}, "secure_aggregation=True must be a SecureAggregation"),
        ({"weigh_by_num_examples": True}, "max_num_examples=None must be given"),
        ({"max_num_examples": 100}, "and only there"),
        ({"weigh_by_num_examples": True, "max_num_examples": 0}, "max_num_examples=0"),
        ({"weigh_by_num_examples": True, "max_num_examples": 1.5}, "max_num_examples=1.5"),
        ({"weigh_by_num_examples": True, "max_num_examples": 2**27}, "max_num_examples=134217728"),
        ({"secure_aggregation": SecAggPlus(min_cohort=7)}, "min_cohort=7"),
        ({"secure_aggregation": SecAggPlus(max_cohort=5)}, "max_cohort=5 must be >= 6"),
        ({"secure_aggregation": SecAggPlus(max_cohort=2**40)}, "max_cohort=1099511627776 is too"),
    ],
)
def test_what_could_not_hold_is_refused_at_configuration(changes, match):
    with pytest.raises(ValueError, match=match):
        secure(**changes)


def test_more_nodes_than_the_modulus_has_room_for_are_refused_before_anyone_is_asked():
    asked = []
    with pytest.raises(ValueError, match="max_cohort=5 must be >= 6"):
        run(secure(population=5), fault=asked.append)
    assert asked == []
    roomy = secure(population=5, secure_aggregation=SecAggPlus(threshold=0.6, max_cohort=NODES))
    np.testing.assert_array_equal(flat(run(roomy)), flat(run(secure())))
