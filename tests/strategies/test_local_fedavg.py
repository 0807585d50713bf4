"""Each node adds all of its noise, on a plan that the server sends and the node checks."""

import json
import math

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpfl_flower import records
from dpfl_flower.accounting import (
    CappedPoissonSampling,
    Composed,
    EveryoneSampling,
    Gaussian,
    Laplace,
    Ledger,
    PoissonSampled,
    PoissonSampling,
    PrivacyBudget,
    epsilon,
    event_from_json,
    events_to_json,
    shuffled_epsilon,
    shuffled_gaussian_epsilon,
)
from dpfl_flower.client import LocalNoise, NodeErrorCode, local_noise_mod
from dpfl_flower.client.local_request import LocalRequest
from dpfl_flower.client.users import UserCohort, app, user_cohort_app
from dpfl_flower.clipping import AdaptiveClipping, FixedClipping
from dpfl_flower.noise import RoundedGaussian, RoundedLaplace
from dpfl_flower.rng import SeededRandom
from dpfl_flower.secagg import SecAggPlus
from dpfl_flower.simulation import Fault, InProcessGrid
from dpfl_strategies import AllClientsFailed, CheckpointError, FedAvgM, LocalDPFedAvg, Stopped
from tests.support.contracts import statistics
from tests.support.contracts.hostile import UNIT_KINDS, unit_arrays
from tests.support.contracts.strategy import quiet
from tests.support.node import context, message
from tests.support.recording_grid import record
from tests.support.scripted_grid import ScriptedGrid

NODES = 4
USERS = 50
DELTA = 1e-5
CLIP = 1.0


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch):
    monkeypatch.setattr(app, "_cohorts", {})


def phones(step=0.1, noise=None):
    """Nodes that are the units: each moves every weight by ``step``."""
    client = ClientApp()

    @client.train(mods=[local_noise_mod(noise, dataset="phone")])
    def train(received, ctx):
        del ctx
        arrays = {k: Array(a.numpy() + step) for k, a in received.content[records.ARRAYS].items()}
        return type(received)(RecordDict({"arrays": ArrayRecord(arrays)}), reply_to=received)

    return client


def cohort_fn(ctx):
    del ctx
    return UserCohort(
        {str(i): 0.01 for i in range(USERS)},
        local_update=lambda arrays, step: {name: a + step for name, a in arrays.items()},
    )


def seeded_cohort_fn(ctx):
    del ctx
    return UserCohort(
        {str(i): 0.01 for i in range(USERS)},
        local_update=lambda arrays, step: {name: a + step for name, a in arrays.items()},
        obeys_lists=True,
        rng=SeededRandom(1),
    )


def hospitals(fn=cohort_fn):
    return user_cohort_app(fn, mods=[local_noise_mod(dataset="patients")])


def strategy(**changes):
    arguments = {
        "noise_multiplier": 2.0,
        "delta": DELTA,
        "clipping": FixedClipping(CLIP),
        "num_nodes": NODES,
        "wait_seconds": 0.0,
    } | changes
    return LocalDPFedAvg(**arguments)


def over_users(**changes):
    arguments = {
        "unit": "user",
        "relation": "add-or-remove-one",
        "sampling": EveryoneSampling(NODES * USERS),
    } | changes
    return strategy(**arguments)


def run(it, client=None, *, rounds=1, size=20, nodes=NODES, fault=None, configs=None, **arguments):
    grid = InProcessGrid(
        client or phones(), num_supernodes=nodes, fault=fault, node_configs=configs
    )
    model = ArrayRecord({"w": Array(np.zeros((2, size // 2), np.float64))})
    with grid, quiet():
        return it.start(grid, model, num_rounds=rounds, **arguments)


def flat(result):
    return result.arrays["w"].numpy().ravel().astype(float)


def ledgers(tmp_path, nodes=NODES, **more):
    return [{"ledger-path": str(tmp_path / f"{i}.jsonl"), **more} for i in range(nodes)]


# --- what it computes ------------------------------------------------------------------------


def test_the_released_noise_is_the_sum_of_the_nodes_and_3_percent_off_is_rejected():
    released = flat(run(strategy(), phones(0.0), size=80_000))
    stated = 2.0 * CLIP * math.sqrt(NODES) / NODES  # all of it on each node
    statistics.require_scale(released, stated, allowance=0.01)


@pytest.mark.parametrize(("law", "size"), [("gaussian", 80_000), ("laplace", 200_000)])
def test_one_nodes_answer_carries_all_of_the_noise_and_3_percent_off_is_rejected(law, size):
    it = strategy(num_nodes=1, noise=law, max_inflation=1.05, delta=0.01)
    released = flat(run(it, phones(0.0), size=size, nodes=1))
    grid = it.noise.grid(size)
    assert grid.noise_units >= 2.0 * grid.sensitivity_units
    stated = grid.noise_units * grid.unit_size(CLIP)
    shape = statistics.LAPLACE if law == "laplace" else statistics.GAUSSIAN
    assert statistics.scale_fits(released, stated, law=shape)
    for off in (statistics.OFF, 1 / statistics.OFF):
        assert statistics.chance_to_miss(size, statistics.OFF, law=shape) < 1e-8
        assert not statistics.scale_fits(released, stated * off, law=shape)
    other = "norm" if law == "laplace" else "laplace"
    assert statistics.shape_fits(released, stated * (2**0.5 if law == "laplace" else 1), shape.name)
    assert not statistics.shape_fits(released, released.std(), other)


def test_the_mean_is_that_of_the_clipped_updates():
    released = flat(run(strategy(noise_multiplier=0.001, max_inflation=1.1), phones(5.0)))
    np.testing.assert_allclose(released, 1 / math.sqrt(20), atol=0.01)


def test_users_inside_nodes_are_added_up_exactly_and_noised_once_a_node():
    it = over_users()
    released = flat(run(it, hospitals(), size=80_000))
    mean = 0.01 * min(1, 1 / (0.01 * math.sqrt(80_000)))
    stddev = 2.0 * CLIP * math.sqrt(NODES) / (NODES * USERS)
    statistics.require_scale(released - mean, stddev, allowance=0.011)


def test_the_server_optimizer_steps():
    it = strategy(noise_multiplier=0.001, server_optimizer=FedAvgM(lr=0.5, momentum=0.9))
    released = flat(run(it, phones(0.01), rounds=3))
    np.testing.assert_allclose(released, 0.5 * 0.01 * (1 + 1.9 + 2.71), atol=0.01)


# --- what it charges -------------------------------------------------------------------------


@pytest.mark.parametrize(("law", "kind"), [("gaussian", Gaussian), ("laplace", Laplace)])
def test_each_node_charges_for_itself_and_the_report_prices_one_and_all(law, kind, tmp_path):
    it = strategy(noise=law, max_inflation=1.1)
    result = run(it, rounds=3, configs=ledgers(tmp_path))
    one = epsilon([Composed(kind(2.0), 3)], delta=DELTA, relation="replace-one")
    everywhere = epsilon([Composed(kind(2.0), 3 * NODES)], delta=DELTA, relation="replace-one")
    report = result.node_privacy
    assert result.privacy is None and len(report.claims) == NODES
    assert report.worst.epsilon == pytest.approx(one, rel=1e-5)
    assert report.epsilon_everywhere() == pytest.approx(everywhere, rel=1e-3)
    assert all(claim.durable and claim.unit == "node" for claim in report.claims.values())
    assert "replace-one" in str(result)


def test_a_laplace_round_of_replaced_nodes_is_twice_as_dear_as_its_scale():
    result = run(strategy(noise="laplace", max_inflation=1.1))
    assert result.node_privacy.worst.epsilon == pytest.approx(2 / 2.0, abs=2e-3)


@pytest.mark.parametrize("law", ["gaussian", "laplace"])
def test_the_budget_is_met_by_all_rounds_together_and_never_exceeded(law, tmp_path):
    budget = PrivacyBudget(4.0, DELTA, "node", "replace-one")
    it = strategy(budget=budget, noise_multiplier=None, delta=None, noise=law, max_inflation=1.1)
    result = run(it, rounds=5, configs=ledgers(tmp_path))
    assert result.stopped is Stopped.ALL_ROUNDS_DONE and len(result.node_privacy.claims) == NODES
    assert 3.99 < result.node_privacy.worst.epsilon <= 4.0
    assert all(
        c.events == (Composed(c.events[0].event, 5),) for c in result.node_privacy.claims.values()
    )


def test_units_cost_one_clip_norm_when_added_and_two_when_replaced():
    spent = {}
    for relation in ("add-or-remove-one", "zero-out", "replace-one"):
        result = run(over_users(relation=relation), hospitals(), rounds=2)
        spent[relation] = result.node_privacy.worst.epsilon
    half = epsilon([Composed(Gaussian(1.0), 2)], delta=DELTA, relation="add-or-remove-one")
    assert spent["replace-one"] == pytest.approx(half, rel=1e-5)
    assert spent["zero-out"] == pytest.approx(spent["add-or-remove-one"], rel=1e-5)
    assert spent["add-or-remove-one"] < 0.7 * half


def test_the_nodes_secret_coins_amplify_and_seeded_ones_are_refused():
    half = over_users(
        sampling=PoissonSampling(NODES * USERS / 2, NODES * USERS), noise_multiplier=1
    )
    result = run(half, hospitals(), rounds=2)
    event = Composed(PoissonSampled(0.5, Gaussian(1.0)), 2)
    expected = epsilon([event], delta=DELTA, relation="add-or-remove-one")
    assert result.node_privacy.worst.epsilon == pytest.approx(expected, rel=1e-5)
    full = epsilon([Composed(Gaussian(1.0), 2)], delta=DELTA, relation="add-or-remove-one")
    assert expected < 0.9 * full
    with pytest.raises(AllClientsFailed):
        run(over_users(give_up_after=1), hospitals(seeded_cohort_fn))


def test_the_charge_is_on_disk_before_the_noise_is_drawn(tmp_path, monkeypatch):
    path = tmp_path / "0.jsonl"
    seen = []
    draw = RoundedGaussian.sample

    def sample(self, n, rng):
        seen.append(sum('"charge"' in line for line in path.read_text().splitlines()))
        return draw(self, n, rng)

    monkeypatch.setattr(RoundedGaussian, "sample", sample)
    run(strategy(num_nodes=1), nodes=1, rounds=3, configs=ledgers(tmp_path, 1))
    assert seen == [1, 2, 3]


def test_what_cannot_be_charged_does_not_leave(tmp_path, monkeypatch):
    configs = ledgers(tmp_path)

    def refuse(self, *args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(Ledger, "charge", refuse)
    with pytest.raises(AllClientsFailed):
        run(strategy(give_up_after=1), configs=configs)


def test_a_nodes_ledger_goes_on_over_rounds_runs_and_restarts(tmp_path):
    configs = ledgers(tmp_path)
    run(strategy(), rounds=2, configs=configs)
    result = run(strategy(noise_multiplier=3.0), rounds=1, configs=configs)
    both = [Composed(Gaussian(2.0), 2), Gaussian(3.0)]
    spent = epsilon(both, delta=DELTA, relation="replace-one")
    for config in configs:
        with Ledger.open(
            config["ledger-path"], dataset="phone", delta=DELTA, relation="replace-one"
        ) as ledger:
            assert ledger.releases == 3
            assert ledger.epsilon() == pytest.approx(spent, rel=1e-5)
    assert result.node_privacy.worst.epsilon == pytest.approx(spent, rel=1e-5)


def test_a_nodes_own_earlier_spending_counts_against_the_budget(tmp_path):
    configs = ledgers(tmp_path)
    budget = PrivacyBudget(4.0, DELTA, "node", "replace-one")
    arguments = {"budget": budget, "noise_multiplier": None, "delta": None}
    first = run(strategy(**arguments), rounds=2, configs=configs)
    assert first.node_privacy.worst.epsilon <= 4.0
    with pytest.raises(AllClientsFailed):
        run(strategy(give_up_after=1, **arguments), rounds=2, configs=configs)
    for config in configs:
        with Ledger.open(
            config["ledger-path"], dataset="phone", delta=DELTA, relation="replace-one"
        ) as ledger:
            assert ledger.epsilon() <= 4.0


def test_a_node_that_forgets_in_the_middle_is_charged_for_both_lives():
    answers = {}

    def forgetful(received, ctx):
        forgets = answers.setdefault(ctx.node_id, 0) == 2 and ctx.node_config["partition-id"] == 0
        answers[ctx.node_id] += 1
        if forgets:
            ctx.state.clear()
        return phones()(received, ctx)

    result = run(strategy(), forgetful, rounds=4)
    claims = result.node_privacy.claims
    spent = epsilon([Composed(Gaussian(2.0), 4)], delta=DELTA, relation="replace-one")
    assert [c.epsilon for c in claims.values()] == pytest.approx([spent] * NODES, rel=1e-3)


def test_a_budget_that_no_run_can_keep_to_is_refused_before_anybody_is_asked():
    asked = []
    arguments = {"delta": None, "noise_multiplier": None}
    for epsilon_, changes, said in (
        (1e-4, {}, r"^epsilon=0.0001 over num_rounds=2 rounds asks for more noise .*: raise"),
        (1.0, {"noise_multiplier": 1.0}, r"noise_multiplier=1.0 .* not one round fits"),
    ):
        budget = PrivacyBudget(epsilon_, DELTA, "node", "replace-one")
        it = strategy(**(arguments | {"budget": budget} | changes))
        with pytest.raises(ValueError, match=said):
            run(it, phones(), rounds=2, fault=asked.append)
    assert asked == []


def test_too_few_nodes_are_called_nodes_and_no_population():
    with pytest.raises(ValueError, match=r"min_cohort=5 .* needs at least 5 nodes, and there are"):
        strategy(secure_aggregation=SecAggPlus(min_cohort=5))
    with pytest.raises(ValueError, match=r"threshold=4 must be < 4, the nodes"):
        strategy(secure_aggregation=SecAggPlus(threshold=4))


def test_a_budget_that_does_not_pay_for_all_rounds_ends_the_run():
    budget = PrivacyBudget(4.0, DELTA, "node", "replace-one")
    result = run(strategy(budget=budget, noise_multiplier=3.0, delta=None), rounds=9)
    assert result.stopped is Stopped.BUDGET_SPENT and 1 <= result.rounds < 9
    assert result.node_privacy.worst.epsilon <= 4.0
    more = [Composed(Gaussian(3.0), result.rounds + 1)]
    assert epsilon(more, delta=DELTA, relation="replace-one") > 4.0


# --- what one unit can do ----------------------------------------------------------------------


def sent(noise, size=11):
    content = {
        records.ARRAYS: record(np.zeros(size), names=["w"]),
        records.LOCAL: LocalRequest(noise=noise, dimension=size, server_round=1).to_config(),
    }
    return message("train", RecordDict(content))


hostile_units = st.tuples(
    st.sampled_from(UNIT_KINDS), st.integers(0, 2**31).map(lambda n: 2 * n + 1)
)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow],
)
@given(one=hostile_units, other=hostile_units, law=st.sampled_from(["gaussian", "laplace"]))
def test_replacing_a_node_moves_its_answer_by_at_most_what_is_charged(one, other, law):
    noise = LocalNoise(
        clip_norm=CLIP, rounds=1, delta=DELTA, noise_multiplier=1.5, law=law, max_inflation=1.1
    )
    answers = []
    with pytest.MonkeyPatch.context() as patch:
        for kind in (RoundedGaussian, RoundedLaplace):
            patch.setattr(kind, "sample", lambda self, n, rng: np.zeros(n, np.int64))
        for unit, seed in (one, other):
            values, _ = unit_arrays(unit, seed, "float64", 11, CLIP)
            update = np.concatenate([np.asarray(v, np.float64).ravel() for v in values])

            def train(received, ctx, update=update):
                del ctx
                content = RecordDict({"arrays": record(update, names=["w"])})
                return type(received)(content, reply_to=received)

            with np.errstate(all="ignore"), quiet():
                reply = local_noise_mod(dataset="x")(sent(noise), context(), train)
            answers.append(reply.content[records.INTEGER_SUM][records.SUM].numpy())
    moved = [int(q) for q in answers[0] - answers[1]]
    grid = noise.grid(11)
    if law == "gaussian":
        assert sum(q * q for q in moved) <= (2 * grid.sensitivity_units) ** 2
    else:
        assert sum(abs(q) for q in moved) <= 2 * grid.sensitivity_units
    assert grid.noise_units / grid.sensitivity_units >= 1.5


@pytest.mark.parametrize("law", ["gaussian", "laplace"])
@pytest.mark.parametrize("step", [1e9, math.nan, 0.3])
def test_one_user_moves_its_nodes_answer_by_at_most_one_clip_norm(law, step):
    noise = LocalNoise(
        clip_norm=CLIP, rounds=1, delta=DELTA, noise_multiplier=1.5, law=law, max_inflation=1.1,
        unit="user", relation="add-or-remove-one", sampling_rate=1.0,
    )  # fmt: skip
    answers = []
    with pytest.MonkeyPatch.context() as patch:
        for kind in (RoundedGaussian, RoundedLaplace):
            patch.setattr(kind, "sample", lambda self, n, rng: np.zeros(n, np.int64))
        for users in ({"a": 0.2, "b": step}, {"a": 0.2}):
            patch.setattr(app, "_cohorts", {})
            client = user_cohort_app(
                lambda ctx, users=users: UserCohort(
                    users,
                    local_update=lambda arrays, s: {n: a + s for n, a in arrays.items()},
                ),
                mods=[local_noise_mod(dataset="x")],
            )
            with np.errstate(all="ignore"):
                reply = client(sent(noise), context())
            answers.append(reply.content[records.INTEGER_SUM][records.SUM].numpy())
    moved = np.linalg.norm(answers[0] - answers[1], 2 if law == "gaussian" else 1)
    bound = noise.grid(11).sensitivity_units
    assert moved <= bound * (1 + 1e-12)
    assert math.isnan(step) == (moved == 0)


# --- on whose terms ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "terms",
    [
        {"min-noise-multiplier": 2.5},
        {"max-rounds": 1},
        {"max-epsilon": 1.0, "max-delta": 1e-4},
        {"max-epsilon": 100.0, "max-delta": 1e-6},
    ],
)
def test_a_node_takes_part_on_its_own_terms_only_and_charges_nothing_else(terms, tmp_path):
    configs = ledgers(tmp_path)
    configs[1] = {**configs[1], **terms}
    it = strategy(noise_multiplier=2.0)
    result = run(it, rounds=2, configs=configs)
    assert set(result.node_privacy.claims) == {1000, 1002, 1003}
    path = tmp_path / "1.jsonl"
    assert not path.exists() or '"charge"' not in path.read_text()


def test_a_node_within_its_terms_answers(tmp_path):
    terms = {"min-noise-multiplier": 2.0, "max-rounds": 2, "max-epsilon": 9.0, "max-delta": 1e-4}
    result = run(strategy(), rounds=2, configs=ledgers(tmp_path, **terms))
    assert len(result.node_privacy.claims) == NODES
    assert 4.0 < result.node_privacy.worst.epsilon <= 9.0


def test_a_limit_on_epsilon_needs_a_ledger_that_the_node_chose():
    with pytest.raises(AllClientsFailed):
        run(strategy(give_up_after=1), configs=[{"max-epsilon": 99.0, "max-delta": 0.1}] * NODES)


OWN = {"clip_norm": CLIP, "rounds": 2, "delta": DELTA, "noise_multiplier": 2.0}


def test_a_nodes_own_configuration_is_obeyed_where_the_server_asks_for_the_same():
    result = run(strategy(), phones(noise=LocalNoise(**OWN)), rounds=2)
    assert len(result.node_privacy.claims) == NODES


def test_a_target_of_the_nodes_own_is_the_same_where_the_server_has_that_budget():
    own = LocalNoise(**(OWN | {"noise_multiplier": None, "target_epsilon": 4.0}))
    budget = PrivacyBudget(4.0, DELTA, "node", "replace-one")
    it = strategy(budget=budget, noise_multiplier=None, delta=None)
    assert len(run(it, phones(noise=own), rounds=2).node_privacy.claims) == NODES


@pytest.mark.parametrize(
    "changes",
    [
        {"noise_multiplier": 2.1},
        {"clip_norm": 0.9},
        {"rounds": 3},
        {"delta": 1e-6},
        {"law": "laplace"},
        {"max_inflation": 1.1},
    ],
)
def test_a_request_that_differs_from_a_nodes_own_configuration_is_refused(changes):
    with pytest.raises(AllClientsFailed):
        run(strategy(give_up_after=1), phones(noise=LocalNoise(**(OWN | changes))), rounds=2)


def test_a_node_without_a_plan_of_its_own_answers_no_message_without_one():
    question = sent(LocalNoise(**OWN))
    del question.content[records.LOCAL]
    reply = phones()(question, context())
    assert reply.error.code == NodeErrorCode.POLICY_REFUSED


fields = st.one_of(
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.text(max_size=8),
    st.booleans(),
    st.binary(max_size=8),
    st.lists(st.integers(-9, 9), max_size=3),
)


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow],
)
@given(
    key=st.sampled_from([*sent(LocalNoise(**OWN)).content[records.LOCAL], "users", "seed"]),
    value=fields,
)
def test_whatever_a_request_says_the_answer_is_noised_or_a_code(key, value):
    question = sent(LocalNoise(**OWN))
    config = ConfigRecord({**question.content[records.LOCAL], key: value})
    question.content[records.LOCAL] = config
    with quiet():
        reply = phones(1e6)(question, context())
    if reply.has_error():
        assert reply.error.code in set(NodeErrorCode) - {NodeErrorCode.CLIENT_FAILED}
        return
    request = LocalRequest.from_config(config)
    integers = reply.content[records.INTEGER_SUM][records.SUM].numpy()
    claimed = [event_from_json(e) for e in json.loads(reply.content[records.PRIVACY]["events"])]
    assert claimed == [request.noise.event(request.noise.noise_multiplier)]
    bounded = request.open_sum().contribution([np.full(11, 1e6)])
    assert (integers != bounded).any()


# --- dropouts and errors -------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [Fault.SILENT, Fault.UNREACHABLE])
@pytest.mark.parametrize("gone", [1, 3])
def test_a_node_that_drops_out_makes_the_step_shorter_and_the_noise_no_larger(fault, gone):
    def missing(asked):
        return fault if asked.metadata.dst_node_id - 1000 < gone else None

    size = 80_000
    result = run(strategy(), phones(0.0), size=size, fault=missing)
    stated = 2.0 * CLIP * math.sqrt(NODES - gone) / NODES
    statistics.require_scale(flat(result), stated, allowance=0.01)
    assert len(result.node_privacy.claims) == NODES - gone
    it = strategy(noise_multiplier=0.001, max_inflation=1.1)
    released = flat(run(it, phones(0.1), fault=missing))
    np.testing.assert_allclose(released, 0.1 * (NODES - gone) / NODES, atol=0.01)


def test_where_nobody_answers_nothing_changes_and_the_run_fails():
    everyone = {"fault": lambda asked: Fault.SILENT}
    with pytest.raises(AllClientsFailed) as failed:
        run(strategy(give_up_after=2), rounds=5, **everyone)
    assert failed.value.result.stopped is Stopped.ALL_CLIENTS_FAILED
    result = run(strategy(give_up_after=None), rounds=2, **everyone)
    np.testing.assert_array_equal(flat(result), 0)
    assert not result.node_privacy.claims


def test_a_client_that_raises_is_a_dropout_and_its_text_stays():
    def raises(received, ctx):
        del ctx
        raise ValueError("patient 4711")

    reply = local_noise_mod(dataset="x")(sent(LocalNoise(**OWN)), context(), raises)
    assert reply.error.code == NodeErrorCode.CLIENT_FAILED
    assert "4711" not in reply.error.reason


EVENT = Gaussian(2.0)


def claim(**changes):
    spent = epsilon([EVENT], delta=DELTA, relation="replace-one")
    return ConfigRecord(
        {
            "epsilon": spent,
            "delta": DELTA,
            "unit": "node",
            "relation": "replace-one",
            "dataset": "phone",
            "durable": False,
            "events": events_to_json([EVENT]),
        }
        | changes
    )


def scripted(total=None, **changes):
    total = np.full(4, 7, np.int64) if total is None else total
    content = RecordDict({records.INTEGER_SUM: record(total, names=[records.SUM])})
    content[records.PRIVACY] = claim(**changes)
    return content


MALFORMED = {
    "too short": scripted(np.zeros(3, np.int64)),
    "floats": scripted(np.zeros(4)),
    "two-dimensional": scripted(np.zeros((2, 2), np.int64)),
    "larger than noise can make it": scripted(np.full(4, 2**40)),
    "weights": RecordDict({"arrays": record(np.ones(4)), records.PRIVACY: claim()}),
    "no claim": RecordDict({k: v for k, v in scripted().items() if k != records.PRIVACY}),
    "another unit": scripted(unit="user"),
    "another relation": scripted(relation="add-or-remove-one"),
    "another delta": scripted(delta=1e-3),
    "less noise than asked for": scripted(events=events_to_json([Gaussian(1.0)])),
    "nothing charged": scripted(events="[]"),
    "no json": scripted(events="["),
}


@pytest.mark.parametrize("kind", list(MALFORMED))
def test_what_is_not_as_asked_is_a_dropout(kind):
    def node(asked):
        return MALFORMED[kind] if asked.metadata.dst_node_id == 100 else scripted()

    it = strategy()
    with quiet():
        result = it.start(ScriptedGrid(node, NODES), record(np.zeros(4)), num_rounds=1)
    unit = it.noise.grid(4).unit_size(CLIP)
    np.testing.assert_allclose(result.arrays["a0"].numpy(), 7 * unit * (NODES - 1) / NODES)


def test_a_ledger_file_that_did_not_grow_covers_no_further_answer():
    answers = {}

    def node(asked):
        number = answers[asked.metadata.dst_node_id] = (
            answers.get(asked.metadata.dst_node_id, 0) + 1
        )
        grown = 1 if asked.metadata.dst_node_id == 100 else number
        return scripted(durable=True, events=events_to_json([Composed(EVENT, grown)]))

    it = strategy()
    with quiet():
        result = it.start(ScriptedGrid(node, NODES), record(np.zeros(4)), num_rounds=2)
    unit = it.noise.grid(4).unit_size(CLIP)
    np.testing.assert_allclose(result.arrays["a0"].numpy(), 7 * unit * (2 * NODES - 1) / NODES)


def test_an_answer_counts_once_from_whom_was_asked():
    def node(asked):
        return [scripted(), scripted(), scripted()]

    it = strategy()
    with quiet():
        result = it.start(ScriptedGrid(node, NODES), record(np.zeros(4)), num_rounds=1)
    np.testing.assert_allclose(result.arrays["a0"].numpy(), 7 * it.noise.grid(4).unit_size(CLIP))


# --- going on ----------------------------------------------------------------------------------


class Crash(RuntimeError):
    pass


def crash(server_round, arrays):
    del arrays
    if server_round == 2:
        raise Crash


def test_a_run_goes_on_from_its_checkpoint(tmp_path):
    def fresh(**changes):
        arguments = {
            "noise_multiplier": 0.001,
            "max_inflation": 1.1,
            "checkpoint_dir": tmp_path / "run",
            "server_optimizer": FedAvgM(lr=0.5, momentum=0.9),
        }
        return strategy(**(arguments | changes))

    with pytest.raises(Crash):
        run(fresh(), phones(0.01), rounds=3, evaluate_fn=crash)
    with pytest.raises(CheckpointError, match="clipping="):
        run(fresh(clipping=FixedClipping(2.0)), rounds=3)
    with pytest.raises(CheckpointError, match="request="):
        run(fresh(noise_multiplier=0.002), rounds=3)
    result = run(fresh(), phones(0.01), rounds=3)
    assert (
        result.rounds == json.loads((tmp_path / "run" / "state.json").read_text())["server_round"]
    )
    np.testing.assert_allclose(flat(result), 0.5 * 0.01 * (1 + 1.9 + 2.71), atol=0.01)
    again = run(fresh(), rounds=3)
    np.testing.assert_array_equal(flat(again), flat(result))  # the same bytes, nobody is asked
    assert run(fresh(), rounds=4).rounds == 4  # the noise was given: there may be more of it


def test_a_resumed_run_has_the_noise_and_the_claims_that_it_began_with(tmp_path):
    budget = PrivacyBudget(4.0, DELTA, "node", "replace-one")
    arguments = {"budget": budget, "noise_multiplier": None, "delta": None}
    with pytest.raises(Crash):
        run(strategy(checkpoint_dir=tmp_path, **arguments), rounds=3, evaluate_fn=crash)
    with pytest.raises(CheckpointError, match="num_rounds=4"):
        run(strategy(checkpoint_dir=tmp_path, **arguments), rounds=4)
    state = json.loads((tmp_path / "state.json").read_text())
    state["settings"]["noise_multiplier"] = "9.0"  # as if it had been calibrated otherwise
    begun = event_from_json(json.loads(state["claims"]["1000"]["events"])[0])
    (tmp_path / "state.json").write_text(json.dumps(state))
    it = strategy(checkpoint_dir=tmp_path, **arguments)
    result = run(it, rounds=3)
    assert it.noise.noise_multiplier == 9.0
    # Nodes without a ledger file forgot: what they claimed before the restart is added.
    spent = epsilon([begun, Gaussian(9.0)], delta=DELTA, relation="replace-one")
    assert begun.count == 2
    assert result.node_privacy.worst.epsilon == pytest.approx(spent, rel=1e-3)


# --- behind a shuffler -------------------------------------------------------------------------


@pytest.mark.parametrize("law", ["gaussian", "laplace"])
def test_shuffling_is_reported_beside_epsilon_and_never_in_it(law):
    nodes = 1000
    event = {"gaussian": Gaussian, "laplace": Laplace}[law](8.0)

    def node(asked):
        del asked
        return scripted(events=events_to_json([event]), epsilon=0.0)

    results = []
    for number, stated in ((NODES, None), (nodes, nodes)):
        it = strategy(
            noise=law, num_nodes=number, noise_multiplier=8.0, shuffled_reports=stated,
            max_inflation=1.1,
        )  # fmt: skip
        with quiet():
            results.append(it.start(ScriptedGrid(node, number), record(np.zeros(4)), num_rounds=1))
    plain, mixed = results
    assert plain.shuffled is None and "Shuffled" not in str(plain)
    assert mixed.node_privacy.worst.epsilon == plain.node_privacy.worst.epsilon
    assert str(mixed.node_privacy) in str(mixed)
    if law == "gaussian":
        expected = shuffled_gaussian_epsilon(8.0, reports=nodes, delta=DELTA)
    else:  # half of delta is set aside for what the samplers leave
        expected = shuffled_epsilon(2 / 8.0, reports=nodes, delta=DELTA / 2)
    assert mixed.shuffled.epsilon == pytest.approx(expected, rel=1e-9)
    assert mixed.shuffled.epsilon < mixed.node_privacy.worst.epsilon
    assert "no part of the epsilon" in str(mixed)


def test_no_more_reports_are_counted_as_mixed_than_came(tmp_path):
    def missing(asked):
        first = asked.content[records.CONFIG]["server-round"] == 1
        return Fault.SILENT if first and asked.metadata.dst_node_id == 1000 else None

    it = strategy(shuffled_reports=NODES, checkpoint_dir=tmp_path)
    assert run(it, rounds=1, fault=missing).shuffled.reports == NODES - 1
    it = strategy(shuffled_reports=NODES, checkpoint_dir=tmp_path)
    resumed = run(it, rounds=2).shuffled
    assert (resumed.reports, resumed.rounds) == (NODES - 1, 2)


def test_a_round_that_was_mixed_and_then_lost_in_a_crash_leaves_no_figure(tmp_path):
    def start(rounds, *, crashes=False, **changes):
        def node(asked):
            last = asked.metadata.dst_node_id == 100 + NODES - 1
            if crashes and last and asked.content[records.CONFIG]["server-round"] == 2:
                raise Crash  # the others have answered: their reports were seen
            return scripted()

        arguments = {"shuffled_reports": NODES, "checkpoint_dir": tmp_path} | changes
        it = strategy(**arguments)
        with quiet():
            return it.start(ScriptedGrid(node, NODES), record(np.zeros(4)), num_rounds=rounds)

    assert start(1).shuffled.rounds == 1
    with pytest.raises(Crash):
        start(3, crashes=True)
    assert start(3).shuffled is None
    with pytest.raises(CheckpointError, match="shuffled_reports=3"):
        start(4, shuffled_reports=3)


def test_reports_that_came_and_were_no_good_are_remembered_over_a_restart(tmp_path):
    def start(rounds, answer):
        it = strategy(shuffled_reports=NODES, checkpoint_dir=tmp_path, give_up_after=None)
        with quiet():
            grid = ScriptedGrid(lambda asked: answer, NODES)
            return it.start(grid, record(np.zeros(4)), num_rounds=rounds)

    start(1, MALFORMED["too short"])
    assert start(2, scripted()).shuffled is None


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"clipping": AdaptiveClipping()}, "must be FixedClipping"),
        ({"num_nodes": 0}, "num_nodes=0"),
        ({"noise_multiplier": 0.0}, "noise_multiplier=0.0"),
        ({"noise_multiplier": None}, "budget=None"),
        ({"noise": "skellam"}, "skellam"),
        ({"relation": "add-or-remove-one"}, "must be 'replace-one' for unit='node'"),
        (
            {"budget": PrivacyBudget(1.0, DELTA), "delta": None},
            "must be 'replace-one' for unit='node'",
        ),
        ({"sampling": PoissonSampling(2, 4)}, "the server sees who answers"),
        ({"unit": "user"}, "sampling=None"),
        ({"unit": "user", "sampling": CappedPoissonSampling(50, 200, 80)}, "only coins"),
        (
            {
                "unit": "user",
                "relation": "replace-one",
                "sampling": PoissonSampling(50, 200),
                "noise": "laplace",
            },
            "no valid price",
        ),
        ({"delta": 0.5}, "delta=0.5"),
        ({"give_up_after": 0}, "give_up_after=0"),
        ({"shuffled_reports": 0}, "shuffled_reports=0"),
        ({"shuffled_reports": 5}, "shuffled_reports=5 must be <= 4"),
        (
            {"unit": "user", "sampling": EveryoneSampling(200), "shuffled_reports": 4},
            "shuffled_reports=4 must be None",
        ),
    ],
)
def test_what_cannot_be_accounted_for_is_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        strategy(**changes)


def test_a_grid_too_coarse_for_the_noise_is_refused_before_anybody_is_asked():
    asked = []
    with pytest.raises(ValueError, match="finer grid"):
        run(strategy(noise="laplace"), size=10**6, fault=lambda m: asked.append(m))
    assert not asked


def test_rounds_cannot_be_skipped_or_repeated():
    it = strategy()
    with pytest.raises(RuntimeError, match="not running"):
        it.configure_train(1, record(np.zeros(2)), ConfigRecord(), None)
    with pytest.raises(RuntimeError, match="not configured"):
        it.aggregate_train(1, [])


def test_more_nodes_than_the_sum_is_divided_by_are_refused():
    with pytest.raises(ValueError, match="num_nodes=3 must be >= 4"):
        run(strategy(num_nodes=3))


def test_no_metric_is_asked_for():
    assert not list(strategy().configure_evaluate(1, record(np.zeros(2)), ConfigRecord(), None))
