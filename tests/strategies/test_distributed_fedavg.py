"""Nodes add the noise and mask: what the server computes, charges and refuses."""

import json
import logging
import math

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.clientapp import ClientApp

from dpfl_flower import records
from dpfl_flower.accounting import (
    CappedPoissonSampling,
    Composed,
    EveryoneSampling,
    Ledger,
    PoissonSampling,
    PrivacyBudget,
    UnsupportedEvent,
    epsilon,
)
from dpfl_flower.client import noise_share_mod, secure_aggregation_mod
from dpfl_flower.client.users import UserCohort, app, user_cohort_app
from dpfl_flower.clipping import AdaptiveClipping, FixedClipping
from dpfl_flower.distributed import wrap_probability
from dpfl_flower.secagg import SecAggPlus
from dpfl_flower.simulation import Fault, InProcessGrid
from dpfl_strategies import (
    AllClientsFailed,
    CheckpointError,
    DistributedDPFedAvg,
    FedAvgM,
    Stopped,
)

USERS = 50
BUDGET = PrivacyBudget(1.0, 1e-4, "user")


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch):
    monkeypatch.setattr(app, "_cohorts", {})


def cohort_fn(context):
    del context
    return UserCohort(
        {str(i): 0.01 for i in range(USERS)},
        local_update=lambda arrays, step: {name: a + step for name, a in arrays.items()},
    )


def users_app(*, delta=1e-4, mods=None):
    share = noise_share_mod(dataset="phones", delta=delta)
    return user_cohort_app(cohort_fn, mods=mods or [secure_aggregation_mod, share])


def strategy(**changes):
    arguments = {
        "noise_multiplier": 1.0,
        "delta": 1e-4,
        "unit": "user",
        "sampling": EveryoneSampling(4 * USERS),
        "clipping": FixedClipping(1.0),
        "num_nodes": 4,
        "secure_aggregation": SecAggPlus(min_cohort=3),
        "wait_seconds": 0.0,
    } | changes
    return DistributedDPFedAvg(**arguments)


def run(it, *, rounds=2, size=20, client=None, fault=None, node_configs=None, **arguments):
    grid = InProcessGrid(
        client or users_app(), num_supernodes=4, fault=fault, node_configs=node_configs
    )
    model = ArrayRecord({"w": Array(np.zeros((2, size // 2), np.float32))})
    with grid:
        return it.start(grid, model, num_rounds=rounds, **arguments)


def flat(result):
    return result.arrays["w"].numpy().ravel()


# --- what it computes ------------------------------------------------------------------------


@pytest.mark.parametrize("noise", ["discrete-gaussian", "skellam"])
def test_the_released_mean_is_the_mean_and_its_noise_the_shares(noise):
    # One round over 8192 coordinates: 200 users move each by 0.01 of clip norm 1 (norm 0.9).
    it = strategy(noise=noise, noise_multiplier=2.0)
    released = flat(run(it, rounds=1, size=8192))
    mean = 0.01 * min(1, 1 / (0.01 * math.sqrt(8192)))
    # Four shares, of which three are certain: 4/3 of the planned variance.
    stddev = 2.0 * math.sqrt(4 / 3) / (4 * USERS)
    assert released.mean() == pytest.approx(mean, abs=6 * stddev / math.sqrt(8192))
    # 8192 squares: a standard error of 0.8 % of the deviation; rounding adds under 1 %.
    assert released.std() == pytest.approx(stddev, rel=0.05)


def test_the_server_optimizer_steps_and_rounds_follow_each_other():
    it = strategy(noise_multiplier=0.01, server_optimizer=FedAvgM(lr=0.5, momentum=0.9))
    released = flat(run(it, rounds=3))
    # Velocities 1, 1.9, 2.71 times 0.01, times 0.5.
    np.testing.assert_allclose(released, 0.5 * 0.01 * (1 + 1.9 + 2.71), atol=0.002)


def test_nodes_that_are_the_units_are_bounded_by_themselves():
    phones = ClientApp(mods=[secure_aggregation_mod, noise_share_mod(dataset="phone", delta=1e-3)])

    @phones.train()
    def train(message, context):
        step = 5.0 if context.node_config["partition-id"] == 0 else 0.1
        arrays = {k: Array(a.numpy() + step) for k, a in message.content[records.ARRAYS].items()}
        return type(message)(RecordDict({"arrays": ArrayRecord(arrays)}), reply_to=message)

    it = strategy(
        unit="node",
        relation="zero-out",
        delta=1e-3,
        sampling=EveryoneSampling(4),
        noise_multiplier=0.02,
    )
    released = flat(run(it, rounds=1, client=phones))
    # Three updates of 0.1 in 20 coordinates (norm 0.45), one clipped to norm 1.
    np.testing.assert_allclose(released, (3 * 0.1 + 1 / math.sqrt(20)) / 4, atol=0.03)


# --- what it charges -------------------------------------------------------------------------


def test_server_and_nodes_charge_the_same_event_and_the_budget_is_met(tmp_path):
    configs = [{"ledger-path": str(tmp_path / f"{i}.jsonl")} for i in range(4)]
    it = strategy(budget=BUDGET, noise_multiplier=None, delta=None, unit=None)
    result = run(it, rounds=3, node_configs=configs)
    assert 0.99 < result.privacy.epsilon <= 1.0
    assert (result.privacy.unit, result.privacy.releases) == ("user", 3)
    for config in configs:
        with Ledger.open(
            config["ledger-path"], dataset="phones", delta=1e-4, unit="user"
        ) as ledger:
            assert ledger.epsilon() == pytest.approx(result.privacy.epsilon, rel=1e-9)
            [event] = ledger.events()
            assert event.count == 3 and event.event.shares == 3


def test_no_sampling_is_amplified():
    half = strategy(sampling=PoissonSampling(2 * USERS, 4 * USERS))
    result = run(half)
    everyone = run(strategy())
    assert result.privacy.epsilon == everyone.privacy.epsilon
    assert flat(result).mean() == pytest.approx(flat(everyone).mean(), rel=0.8)


def test_colluders_make_every_share_stronger():
    shares = []
    for colluders in (0, 1):
        it = strategy(secure_aggregation=SecAggPlus(min_cohort=3, colluders=colluders))
        seen = []
        run(it, evaluate_fn=lambda r, a, it=it, seen=seen: seen.append(it.plan))
        assert seen[0].honest_shares == 3 - colluders
        shares.append(seen[0].share_multiplier)
    assert shares[1] == pytest.approx(shares[0] * math.sqrt(3 / 2), rel=1e-3)


def test_a_multiplier_of_which_not_one_round_fits_the_budget_is_refused():
    it = strategy(noise_multiplier=1.0, delta=None, unit=None, budget=BUDGET)
    with pytest.raises(ValueError, match=r"noise_multiplier=1.0 .* not one round fits"):
        run(it)


def test_a_budget_that_runs_out_ends_the_run(tmp_path):
    path = tmp_path / "ledger.jsonl"
    it = strategy(noise_multiplier=8.0, delta=None, unit=None, budget=BUDGET, ledger=path)
    result = run(it, rounds=10)
    assert result.stopped is Stopped.BUDGET_SPENT
    assert 1 < result.rounds < 10
    assert result.privacy.epsilon <= 1.0
    with Ledger.open(path, dataset="default", delta=1e-4, unit="user") as ledger:
        more = [*ledger.events(), ledger.events()[0].event]
        assert epsilon(more, delta=1e-4, relation="add-or-remove-one") > 1.0


# --- dropouts --------------------------------------------------------------------------------


def silent(*partitions, stage):
    """A fault by which some nodes fall silent at the ``stage``-th message of each round."""
    seen = {}

    def fault(message):
        key = (message.metadata.dst_node_id, message.metadata.group_id.split("/")[0])
        seen[key] = seen.get(key, 0) + 1
        late = message.metadata.dst_node_id - 1000 in partitions and seen[key] >= stage
        return Fault.SILENT if late else None

    return fault


@pytest.mark.parametrize("stage", [1, 2, 3, 4, 5])
def test_one_node_may_drop_at_any_stage(stage):
    it = strategy(noise_multiplier=0.01)
    result = run(it, rounds=1, fault=silent(2, stage=stage))
    summed = 3 if stage <= 3 else 4  # masked vectors count from the third stage on
    np.testing.assert_allclose(flat(result), 0.01 * summed / 4, atol=0.001)
    assert result.privacy.releases == 1


def test_nodes_enforce_what_a_plan_counts_on_without_any_config_of_theirs():
    every = {"secure_aggregation": SecAggPlus(min_cohort=4), "noise_multiplier": 0.01}
    np.testing.assert_allclose(flat(run(strategy(**every), rounds=1)), 0.01, atol=0.001)


def test_below_the_minimum_nothing_is_released_or_charged():
    with pytest.raises(AllClientsFailed):
        run(strategy(give_up_after=2), rounds=3, fault=silent(1, 2, stage=3))
    it = strategy(give_up_after=None)
    result = run(it, rounds=2, fault=silent(1, 2, stage=3))
    assert result.privacy.releases == 0
    np.testing.assert_array_equal(flat(result), 0)


def test_a_node_that_adds_no_share_or_no_mask_is_not_in_the_sum():
    unmasked = users_app(mods=[noise_share_mod(dataset="phones", delta=1e-4)])
    shareless = users_app(mods=[secure_aggregation_mod])
    for client in (unmasked, shareless):
        with pytest.raises(AllClientsFailed):
            run(strategy(give_up_after=1), rounds=1, client=client)


def test_a_node_takes_part_on_its_own_terms_only():
    demanding = [{}, {}, {}, {"min-share-multiplier": 5.0}]
    it = strategy(noise_multiplier=0.01)
    result = run(it, rounds=1, node_configs=demanding)
    np.testing.assert_allclose(flat(result), 0.01 * 3 / 4, atol=0.001)
    for refusing in (
        {"secagg-min-cohort": 2},  # the plan counts on three, which would be the server's word
        {"secagg-min-cohort": 5},
    ):
        with pytest.raises(AllClientsFailed):
            run(strategy(give_up_after=1), rounds=1, node_configs=[refusing] * 4)


def test_an_app_that_says_what_its_units_are_takes_no_other_word_for_it():
    def users(unit):
        share = noise_share_mod(dataset="phones", delta=1e-4, unit=unit)
        return user_cohort_app(cohort_fn, mods=[secure_aggregation_mod, share])

    assert run(strategy(), rounds=1, client=users("user")).privacy.releases == 1
    with pytest.raises(AllClientsFailed):
        run(strategy(unit="example", give_up_after=1), rounds=1, client=users("user"))


# --- going on --------------------------------------------------------------------------------


def test_a_run_goes_on_from_its_checkpoint(tmp_path):
    def fresh(**changes):
        return strategy(
            noise_multiplier=0.01,
            checkpoint_dir=tmp_path / "run",
            server_optimizer=FedAvgM(lr=0.5, momentum=0.9),
            **changes,
        )

    class Crash(RuntimeError):
        pass

    def crash(server_round, arrays):
        del arrays
        if server_round == 2:
            raise Crash

    with pytest.raises(Crash):
        run(fresh(), rounds=3, evaluate_fn=crash)
    with pytest.raises(CheckpointError, match="num_rounds=4"):
        run(fresh(), rounds=4)
    with pytest.raises(CheckpointError, match="secure_aggregation="):
        run(fresh(secure_aggregation=SecAggPlus(min_cohort=4)), rounds=3)
    result = run(fresh(), rounds=3)
    assert result.rounds == result.privacy.releases == 3
    np.testing.assert_allclose(flat(result), 0.5 * 0.01 * (1 + 1.9 + 2.71), atol=0.002)
    saved = json.loads((tmp_path / "run" / "state.json").read_text())
    assert saved["server_round"] == 3


def test_two_runs_of_one_strategy_share_its_budget():
    it = strategy(noise_multiplier=5.0, delta=None, unit=None, budget=BUDGET)
    first = run(it, rounds=1)
    second = run(it, rounds=2)
    assert first.privacy.releases == 1
    assert second.stopped is Stopped.BUDGET_SPENT
    assert first.privacy.epsilon <= second.privacy.epsilon <= 1.0


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"clipping": AdaptiveClipping()}, "must be FixedClipping"),
        ({"sampling": CappedPoissonSampling(50, 200, 80)}, "must be EveryoneSampling"),
        ({"num_nodes": 2}, "needs at least 3 nodes"),
        ({"bits": 63}, "bits=63"),
        ({"secure_aggregation": SecAggPlus(max_cohort=3)}, "max_cohort=3 must be >= num_nodes=4"),
        (
            {"secure_aggregation": SecAggPlus(min_cohort=4, neighbours=2)},
            "min_cohort=4 must be <= 3, the vectors",
        ),
        (
            {"secure_aggregation": SecAggPlus(min_cohort=4, rosters=True)},
            "min_cohort=4 must be <= 3, the vectors",
        ),
        ({"secure_aggregation": None}, "secure_aggregation=None must be a SecureAggregation"),
        ({"noise": "laplace"}, "laplace"),
        ({"noise_multiplier": None}, "budget=None"),
        (
            {"unit": "node", "relation": "zero-out", "sampling": PoissonSampling(2, 4)},
            "must be EveryoneSampling for unit='node'",
        ),
        ({"unit": "node", "relation": "zero-out"}, "num_nodes=4 must be population=200"),
    ],
)
def test_what_cannot_be_accounted_for_is_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        strategy(**changes)


def test_a_node_as_the_unit_may_not_be_added_or_removed():
    with pytest.raises(UnsupportedEvent, match="takes its share"):
        strategy(unit="node", sampling=EveryoneSampling(4))


def test_rounds_cannot_be_skipped_or_repeated():
    it = strategy()
    with pytest.raises(RuntimeError, match="not running"):
        it.privacy_spent()
    with pytest.raises(RuntimeError, match="not running"):
        it.aggregate_train(1, [])


def test_more_nodes_than_the_modulus_has_room_for_are_refused():
    with pytest.raises(ValueError, match="num_nodes=3 must be >= 4"):
        run(strategy(num_nodes=3))


def test_the_summary_tells_how_likely_a_sum_wraps_around(caplog):
    caplog.set_level(logging.INFO, logger="flwr.dpfl")
    plans = []
    it = strategy(bits=20)
    run(it, rounds=1, evaluate_fn=lambda r, a: plans.append(it.plan))
    bound = wrap_probability(plans[0], units=4 * USERS)
    assert 0 < bound < 1e-6
    says = f"Modulus: 2^20, in which a coordinate wraps around with probability <= {bound:.1e}"
    assert sum(says in logged.getMessage() for logged in caplog.records) == 1


def test_the_plan_prices_what_the_statement_says():
    it = strategy()
    plans = []
    result = run(it, evaluate_fn=lambda r, a: plans.append(it.plan))
    expected = epsilon(
        [Composed(plans[0].event, 2)], delta=1e-4, relation="add-or-remove-one",
        total_variation=2 * plans[0].total_variation,
    )  # fmt: skip
    assert result.privacy.epsilon == pytest.approx(expected, rel=1e-12)
    assert it.plan is None
