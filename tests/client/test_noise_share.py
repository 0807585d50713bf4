"""A node adds its share to what it answers, on its own terms, and charges it first."""

import dataclasses
import json

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given, settings
from hypothesis import strategies as st

from dpfl_flower import records
from dpfl_flower.accounting import Ledger, PrivacyBudget, epsilon
from dpfl_flower.client import (
    NodeError,
    NodeErrorCode,
    NodeLedger,
    NodePolicy,
    NoiseShare,
    SharePolicy,
    noise_share_mod,
)
from dpfl_flower.client.awaiting import request_awaiting_noise
from dpfl_flower.client.contribution import NoisedSum, contribution_for
from dpfl_flower.client.distributed_request import DistributedRequest
from dpfl_flower.client.masked_answer import under_masks
from dpfl_flower.client.users import UserCohort, app, user_cohort_app
from dpfl_flower.distributed import DistributedPlan, design
from dpfl_flower.quantize import centred, decoded
from dpfl_flower.rng import SeededRandom
from tests.support.node import all_bytes, context, message

DELTA = 1e-4
SECRET = "patient-4711"


def request(*, dimension=16, unit="example", **changes):
    relation = "zero-out" if unit == "node" else "add-or-remove-one"
    plan = design(
        noise_multiplier=2.0,
        rounds=10,
        dimension=dimension,
        clip_norm=1.0,
        num_nodes=4,
        min_survivors=3,
        colluders=1,
        max_units=100,
        unit=unit,
        relation=relation,
    )
    fields = {
        "plan": plan,
        "server_round": 1,
        "num_rounds": 10,
        "rotation_seed": b"public",
        "sampling_rate": None if unit == "node" else 1.0,
    }
    return DistributedRequest(**{**fields, **changes})


def share(ledger=None, *, policy=None, **changes):
    ledger = ledger or NodeLedger("heart")
    return NoiseShare(ledger, delta=DELTA, policy=policy or SharePolicy(colluders=1), **changes)


def zeros(asked):
    return np.zeros(asked.grid.padded, np.int64)


# --- the share -------------------------------------------------------------------------------


def test_what_leaves_is_the_sum_and_one_share_modulo_the_plans_bits():
    asked = request(dimension=2**17)
    total = np.arange(2**17) - 2**16
    residues = share().added(asked, total)
    assert residues.min() >= 0 and residues.max() < 2**asked.grid.bits
    noise = centred(residues, bits=asked.grid.bits) - total
    # 131,072 squares: a standard error of 0.4 %.
    assert noise.var() == pytest.approx(asked.plan.squared_scale, rel=0.025)
    again = share().added(asked, total)
    assert not np.array_equal(residues, again)


def test_it_is_charged_first_as_what_the_certain_honest_shares_cost(tmp_path):
    asked = request()
    path = tmp_path / "ledger.jsonl"
    sums = share(NodeLedger("heart", path=path))
    for _ in range(3):
        sums.added(asked, zeros(asked))
    with Ledger.open(path, dataset="heart", delta=DELTA, unit="example") as ledger:
        assert ledger.releases == 3
        assert asked.plan.event.shares == 2  # three survivors, of whom one may collude
        expected = epsilon(
            [asked.plan.event] * 3, delta=DELTA, relation="add-or-remove-one",
            total_variation=3 * asked.plan.total_variation,
        )  # fmt: skip
        assert ledger.epsilon() == pytest.approx(expected, rel=1e-9)
    notes = [json.loads(line) for line in path.read_text().splitlines()]
    assert [n["note"] for n in notes if n.get("kind") == "charge"] == [{"round": 1}] * 3


def test_nothing_is_answered_beyond_the_planned_rounds_or_the_budget():
    asked = request(num_rounds=2)
    sums = share()
    for _ in range(2):
        sums.added(asked, zeros(asked))
    with pytest.raises(NodeError) as refused:
        sums.added(asked, zeros(asked))
    assert refused.value.code == NodeErrorCode.LEDGER_REFUSED
    poor = share(NodeLedger("poor"), budget=PrivacyBudget(0.1, DELTA, "example"))
    with pytest.raises(NodeError) as refused:
        poor.added(asked, zeros(asked))
    assert refused.value.code == NodeErrorCode.BUDGET_EXHAUSTED


def test_a_plan_cannot_change_within_a_run():
    ledger = NodeLedger("heart")
    asked = request()
    share(ledger).added(asked, zeros(asked))
    weaker = dataclasses.replace(asked.plan, squared_scale=asked.plan.squared_scale - 1)
    with pytest.raises(NodeError) as refused:
        share(ledger).added(dataclasses.replace(asked, plan=weaker), zeros(asked))
    assert refused.value.code == NodeErrorCode.LEDGER_REFUSED


def test_seeded_noise_is_charged_as_none():
    ledger = NodeLedger("heart")
    asked = request()
    share(ledger, rng=SeededRandom(1)).added(asked, zeros(asked))
    with ledger.open(delta=DELTA) as opened:
        assert opened.epsilon() == float("inf")


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        (SharePolicy(colluders=2), "colluders=1 must be >= 2"),
        (SharePolicy(colluders=1, enforced_survivors=2), "min_survivors=3 must be <= 2"),
        (
            SharePolicy(colluders=1, min_share_multiplier=1.5),
            "share_multiplier=1.4.* must be >= 1.5",
        ),
        (SharePolicy(colluders=1, max_rounds=9), "num_rounds=10 must be <= 9"),
        (
            SharePolicy(colluders=1, node=NodePolicy(min_noise_multiplier=2.5)),
            "noise_multiplier=2.0.* must be >= 2.5",
        ),
        (
            SharePolicy(colluders=1, node=NodePolicy(max_epsilon=0.5, max_delta=1e-3)),
            "needs a ledger that outlives the run",
        ),
    ],
)
def test_the_node_insists_on_its_own_terms(policy, says):
    ledger = NodeLedger("heart")
    asked = request()
    with pytest.raises(NodeError, match=says) as refused:
        share(ledger, policy=policy).added(asked, zeros(asked))
    assert refused.value.code == NodeErrorCode.POLICY_REFUSED
    with ledger.open(delta=DELTA) as opened:
        assert opened.releases == 0


def test_max_epsilon_holds_over_all_runs_in_the_ledger(tmp_path):
    asked = request()
    policy = SharePolicy(colluders=1, node=NodePolicy(max_epsilon=4.0, max_delta=1e-3))
    path = tmp_path / "ledger.jsonl"
    answered = 0
    with pytest.raises(NodeError, match="epsilon=") as refused:
        for run in range(20):
            ledger = NodeLedger("heart", path=path, run=f"run {run}", chosen_by_node=True)
            sums = share(ledger, policy=policy)
            sums.added(asked, zeros(asked))
            answered += 1
    assert refused.value.code == NodeErrorCode.POLICY_REFUSED
    with Ledger.open(path, dataset="heart", delta=DELTA, unit="example") as ledger:
        assert 0 < ledger.epsilon() <= 4.0
        assert ledger.releases == answered >= 2


@pytest.mark.parametrize(
    ("config", "enforced"),
    [
        ({}, None),
        ({"max-rounds": 3}, None),
        ({"secagg-min-cohort": 2}, 2),
        ({"max-epsilon": 1.0, "max-delta": 1e-5}, 3),
        ({"min-noise-multiplier": 1.0}, 3),
        ({"min-noise-multiplier": 1.0, "secagg-roster": "peers"}, None),
    ],
)
def test_who_insists_on_something_believes_no_server_without_a_roster(config, enforced):
    assert SharePolicy.from_node_config(config).enforced_survivors == enforced


def test_the_policy_is_what_the_node_config_says():
    policy = SharePolicy.from_node_config(
        {
            "min-share-multiplier": 1,
            "max-rounds": 30,
            "secagg-min-cohort": 5,
            "secagg-colluders": 2,
            "min-noise-multiplier": 0.8,
        }
    )
    assert policy == SharePolicy(
        min_share_multiplier=1,
        max_rounds=30,
        enforced_survivors=5,
        colluders=2,
        node=NodePolicy(min_noise_multiplier=0.8),
    )
    assert SharePolicy.from_node_config({}) == SharePolicy(enforced_survivors=None)
    for key, value in (
        ("max-rounds", "many"),
        ("secagg-min-cohort", 0),
        ("secagg-colluders", 1.5),
        ("min-share-multiplier", "x"),
    ):
        with pytest.raises(ValueError, match="must be"):
            SharePolicy.from_node_config({key: value})


@pytest.mark.parametrize("bad", [np.zeros(15, np.int64), np.zeros(16), np.zeros((16, 1), np.int64)])
def test_a_sum_that_does_not_fit_is_refused(bad):
    with pytest.raises(ValueError, match="total of dtype"):
        share().added(request(), bad)


# --- the request -----------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["example", "node"])
def test_the_request_survives_the_journey(unit):
    asked = request(unit=unit)
    assert DistributedRequest.from_config(asked.to_config()) == asked


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("server-round", 0),
        ("server-round", 11),
        ("num-rounds", None),
        ("rotation-seed", b""),
        ("rotation-seed", "text"),
        ("sampling-rate", 1.5),
        ("sampling-rate", 0.0),
        ("dimension", "x"),
        ("squared-scale", 0),
        ("users", ["ann"]),
    ],
)
def test_a_request_that_does_not_fit_is_refused(field, value):
    fields = {**request().to_config(), field: value}
    with pytest.raises(ValueError, match=r"must be|unknown fields"):
        DistributedRequest.from_config(fields)


def test_coins_belong_to_units_inside_nodes_only():
    with pytest.raises(ValueError, match="sampling_rate=None"):
        request(sampling_rate=None)
    with pytest.raises(ValueError, match=r"sampling_rate=0\.5"):
        request(unit="node", sampling_rate=0.5)


# --- the mod ---------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch):
    monkeypatch.setattr(app, "_cohorts", {})


def cohort_fn(ctx):
    del ctx
    return UserCohort(
        {"ann": 0.1, "bob": 0.2, "eve": 100.0},
        local_update=lambda arrays, step: {name: a + step for name, a in arrays.items()},
    )


MODEL = {records.ARRAYS: ArrayRecord({"w": Array(np.zeros((2, 2), np.float32))})}
NODE = {"secagg_colluders": 1}


def content(asked):
    return RecordDict({**MODEL, records.DISTRIBUTED: asked.to_config()})


def masking(message, context, call_next):
    """Stands for secure aggregation, which masks what comes back."""
    with under_masks(survivors=3):
        return call_next(message, context)


def test_no_share_leaves_without_masks(tmp_path, caplog):
    """One share protects nothing by itself, and the ledger would be charged for all of them."""
    path = tmp_path / "ledger.jsonl"
    app = user_cohort_app(cohort_fn, mods=[noise_share_mod(dataset="heart", delta=DELTA)])
    ctx = context(ledger_path=str(path), **NODE)
    reply = app(message("train", content(request(dimension=4))), ctx)
    assert reply.error.code == NodeErrorCode.SECAGG_REQUIRED
    assert "mods=[secure_aggregation_mod, noise_share_mod(...)]" in caplog.text
    assert not path.exists()


def cohort_app():
    return user_cohort_app(cohort_fn, mods=[masking, noise_share_mod(dataset="heart", delta=DELTA)])


def residues_of(reply):
    assert not reply.has_error(), reply.error
    assert list(reply.content) == [records.INTEGER_SUM]
    return reply.content[records.INTEGER_SUM][records.SUM].numpy()


def test_a_cohort_answers_its_noised_sum_and_charges_the_nodes_ledger(tmp_path):
    path = tmp_path / "ledger.jsonl"
    asked = request(dimension=4)
    ctx = context(ledger_path=str(path), **NODE)
    answers = [residues_of(cohort_app()(message("train", content(asked)), ctx)) for _ in range(9)]
    means = [
        decoded(a, asked.grid, clip_norm=1.0, rotation_seed=b"public", expected_cohort=1)
        for a in answers
    ]
    # Of each coordinate: 0.1 + 0.2 + 1/2 (clipped), and one share's noise.
    sigma = asked.plan.share_multiplier
    assert np.abs(np.mean(means, axis=0) - 0.8).max() < 6 * sigma / 3
    assert np.std(means) > 0.4 * sigma
    with Ledger.open(path, dataset="heart", delta=DELTA, unit="example") as ledger:
        assert ledger.releases == 9


def test_a_node_that_is_the_unit_answers_its_own_bounded_update():
    weights = ClientApp(mods=[masking, noise_share_mod(dataset="phone", delta=DELTA)])

    @weights.train()
    def train(received, ctx):
        assert records.DISTRIBUTED not in received.content
        arrays = {k: Array(a.numpy() + 3) for k, a in received.content[records.ARRAYS].items()}
        return type(received)(
            RecordDict({records.ARRAYS: ArrayRecord(arrays), SECRET: ConfigRecord({"n": 1})}),
            reply_to=received,
        )

    asked = request(dimension=4, unit="node")
    sent = content(asked)
    reply = weights(message("train", sent), context(**NODE))
    residues = residues_of(reply)
    assert residues.shape == (4,)
    assert SECRET.encode() not in all_bytes(reply)
    assert records.DISTRIBUTED in sent  # what other nodes' messages share is left as it was
    # One unit of norm 6 clipped to 1, and a share.
    mean = decoded(residues, asked.grid, clip_norm=1.0, rotation_seed=b"public", expected_cohort=1)
    assert np.abs(mean - 0.5).max() < 7 * asked.plan.share_multiplier


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_whatever_a_request_holds_the_answer_is_noised_or_an_error(data):
    """Every field of the request, of any type and size; the share is drawn or nothing leaves."""
    fields = dict(request(dimension=4).to_config())
    for key in data.draw(st.lists(st.sampled_from(sorted(fields)), max_size=3)):
        fields[key] = data.draw(
            st.integers(-(2**63), 2**63 - 1)
            | st.integers(-3, 40)
            | st.floats()
            | st.text(max_size=5)
            | st.binary(max_size=5)
            | st.sampled_from(["node", "user", "replace-one", "zero-out", "skellam"])
        )
    sent = RecordDict({**MODEL, records.DISTRIBUTED: ConfigRecord(fields)})
    asking = user_cohort_app(
        zeros_fn, mods=[masking, noise_share_mod(dataset="heart", delta=DELTA)]
    )
    reply = asking(message("train", sent), context(**NODE))
    if reply.has_error():
        assert reply.error.code in set(NodeErrorCode)
        assert reply.error.code != NodeErrorCode.CLIENT_FAILED
    else:
        plan = DistributedPlan.from_fields(fields)
        residues = residues_of(reply)
        assert residues.shape == (plan.grid.padded,)
        # All units hold zeros: what is left is the share, which is not all zeros.
        assert plan.squared_scale < 40 or residues.any()


def zeros_fn(ctx):
    del ctx
    return UserCohort({"ann": 0.0}, local_update=lambda arrays, step: dict(arrays))


def test_a_node_that_is_the_unit_is_not_asked_for_a_vector_of_another_length():
    app_of_weights = ClientApp(mods=[masking, noise_share_mod(dataset="phone", delta=DELTA)])

    @app_of_weights.train()
    def train(received, ctx):
        del ctx
        return type(received)(RecordDict(dict(received.content)), reply_to=received)

    asked = request(dimension=2**31, unit="node")
    reply = app_of_weights(message("train", content(asked)), context(**NODE))
    assert reply.error.code == NodeErrorCode.MALFORMED_REQUEST


@pytest.mark.parametrize("kind", ["cohort", "nothing", "malformed"])
def test_no_train_message_gets_an_answer_without_noise(kind, caplog):
    asked = request(dimension=4)
    records_sent = {
        "cohort": {records.COHORT: asked.to_config()},
        "nothing": {},
        "malformed": {records.DISTRIBUTED: ConfigRecord({**asked.to_config(), "bits": 7})},
    }[kind]
    reply = cohort_app()(message("train", RecordDict({**MODEL, **records_sent})), context(**NODE))
    expected = "MALFORMED_REQUEST" if kind == "malformed" else "POLICY_REFUSED"
    assert reply.error.code == NodeErrorCode[expected]
    assert ("must be DistributedDPFedAvg" in caplog.text) == (kind != "malformed")


def test_a_refused_policy_is_found_out_before_anybody_trains():
    def never(ctx):
        raise AssertionError("built")

    asking = user_cohort_app(never, mods=[masking, noise_share_mod(dataset="heart", delta=DELTA)])
    reply = asking(message("train", content(request(dimension=4))), context(secagg_colluders=2))
    assert reply.error.code == NodeErrorCode.POLICY_REFUSED


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("spent", ["rounds", "budget", "policy"])
def test_what_a_node_cannot_charge_it_does_not_train_for(spent, durable, tmp_path):
    # Else a server could time one fresh sample after the other, and no ledger would show it.
    trained = []
    asked = request(dimension=4, unit="node", num_rounds=2 if spent == "rounds" else 10)
    one = epsilon([asked.plan.event], delta=DELTA, relation="zero-out")
    two = epsilon([asked.plan.event] * 2, delta=DELTA, relation="zero-out")
    budget = PrivacyBudget(1.001 * two, DELTA, "node", "zero-out") if spent == "budget" else None
    share_mod = noise_share_mod(dataset="phone", delta=DELTA, budget=budget)
    weights = ClientApp(mods=[masking, share_mod])

    @weights.train()
    def train(received, ctx):
        del ctx
        trained.append(received)
        return type(received)(
            RecordDict({records.ARRAYS: received.content[records.ARRAYS]}), reply_to=received
        )

    config = dict(NODE)
    if durable:
        config["ledger_path"] = str(tmp_path / "ledger.jsonl")
    if spent == "policy":
        config |= {"max_epsilon": 0.99 * one, "max_delta": 1e-4}
    ctx = context(**config)
    replies = [weights(message("train", content(asked)), ctx) for _ in range(4)]
    answered = sum(not reply.has_error() for reply in replies)
    assert answered == len(trained) == {"rounds": 2, "budget": 2, "policy": 0}[spent]
    code = {"rounds": "LEDGER_REFUSED", "budget": "BUDGET_EXHAUSTED", "policy": "POLICY_REFUSED"}
    assert replies[-1].error.code == NodeErrorCode[code[spent]]


@pytest.mark.parametrize("how", ["leaves", "answers"])
def test_no_text_of_an_app_that_failed_leaves(how):
    weights = ClientApp(mods=[masking, noise_share_mod(dataset="phone", delta=DELTA)])

    @weights.train()
    def train(received, ctx):
        del ctx
        if how == "leaves":
            raise SystemExit(SECRET)
        return Message(Error(1, SECRET), reply_to=received)

    reply = weights(message("train", content(request(dimension=4, unit="node"))), context(**NODE))
    assert reply.error.code == NodeErrorCode.CLIENT_FAILED
    assert SECRET.encode() not in all_bytes(reply)


@pytest.mark.parametrize("bad", [[-1, 0, 0, 0], [2**32, 0, 0, 0], [0, 0, 0], [0.0] * 4])
def test_what_is_not_reduced_modulo_the_plans_bits_is_never_masked(bad):
    # An app that answers its plain sum, because no mod added a share to it, has negative entries.
    summed = NoisedSum(request(dimension=4), RecordDict())
    answered = RecordDict({records.INTEGER_SUM: ArrayRecord({records.SUM: Array(np.array(bad))})})
    with pytest.raises(NodeError) as refused:
        summed.vector(answered)
    assert refused.value.code == NodeErrorCode.MALFORMED_REPLY
    fine = RecordDict(
        {records.INTEGER_SUM: ArrayRecord({records.SUM: Array(np.array([1, 2, 3, 2**32 - 1]))})}
    )
    assert summed.vector(fine).tolist() == [1, 2, 3, 2**32 - 1]


def test_with_a_roster_a_plan_counts_on_no_more_survivors_than_the_threshold_makes_certain():
    sent = content(request(dimension=4))
    for certain in (None, 3, 4):
        assert contribution_for(sent, {}, width=4, bits=32, most_survivors=certain)
    with pytest.raises(NodeError, match="min_survivors=3 must be <= 2") as refused:
        contribution_for(sent, {}, width=4, bits=32, most_survivors=2)
    assert refused.value.code == NodeErrorCode.POLICY_REFUSED


@pytest.mark.parametrize(("width", "bits"), [(8, 32), (4, 31)])
def test_masks_of_another_length_or_modulus_than_the_plans_are_refused(width, bits):
    with pytest.raises(NodeError) as refused:
        contribution_for(content(request(dimension=4)), {}, width=width, bits=bits)
    assert refused.value.code == NodeErrorCode.MALFORMED_REQUEST


def test_messages_of_other_kinds_pass():
    reply = cohort_app()(message("evaluate", RecordDict()), context())
    assert reply.error.code == NodeErrorCode.NOT_IMPLEMENTED


def test_an_app_without_the_mod_understands_no_request_for_noise():
    asked = request(dimension=4)
    forged = RecordDict({**MODEL, records.COHORT: asked.to_config()})
    for sent in (content(asked), forged):
        reply = user_cohort_app(cohort_fn)(message("train", sent), context())
        assert reply.error.code == NodeErrorCode.MALFORMED_REQUEST
    assert request_awaiting_noise() is None
