"""Nodes that add all of their own noise, behind secure aggregation: the server sees noisy sums."""

import itertools
import json

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.clientapp import ClientApp

from dpfl_flower import records
from dpfl_flower.accounting import EveryoneSampling, Gaussian, Ledger, PrivacyBudget, events_to_json
from dpfl_flower.client import ckks_mod, local_noise_mod, secure_aggregation_mod
from dpfl_flower.client.users import UserCohort, app, user_cohort_app
from dpfl_flower.clipping import FixedClipping
from dpfl_flower.noise import RoundedGaussian, RoundedLaplace
from dpfl_flower.secagg import CKKS, SecAggPlus
from dpfl_flower.secagg.ckks_key import PublicKey, make_key
from dpfl_flower.secagg.messages import Stage
from dpfl_flower.secagg.wire import decode_request
from dpfl_flower.simulation import Fault, InProcessGrid
from dpfl_strategies import AllClientsFailed, CheckpointError, FedAvgM, LocalDPFedAvg
from tests.support.contracts import statistics
from tests.support.contracts.strategy import quiet
from tests.support.dropouts import KINDS, NODES, dropping

USERS = 10
DELTA = 1e-5
PROTOCOL = SecAggPlus(threshold=0.6)
MASKS = (secure_aggregation_mod,)


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch):
    monkeypatch.setattr(app, "_cohorts", {})


def phones(masks=MASKS, *, outside=(), step=0.1, noise=True):
    """Nodes that are the units: each moves every weight by something of its own."""
    client = ClientApp()
    own = [local_noise_mod(dataset="phone")] if noise else []

    @client.train(mods=[*outside, *masks, *own])
    def train(received, ctx):
        move = step * (1 + ctx.node_config["partition-id"])
        arrays = {k: Array(a.numpy() + move) for k, a in received.content["arrays"].items()}
        return type(received)(RecordDict({"arrays": ArrayRecord(arrays)}), reply_to=received)

    return client


def hospitals(masks=MASKS, *, outside=(), noise=True):
    own = [local_noise_mod(dataset="patients")] if noise else []
    return user_cohort_app(
        lambda ctx: UserCohort(
            {str(i): 0.01 * (i + 1) for i in range(USERS)},
            local_update=lambda arrays, step: {name: a + step for name, a in arrays.items()},
        ),
        mods=[*outside, *masks, *own],
    )


def strategy(**changes):
    arguments = {
        "noise_multiplier": 2.0,
        "delta": DELTA,
        "clipping": FixedClipping(1.0),
        "num_nodes": NODES,
        "wait_seconds": 0.0,
        "max_inflation": 1.1,
    } | changes
    return LocalDPFedAvg(**arguments)


def secure(**changes):
    return strategy(**{"secure_aggregation": PROTOCOL} | changes)


OVER_USERS = {
    "unit": "user",
    "relation": "add-or-remove-one",
    "sampling": EveryoneSampling(NODES * USERS),
}


def run(it, client=None, *, rounds=1, size=20, fault=None, configs=None, **arguments):
    client = client or phones()
    model = ArrayRecord({"w": Array(np.zeros((2, size // 2), np.float64))})
    grid = InProcessGrid(client, num_supernodes=NODES, fault=fault, node_configs=configs)
    with grid, quiet():
        return it.start(grid, model, num_rounds=rounds, **arguments)


def flat(result):
    return result.arrays["w"].numpy().ravel()


@pytest.fixture
def foreseeable(monkeypatch):
    """Noise that is the same for every node and at its very bounds."""

    def sample(self, n, rng):
        del rng
        reach = 96 * getattr(self, "scale", 1 << 14)
        return np.resize(np.array([-reach, reach, 17, -3, 0], np.int64), n)

    for law in (RoundedGaussian, RoundedLaplace):
        monkeypatch.setattr(law, "sample", sample)


# --- the sum -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "changes", "ways"),
    [
        (phones, {}, KINDS),
        (phones, {"noise": "laplace"}, KINDS[::6]),
        (hospitals, OVER_USERS, KINDS[::6]),
    ],
)
def test_a_run_is_the_same_to_the_last_bit_whoever_drops_out(nodes, changes, ways, foreseeable):
    found = []
    for make, masks in ((strategy, ()), (secure, MASKS)):
        seen = []
        it = make(give_up_after=None, **changes)
        app._cohorts.clear()
        result = run(
            it,
            nodes(masks, outside=[dropping(ways)]),
            rounds=len(ways),
            evaluate_fn=lambda r, arrays, seen=seen: seen.append(arrays["w"].numpy()),
        )
        found.append((np.array(seen), result.node_privacy, result.signal_to_noise))
    (plain, claims, signal), (masked, claims_too, signal_too) = found
    np.testing.assert_array_equal(masked, plain)
    assert all(np.any(a != b) for a, b in itertools.pairwise(masked))
    assert claims_too == claims and len(claims.claims) == NODES
    assert signal_too == signal


def test_the_noise_in_the_sum_is_that_of_all_nodes_and_3_percent_off_is_rejected():
    released = flat(run(secure(), phones(step=0.0), size=80_000))
    statistics.require_scale(released, 2.0 * np.sqrt(NODES) / NODES, allowance=0.01)


def test_ckks_sums_the_same_vectors(tmp_path, foreseeable):
    files = make_key(tmp_path)
    it = secure(secure_aggregation=CKKS(key=PublicKey.load(files.server)))
    configs = [{"ckks-key": str(files.nodes)}] * NODES
    result = run(it, phones((ckks_mod,)), configs=configs)
    expected = run(strategy(), phones(()))
    np.testing.assert_array_equal(flat(result), flat(expected))
    assert result.node_privacy == expected.node_privacy


# --- what is claimed and charged ----------------------------------------------------------------


def test_nodes_charge_and_claim_what_they_do_without_masks_and_no_figure_is_added(tmp_path):
    budget = PrivacyBudget(4.0, DELTA, "node", "replace-one")
    reports = []
    for make, masks in ((strategy, ()), (secure, MASKS)):
        folder = tmp_path / str(len(reports))
        folder.mkdir()
        configs = [{"ledger-path": str(folder / f"{i}.jsonl")} for i in range(NODES)]
        it = make(budget=budget, noise_multiplier=None, delta=None)
        result = run(it, phones(masks), rounds=3, configs=configs)
        assert result.privacy is None and result.shuffled is None
        reports.append(result.node_privacy)
        for config in configs:
            with Ledger.open(
                config["ledger-path"], dataset="phone", delta=DELTA, relation="replace-one"
            ) as ledger:
                assert ledger.releases == 3
    assert reports[0] == reports[1]
    assert 3.99 < reports[1].worst.epsilon <= 4.0


def without_claim(content):
    del content["privacy"]


def with_events(events):
    def spoil(content):
        claimed = dict(content["privacy"])
        content["privacy"] = ConfigRecord(claimed | {"events": events})

    return spoil


UNCOVERED = {
    "none": without_claim,
    "less noise": with_events(events_to_json([Gaussian(1.0)])),
    "nothing charged": with_events("[]"),
    "no json": with_events("["),
}


@pytest.mark.parametrize("kind", list(UNCOVERED))
def test_a_claim_that_does_not_cover_its_answer_is_a_dropout_before_unmasking(kind):
    def lying(received, ctx, call_next):
        reply = call_next(received, ctx)
        if ctx.node_config["partition-id"] == 0 and "masked" in reply.content:
            UNCOVERED[kind](reply.content)
        return reply

    told = []

    def fault(sent):
        request = decode_request(sent.content)
        if request.stage is Stage.UNMASK:
            told.append(request.dropped)

    it = secure(noise_multiplier=0.002)
    result = run(it, phones(outside=[lying], step=0.01), fault=fault)
    assert told == [(1000,)] * (NODES - 1)
    # Twenty weights move by 0.02 to 0.06 in five nodes, each with noise of 0.002 clip norms.
    others = np.sqrt(NODES - 1) * 0.002 / NODES
    assert abs(flat(result).mean() - 0.01 * 20 / NODES) < 6 * others / np.sqrt(20)


@pytest.mark.parametrize(
    ("nodes", "changes"), [(phones, {}), (hospitals, OVER_USERS)], ids=["phones", "hospitals"]
)
def test_a_node_without_its_noise_masks_nothing(nodes, changes):
    for client in (
        nodes(noise=False),
        nodes(
            masks=(), outside=[local_noise_mod(dataset="x"), secure_aggregation_mod], noise=False
        ),
    ):
        with pytest.raises(AllClientsFailed):
            run(secure(give_up_after=1, **changes), client)


def test_nothing_leaves_but_the_masked_vector_and_the_claim():
    came = []

    def watching(received, ctx, call_next):
        reply = call_next(received, ctx)
        came.append((received.metadata.group_id, dict(reply.content)))
        return reply

    run(secure(), phones(outside=[watching]))
    masked = [content for group, content in came if group.endswith("/mask")]
    assert len(masked) == NODES
    for content in masked:
        assert set(content) == {records.SECAGG, records.MASKED, records.PRIVACY}
        assert "statement" not in content[records.PRIVACY]
    others = [content for group, content in came if not group.endswith("/mask")]
    assert all(set(content) == {records.SECAGG} for content in others)


@pytest.mark.parametrize("terms", [{"min-noise-multiplier": 2.5}, {"max-rounds": 1}])
def test_a_node_takes_part_on_its_own_terms_only(terms, tmp_path):
    configs = [{"ledger-path": str(tmp_path / f"{i}.jsonl")} for i in range(NODES)]
    configs[1] |= terms
    result = run(secure(), rounds=2, configs=configs)
    assert set(result.node_privacy.claims) == {1000 + i for i in range(NODES) if i != 1}
    path = tmp_path / "1.jsonl"
    assert not path.exists() or '"charge"' not in path.read_text()


# --- abandoned rounds, and going on ---------------------------------------------------------------


def silent(*, stage, rounds):
    order = ["advertise", "share", "mask", "unmask"]

    def fault(sent):
        server_round, _, found = sent.metadata.group_id.partition("/")
        late = order.index(found) >= order.index(stage)
        gone = sent.metadata.dst_node_id < 1004
        return Fault.SILENT if gone and late and int(server_round) in rounds else None

    return fault


@pytest.mark.parametrize("stage", ["advertise", "share", "mask", "unmask"])
def test_an_abandoned_round_changes_nothing_and_stays_charged(stage, tmp_path, foreseeable):
    configs = [{"ledger-path": str(tmp_path / f"{i}.jsonl")} for i in range(NODES)]
    optimizer = FedAvgM(lr=0.5, momentum=0.9)
    seen = []
    result = run(
        secure(server_optimizer=optimizer),
        rounds=3,
        fault=silent(stage=stage, rounds=(2,)),
        configs=configs,
        evaluate_fn=lambda r, arrays: seen.append(arrays["w"].numpy()),
    )
    np.testing.assert_array_equal(seen[2], seen[1])
    np.testing.assert_array_equal(
        flat(result), flat(run(secure(server_optimizer=optimizer), rounds=2))
    )
    assert result.rounds == 3 and set(result.signal_to_noise) == {1, 3}
    with Ledger.open(
        configs[0]["ledger-path"], dataset="phone", delta=DELTA, relation="replace-one"
    ) as ledger:
        assert ledger.releases == (3 if stage == "unmask" else 2)
    [event] = result.node_privacy.claims[1005].events
    assert event.count == (3 if stage in {"mask", "unmask"} else 2)


def test_a_run_goes_on_from_its_checkpoint_under_the_same_protocol_only(tmp_path, foreseeable):
    parts = {"checkpoint_dir": tmp_path, "server_optimizer": FedAvgM(lr=0.5, momentum=0.9)}
    run(secure(**parts), rounds=2)
    for other, masks in (
        (strategy(**parts), ()),
        (secure(secure_aggregation=SecAggPlus(threshold=0.7), **parts), MASKS),
    ):
        with pytest.raises(CheckpointError, match="secure_aggregation="):
            run(other, phones(masks), rounds=3)
    result = run(secure(**parts), rounds=3)
    whole = run(secure(server_optimizer=parts["server_optimizer"]), rounds=3)
    np.testing.assert_array_equal(flat(result), flat(whole))
    assert json.loads((tmp_path / "state.json").read_text())["server_round"] == 3


def test_what_nodes_claimed_for_an_abandoned_round_is_kept_and_the_round_is_done(tmp_path):
    it = secure(checkpoint_dir=tmp_path)
    run(it, rounds=2, fault=silent(stage="unmask", rounds=(2,)))
    saved = json.loads((tmp_path / "state.json").read_text())
    assert saved["server_round"] == 2
    assert [json.loads(c["events"])[0]["count"] for c in saved["claims"].values()] == [2] * NODES
    asked = []
    run(secure(checkpoint_dir=tmp_path), rounds=3, fault=lambda m: asked.append(m.metadata))
    assert {sent.group_id.split("/")[0] for sent in asked} == {"3"}


def test_nodes_forget_a_round_after_the_time_that_its_stages_may_take():
    told = set()

    def fault(sent):
        request = decode_request(sent.content)
        told.add(getattr(request, "seconds", None))

    run(secure(), timeout=60.0, fault=fault)
    assert told == {300.0, None}


def test_a_loop_of_ones_own_has_to_go_through_all_stages():
    it = secure(give_up_after=None)
    caught = []

    def early(server_round, replies):
        if not caught:
            with pytest.raises(RuntimeError, match="waits for further messages"):
                it.aggregate_train(server_round, [])
            caught.append(server_round)
        return proceed(server_round, replies)

    proceed = it.continue_train
    it.__dict__["continue_train"] = early
    run(it)
    assert caught == [1]
    for call in (it.continue_train, it.aggregate_train):
        with pytest.raises(RuntimeError, match="not configured"):
            call(2, [])


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"secure_aggregation": True}, "secure_aggregation=True must be a SecureAggregation"),
        ({"shuffled_reports": 4}, "shuffled_reports=4 must be None with secure_aggregation"),
        ({"secure_aggregation": SecAggPlus(min_cohort=7)}, "min_cohort=7"),
        ({"secure_aggregation": SecAggPlus(max_cohort=5)}, "max_cohort=5 must be >= 6"),
    ],
)
def test_what_could_not_hold_is_refused_at_configuration(changes, says):
    with pytest.raises(ValueError, match=says):
        secure(**changes)
