import logging
import math

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Error, MetricRecord

from dpfl_flower.accounting import (
    BudgetExhausted,
    CappedPoissonSampling,
    CustomSampling,
    EveryoneSampling,
    FixedSizeSampling,
    Gaussian,
    Ledger,
    LedgerError,
    PoissonSampled,
    PoissonSampling,
    PrivacyBudget,
    calibrate,
    epsilon,
)
from dpfl_flower.clipping import AdaptiveClipping, FixedClipping
from dpfl_strategies import (
    AllClientsFailed,
    CheckpointError,
    DistributedDPFedAvg,
    DPFedAvg,
    FedAvgM,
    LocalDPFedAvg,
    NumExamplesWeighting,
    PopulationNotReached,
    PrivateStrategy,
    Stopped,
)
from tests.support.contracts import statistics
from tests.support.recording_grid import RecordingGrid, adding, config_of, record, reply

NODES = 8


def strategy(**changes):
    arguments = {
        "noise_multiplier": 1.0,
        "sampling": EveryoneSampling(NODES),
        "clipping": FixedClipping(1.0),
        "wait_seconds": 0.0,
    } | changes
    return DPFedAvg(**arguments)


def model(size=5):
    return record(np.zeros(size, np.float32))


def flat(arrays):
    return np.concatenate([a.numpy().ravel().astype(float) for a in arrays.values()])


# What it computes.


def test_without_noise_and_clip_it_is_fedavg():
    rng = np.random.default_rng(0)
    updates = rng.normal(size=(NODES, 5)).astype(np.float32)
    grid = RecordingGrid(adding(lambda m: updates[m.metadata.dst_node_id - 100]), NODES)
    free = strategy(noise_multiplier=0.0, clipping=FixedClipping(100.0))
    result = free.start(grid, model(), num_rounds=1)
    np.testing.assert_allclose(flat(result.arrays), updates.mean(axis=0), atol=100 / 2**24)
    assert result.privacy.epsilon == math.inf


def test_the_sum_is_divided_by_the_expected_cohort_never_by_who_answered():
    grid = RecordingGrid(
        lambda m: Error(2) if m.metadata.dst_node_id < 104 else adding(0.1)(m), NODES
    )
    result = strategy(noise_multiplier=0.0, clipping=FixedClipping(10.0)).start(grid, model(), 1)
    np.testing.assert_allclose(flat(result.arrays), 0.1 * 4 / NODES, rtol=1e-4)
    assert {m.metadata.dst_node_id for m in grid.pushed} == set(grid.node_ids)
    assert len(grid.pushed) == NODES


def test_each_update_is_clipped_over_all_arrays_together():
    grid = RecordingGrid(adding(3.0), NODES)
    start = record(np.zeros((2, 2), np.float32), np.float32(0).reshape(()), np.zeros(4))
    result = strategy(noise_multiplier=0.0).start(grid, start, num_rounds=1)
    assert np.linalg.norm(flat(result.arrays)) == pytest.approx(1.0, rel=1e-4)
    assert result.arrays["a1"].numpy().shape == ()
    assert result.arrays["a2"].numpy().dtype == np.float64


def test_weights_act_before_the_clip_and_the_divisor_is_public():
    grid = RecordingGrid(lambda m: reply(record(np.full(5, 0.1, np.float32)), 25), NODES)
    weighted = strategy(
        noise_multiplier=0.0,
        weighting=NumExamplesWeighting(w_max=100, mean_weight=0.5),
        clipping=FixedClipping(10.0),
    )
    result = weighted.start(grid, model(), num_rounds=1)
    np.testing.assert_allclose(flat(result.arrays), 0.1 * 0.25 / 0.5, rtol=1e-3)


def test_integer_arrays_stay_the_servers_own():
    grid = RecordingGrid(adding(1), NODES)
    start = record(np.zeros(2, np.float32), np.array(5, np.int64), np.array([True, False]))
    result = strategy().start(grid, start, num_rounds=2)
    assert result.arrays["a1"].numpy() == 5
    np.testing.assert_array_equal(result.arrays["a2"].numpy(), [True, False])


def test_the_noise_on_the_mean_has_the_stated_scale_and_a_wrong_one_would_be_seen():
    grid = RecordingGrid(adding(0.0), NODES)
    result = strategy(noise_multiplier=2.0, clipping=FixedClipping(0.5)).start(
        grid, model(100_000), num_rounds=1
    )
    # Of 100,000 draws a scale 3 % off is missed once in 2e13.
    statistics.require_scale(flat(result.arrays), 2.0 * 0.5 / NODES, allowance=0.001)


def test_an_empty_cohort_still_releases_noise_and_is_charged():
    grid = RecordingGrid(adding(0.0), NODES)
    nobody = strategy(sampling=PoissonSampling(1e-9, NODES), noise_multiplier=1.0)
    result = nobody.start(grid, model(), num_rounds=2)
    assert not grid.pushed
    assert np.all(flat(result.arrays) != 0)
    assert result.privacy.releases == 2


def test_adaptive_clipping_moves_the_clip_norm_by_the_released_fraction():
    adaptive = strategy(
        noise_multiplier=0.1,
        clipping=AdaptiveClipping(initial=1.0, quantile=0.5, learning_rate=0.2),
        sampling=EveryoneSampling(400),
    )
    grid = RecordingGrid(adding(10.0), 400)
    norms = []
    adaptive.start(
        grid, model(), num_rounds=3, evaluate_fn=lambda r, a: norms.append(adaptive.clip_norm)
    )
    # Every norm is far above: b~ is 0 and noise of 0.05, so log C moves by 0.2 * 0.5 a round; the
    # mean of three rounds has a standard error of 0.0058.
    moved = np.log(norms[-1] / norms[0]) / 3
    assert moved == pytest.approx(0.1, abs=6 * 0.0058)


# Budget and ledger.


def test_a_budget_fixes_the_noise_and_is_kept():
    budget = PrivacyBudget(epsilon=3.0, delta=1e-5)
    sampling = PoissonSampling(4, NODES)
    private = strategy(noise_multiplier=None, budget=budget, sampling=sampling)
    seen = []
    result = private.start(
        RecordingGrid(adding(0.0), NODES),
        model(),
        num_rounds=10,
        evaluate_fn=lambda r, a: seen.append(private.noise_multiplier),
    )
    events = [PoissonSampled(0.5, Gaussian(seen[-1]))] * 10
    independent = epsilon(events, delta=1e-5, relation=budget.relation)
    assert result.privacy.epsilon == pytest.approx(independent, rel=1e-6)
    assert 0.98 * 3 < result.privacy.epsilon <= 3.0
    assert result.stopped is Stopped.ALL_ROUNDS_DONE
    assert "this run only" in str(result.privacy)


def test_a_budget_that_asks_for_more_noise_than_integers_carry_is_named_with_its_way_out():
    short = strategy(noise_multiplier=None, budget=PrivacyBudget(epsilon=1e-4, delta=1e-5))
    with pytest.raises(ValueError, match=r"^epsilon=0.0001 over num_rounds=3 .*: raise") as said:
        short.start(RecordingGrid(adding(0.0), NODES), model(100), num_rounds=3)
    assert "needs a finer grid" in str(said.value.__cause__)
    given = strategy(noise_multiplier=1e5)  # no budget to blame
    with pytest.raises(ValueError, match=r"^noise_multiplier=100000.0 with dimension=100"):
        given.start(RecordingGrid(adding(0.0), NODES), model(100), num_rounds=3)


def test_a_multiplier_of_which_not_one_round_fits_the_budget_is_refused(tmp_path):
    path = tmp_path / "ledger.jsonl"
    budget = PrivacyBudget(epsilon=1.0, delta=1e-5)
    none = strategy(noise_multiplier=1.0, budget=budget, ledger=path)
    grid = RecordingGrid(adding(0.0), NODES)
    with pytest.raises(ValueError, match=r"noise_multiplier=1.0 .* not one round fits"):
        none.start(grid, model(), num_rounds=3)
    assert not grid.pushed
    one = strategy(noise_multiplier=4.0, budget=budget, ledger=path)  # and the ledger is usable
    assert one.start(grid, model(), num_rounds=3).rounds == 1


def test_a_run_that_a_spent_ledger_leaves_no_round_says_so_first(caplog):
    budget = PrivacyBudget(epsilon=1.0, delta=1e-5)
    private = strategy(noise_multiplier=4.0, budget=budget)
    private.start(RecordingGrid(adding(0.0), NODES), model(), num_rounds=1)
    result = private.start(RecordingGrid(adding(0.0), NODES), model(), num_rounds=3)
    assert (result.rounds, result.stopped) == (0, Stopped.BUDGET_SPENT)
    (said,) = [one for one in caplog.records if one.levelname == "ERROR"]
    assert said.getMessage().startswith(
        "NO ROUND WAS RUN, the model is the one this run began with"
    )


def test_a_budget_that_runs_out_ends_the_run_with_the_last_model(caplog):
    caplog.set_level(logging.INFO, logger="flwr.dpfl")
    budget = PrivacyBudget(epsilon=2.0, delta=1e-5)
    grid = RecordingGrid(adding(0.0), NODES)
    result = strategy(noise_multiplier=4.0, budget=budget).start(grid, model(), num_rounds=100)
    assert result.stopped is Stopped.BUDGET_SPENT
    assert 1 <= result.rounds < 100
    assert result.privacy.epsilon <= 2.0
    one_more = [Gaussian(4.0)] * (result.rounds + 1)
    assert epsilon(one_more, delta=1e-5, relation=budget.relation) > 2.0
    assert len(grid.pushed) == result.rounds * NODES
    assert "budget does not allow" in caplog.text


def test_two_models_on_one_data_set_share_its_budget(tmp_path):
    budget = PrivacyBudget(epsilon=2.0, delta=1e-5)
    shared = {"budget": budget, "ledger": tmp_path / "ledger.jsonl", "dataset": "shop"}
    first = strategy(**shared | {"noise_multiplier": 8.0})
    spent = first.start(RecordingGrid(adding(0.0), NODES), model(), num_rounds=4).privacy
    second = strategy(**shared | {"noise_multiplier": None})
    result = second.start(RecordingGrid(adding(0.0), NODES), model(), num_rounds=4)
    assert spent.epsilon < result.privacy.epsilon <= 2.0
    assert result.privacy.releases == 8
    assert result.stopped is Stopped.ALL_ROUNDS_DONE
    assert "this run only" not in str(result.privacy)


def test_the_ledger_of_another_data_set_is_refused(tmp_path):
    path = tmp_path / "ledger.jsonl"
    strategy(ledger=path, dataset="a").start(RecordingGrid(adding(0.0), NODES), model(), 1)
    with pytest.raises(LedgerError, match=r"begun with dataset='a', .* go on with 'b'"):
        strategy(ledger=path, dataset="b").start(RecordingGrid(adding(0.0), NODES), model(), 1)


def test_seeded_noise_is_reproducible_and_claims_nothing(tmp_path):
    runs = [
        strategy(noise_seed=7).start(RecordingGrid(adding(0.0), NODES), model(), 2)
        for _ in range(2)
    ]
    np.testing.assert_array_equal(flat(runs[0].arrays), flat(runs[1].arrays))
    assert runs[0].privacy is None
    assert "none is claimed" in repr(runs[0])
    for forbidden in ("ledger", "checkpoint_dir"):
        with pytest.raises(ValueError, match="noise_seed=7"):
            strategy(noise_seed=7, **{forbidden: tmp_path / "x"})


# Resuming.


def test_a_finished_part_is_released_again_for_free_and_the_run_goes_on(tmp_path):
    def parts():
        return strategy(checkpoint_dir=tmp_path, server_optimizer=FedAvgM(momentum=0.5))

    first = parts().start(RecordingGrid(adding(0.1), NODES), model(), num_rounds=3)
    again = parts().start(RecordingGrid(adding(0.1), NODES), model(), num_rounds=3)
    np.testing.assert_array_equal(flat(first.arrays), flat(again.arrays))
    assert again.privacy.releases == 3
    grid = RecordingGrid(adding(0.1), NODES)
    last = parts().start(grid, model(), num_rounds=5)
    assert last.rounds == 5
    assert last.privacy.releases == 5
    assert [config_of(m)["server-round"] for m in grid.pushed[::NODES]] == [4, 5]
    np.testing.assert_array_equal(flat(grid.pushed[0].content["arrays"]), flat(first.arrays))


def test_a_resumed_run_must_be_the_same_run(tmp_path):
    strategy(checkpoint_dir=tmp_path).start(RecordingGrid(adding(0.1), NODES), model(), 1)
    for change in (
        {"clipping": FixedClipping(2.0)},
        {"noise_multiplier": 3.0},
        {"sampling": PoissonSampling(4, NODES)},
        {"server_optimizer": FedAvgM()},
    ):
        with pytest.raises((CheckpointError, LedgerError), match="must be"):
            strategy(checkpoint_dir=tmp_path, **change).start(
                RecordingGrid(adding(0.1), NODES), model(), 2
            )
    with pytest.raises(ValueError, match="a0"):
        strategy(checkpoint_dir=tmp_path).start(RecordingGrid(adding(0.1), NODES), model(9), 2)


def test_a_ledger_older_than_the_checkpoint_is_refused(tmp_path):
    ledger = tmp_path / "ledger.jsonl"
    arguments = {"checkpoint_dir": tmp_path / "c", "ledger": ledger}
    strategy(**arguments).start(RecordingGrid(adding(0.1), NODES), model(), 1)
    old = {path: path.read_bytes() for path in tmp_path.glob("ledger*")}
    strategy(**arguments).start(RecordingGrid(adding(0.1), NODES), model(), 2)
    for path, content in old.items():
        path.write_bytes(content)
    with pytest.raises(LedgerError):
        strategy(**arguments).start(RecordingGrid(adding(0.1), NODES), model(), 3)


def test_a_second_run_on_the_same_ledger_at_the_same_time_is_refused(tmp_path):
    path = tmp_path / "ledger.jsonl"
    first, second = strategy(ledger=path), strategy(ledger=path)
    first.prepare(model(), 1)
    with pytest.raises(LedgerError):
        second.prepare(model(), 1)
    with pytest.raises(RuntimeError, match="already running"):
        first.prepare(model(), 1)
    first.close()
    second.prepare(model(), 1)
    second.close()


# How much of what was released is signal.


@pytest.mark.parametrize("adaptive", [False, True])
def test_each_round_tells_the_power_of_the_signal_from_released_values_and_known_noise(
    adaptive, caplog
):
    # 8 nodes that move d entries by x each, noise z C / 8: power 64 x^2 / (z C)^2, estimated with a
    # standard deviation of sqrt(2 + 4 power) / sqrt(d); 8 of them are allowed for.
    size, noise = 40_000, 0.02
    clipping = AdaptiveClipping(initial=10.0) if adaptive else FixedClipping(10.0)
    for x, expected in ((0.025, 1.0), (0.0025, 0.01), (0.0, 0.0)):
        private = strategy(noise_multiplier=noise, clipping=clipping)
        with caplog.at_level(logging.INFO, logger="flwr.dpfl"):
            result = private.start(RecordingGrid(adding(x), NODES), model(size), num_rounds=1)
        tolerance = 8 * math.sqrt((2 + 4 * expected) / size)
        assert result.signal_to_noise[1] == pytest.approx(expected, abs=tolerance + 0.02 * expected)
        assert f"signal-to-noise {result.signal_to_noise[1]:.2g}, about" in caplog.text
        # From what was released alone: anybody who sees the model can tell as much, but for the
        # 1 % by which rounding may enlarge the noise.
        released = flat(result.arrays)
        again = max(0.0, released @ released / size / (noise * 10.0 / NODES) ** 2 - 1)
        assert result.signal_to_noise[1] == pytest.approx(again, rel=0.02, abs=0.03)


def test_without_noise_there_is_nothing_to_compare_the_signal_with():
    result = strategy(noise_multiplier=0.0).start(RecordingGrid(adding(0.1), NODES), model(), 2)
    assert result.signal_to_noise == {1: math.inf, 2: math.inf}


# Dropouts and failures.


def test_a_ledger_with_a_sliver_left_says_how_little(tmp_path):
    budget = PrivacyBudget(epsilon=2.0, delta=1e-5)
    for share, about in ((0.9999, "0.000"), (0.995, "0.01")):
        path = tmp_path / f"{share}.jsonl"
        multiplier = calibrate(PrivacyBudget(2.0 * share, 1e-5), None, rounds=1)
        first = strategy(noise_multiplier=multiplier, budget=budget, ledger=path)
        first.start(RecordingGrid(adding(0.1), NODES), model(), 1)
        before = path.read_bytes()
        second = strategy(noise_multiplier=None, budget=budget, ledger=path)
        with pytest.raises(BudgetExhausted, match=f"leaves about epsilon {about}.* of 2") as said:
            second.start(RecordingGrid(adding(0.1), NODES), model(), 5)
        assert "num_rounds=5" in str(said.value)
        assert path.read_bytes() == before


def test_a_budget_that_was_always_too_small_is_no_matter_of_the_ledger():
    tiny = PrivacyBudget(epsilon=1e-6, delta=1e-5)
    with pytest.raises(ValueError, match=r"^epsilon=1e-06 over .* asks for more noise"):
        strategy(noise_multiplier=None, budget=tiny).start(
            RecordingGrid(adding(0.1), NODES), model(), 5
        )


def test_a_run_that_gives_up_hands_over_what_it_had_released_and_spent(tmp_path):
    def fails_later(message):
        return adding(0.5)(message) if config_of(message)["server-round"] == 1 else Error(2)

    private = strategy(ledger=tmp_path / "ledger.jsonl", give_up_after=2)
    grid = RecordingGrid(fails_later, NODES)
    with pytest.raises(AllClientsFailed) as failed:
        private.start(grid, model(), num_rounds=9)
    result = failed.value.result
    assert (result.rounds, result.stopped) == (3, Stopped.ALL_CLIENTS_FAILED)
    sent = config_of(grid.pushed[-1])["server-round"]
    assert sent == 3
    assert not np.array_equal(flat(result.arrays), flat(grid.pushed[-1].content["arrays"]))
    expected = epsilon([Gaussian(1.0)] * 3, delta=1e-5, relation="add-or-remove-one")
    assert result.privacy.epsilon == pytest.approx(expected, rel=1e-3)
    assert set(result.signal_to_noise) == {1, 2, 3}


def test_when_everybody_fails_it_is_an_error_and_the_ledger_is_let_go(tmp_path):
    path = tmp_path / "ledger.jsonl"
    for client in (lambda m: Error(2), lambda m: None, lambda m: reply(ArrayRecord())):
        grid = RecordingGrid(client, NODES)
        with pytest.raises(AllClientsFailed, match="3 rounds in a row"):
            strategy(ledger=path).start(grid, model(), num_rounds=10)
        with pytest.raises(AllClientsFailed, match="in this run failed"):
            strategy(ledger=path).start(grid, model(), num_rounds=1)
    with Ledger.open(
        path, dataset="default", delta=1e-5, unit="node", relation="add-or-remove-one"
    ) as ledger:
        assert ledger.epsilon() > 0
    patient = strategy(give_up_after=None)
    assert patient.start(RecordingGrid(lambda m: Error(2), NODES), model(), 4).rounds == 4


def test_one_answer_in_between_is_patience_enough():
    rounds = iter([False, False, True, False, False, True])
    now = {"answers": False}

    def client(message):
        if message.metadata.dst_node_id == 100:
            now["answers"] = next(rounds)
        return adding(0.0)(message) if now["answers"] else Error(2)

    assert strategy().start(RecordingGrid(client, NODES), model(), 6).rounds == 6


def test_rounds_are_configured_then_aggregated_once():
    grid = RecordingGrid(adding(0.0), NODES)
    lone = strategy()
    with pytest.raises(RuntimeError, match="no plan yet"):
        lone.configure_train(1, model(), ConfigRecord(), grid)
    arrays = lone.prepare(model(), 2)
    with pytest.raises(RuntimeError, match="no open cohort"):
        lone.aggregate_train(1, [])
    replies = grid.send_and_receive(lone.configure_train(1, arrays, ConfigRecord(), grid))
    released, metrics = lone.aggregate_train(1, replies)
    assert metrics is None
    with pytest.raises(RuntimeError, match="no open cohort"):
        lone.aggregate_train(1, replies)
    assert released is not None
    lone.close()


def test_too_few_nodes_are_an_error_before_anyone_is_asked():
    grid = RecordingGrid(adding(0.0), 3)
    with pytest.raises(PopulationNotReached, match=f"population={NODES}"):
        strategy().start(grid, model(), 1)
    assert not grid.pushed


# Metrics.


def loss_client(message):
    if message.metadata.message_type == "evaluate":
        content = reply(ArrayRecord(), 3, loss=4.0)
        del content["arrays"]
        return content
    return reply(message.content["arrays"], 1, loss=2.0)


def test_client_metrics_are_dropped_by_default():
    grid = RecordingGrid(loss_client, NODES)
    result = strategy().start(grid, model(), 1)
    assert not result.train_metrics_clientapp
    assert not result.evaluate_metrics_clientapp
    assert {m.metadata.message_type for m in grid.pushed} == {"train"}


def test_client_metrics_pass_only_under_a_name_that_says_what_they_are():
    grid = RecordingGrid(loss_client, NODES)
    result = strategy(metrics="not_private", fraction_evaluate=0.5).start(grid, model(), 1)
    assert dict(result.train_metrics_clientapp[1]) == {"not_private/loss": 2.0}
    assert dict(result.evaluate_metrics_clientapp[1]) == {"not_private/loss": 4.0}
    assert sum(m.metadata.message_type == "evaluate" for m in grid.pushed) == NODES // 2
    with pytest.raises(ValueError, match="train_metrics_aggr_fn"):
        strategy(train_metrics_aggr_fn=lambda contents, key: MetricRecord())


# Arguments.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise_multiplier": None}, "budget=None and noise_multiplier=None"),
        ({"noise_multiplier": -1.0}, r"noise_multiplier=-1\.0"),
        ({"delta": 0.5}, r"delta=0\.5 must be < 1/population"),
        ({"delta": 0.0}, r"delta=0\.0"),
        ({"budget": PrivacyBudget(1.0, 0.2)}, r"delta=0\.2 must be < 1/population"),
        ({"budget": PrivacyBudget(1.0, 1e-5), "delta": 1e-6}, "must be the budget's own"),
        ({"sampling": FixedSizeSampling(2, NODES)}, "relation='add-or-remove-one'"),
        ({"unit": "hospital"}, "hospital"),
        ({"metrics": "private"}, "private"),
        ({"fraction_evaluate": 0.0}, r"fraction_evaluate=0\.0"),
        ({"give_up_after": 0}, "give_up_after=0"),
        ({"wait_seconds": -1.0}, r"wait_seconds=-1\.0"),
        ({"max_inflation": 0.0}, r"max_inflation=0\.0"),
    ],
)
def test_bad_arguments_are_refused_by_name_and_bound(changes, message):
    with pytest.raises(ValueError, match=message):
        strategy(**changes)


def test_num_rounds_and_models_are_checked():
    grid = RecordingGrid(adding(0.0), NODES)
    with pytest.raises(ValueError, match="num_rounds=0"):
        strategy().start(grid, model(), num_rounds=0)
    with pytest.raises(ValueError):
        strategy().start(grid, record(np.zeros(3, np.int64)), 1)


def test_default_delta_is_below_one_over_the_population():
    result = strategy(sampling=EveryoneSampling(20_000_000), wait_seconds=0.0)
    assert result._plan.request.delta < 1 / 20_000_000


def test_every_sampling_can_be_used():
    for sampling, changes in (
        (CappedPoissonSampling(4, NODES, 6), {}),
        (FixedSizeSampling(4, NODES), {"relation": "replace-one"}),
    ):
        grid = RecordingGrid(adding(0.0), NODES)
        result = strategy(sampling=sampling, **changes).start(grid, model(), 3)
        assert 0 < result.privacy.epsilon < math.inf


def test_the_private_pipeline_cannot_be_overridden_by_accident():
    for name in PrivateStrategy._PIPELINE:
        with pytest.raises(TypeError, match=name):
            type("Mine", (DPFedAvg,), {name: lambda self: None})


@pytest.mark.parametrize("base", [DistributedDPFedAvg, LocalDPFedAvg])
def test_what_other_strategies_would_not_call_cannot_be_overridden_either(base):
    for name in ("weigh", "apply_noisy_mean", "configure_train", "aggregate_train", "start"):
        with pytest.raises(TypeError, match=f"Mine.{name}.*server_optimizer="):
            type("Mine", (base,), {name: lambda self: None})
        mixin = type("Mixin", (), {name: lambda self: None})
        with pytest.raises(TypeError, match=f"Mine.{name}"):
            type("Mine", (mixin, base), {})
    assert issubclass(type("Mine", (base,), {"more": 1}), base)


@pytest.mark.parametrize(
    ("weigh", "error"),
    [(lambda n: n + 1, ValueError), (lambda n: undefined + n, NameError)],  # noqa: F821
)
def test_a_mistake_in_weigh_is_told_before_anything_is_charged(weigh, error, tmp_path):
    mistaken = type("Mistaken", (DPFedAvg,), {"weigh": lambda self, n: weigh(n)})
    it = mistaken(
        noise_multiplier=1.0,
        sampling=EveryoneSampling(NODES),
        clipping=FixedClipping(1.0),
        ledger=tmp_path / "ledger",
    )
    with pytest.raises(error, match=r"weigh\(1.0\)|undefined"):
        it.start(RecordingGrid(adding(0.2), NODES), model(), num_rounds=1)
    assert not (tmp_path / "ledger").exists()


@pytest.mark.parametrize(
    ("stepped", "said"),
    [(None, "returned NoneType"), (np.zeros(3), r"returned shape \(3,\).*of shape \(\d+,\)")],
)
def test_an_applied_mean_that_is_no_model_is_named(stepped, said):
    class Wrong(DPFedAvg):
        def apply_noisy_mean(self, model, mean_update, server_round):
            return stepped

    it = Wrong(noise_multiplier=1.0, sampling=EveryoneSampling(NODES), clipping=FixedClipping(1.0))
    with pytest.raises(TypeError, match=f"Wrong.apply_noisy_mean {said}"):
        it.start(RecordingGrid(adding(0.2), NODES), model(), num_rounds=1)


def test_a_model_that_is_no_longer_finite_is_warned_of(caplog):
    class Lost(DPFedAvg):
        def apply_noisy_mean(self, model, mean_update, server_round):
            return model * np.nan

    it = Lost(noise_multiplier=1.0, sampling=EveryoneSampling(NODES), clipping=FixedClipping(1.0))
    it.start(RecordingGrid(adding(0.2), NODES), model(), num_rounds=1)
    assert "The model of round 1 is not finite" in caplog.text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"clipping": 0.5}, "FixedClipping"),
        ({"sampling": 4}, r"PoissonSampling\(expected_cohort, population\)"),
        ({"secure_aggregation": True}, "SecAggPlus"),
    ],
)
def test_an_argument_of_another_kind_is_told_what_to_be(changes, said):
    with pytest.raises(ValueError, match=f"{next(iter(changes))}=.* must be .*{said}"):
        strategy(**changes)


def test_a_subclass_may_say_how_the_noisy_mean_is_applied():
    class Half(DPFedAvg):
        def apply_noisy_mean(self, model, mean_update, server_round):
            return model + mean_update / 2

    grid = RecordingGrid(adding(0.2), NODES)
    half = Half(
        noise_multiplier=0.0,
        sampling=EveryoneSampling(NODES),
        clipping=FixedClipping(10.0),
    )
    result = half.start(grid, model(), num_rounds=1)
    np.testing.assert_allclose(flat(result.arrays), 0.1, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"clipping": 0.5}, "clipping=0.5"),
        ({"clipping": None}, "clipping=None"),
        ({"sampling": 5}, "sampling=5"),
        ({"budget": (8, 1e-5), "noise_multiplier": None}, r"budget=\(8, 1e-05\)"),
        ({"weighting": "n"}, "weighting='n'"),
        ({"server_optimizer": "fedadam"}, "server_optimizer='fedadam'"),
        ({"ledger": 5}, "ledger=5"),
        ({"checkpoint_dir": 5}, "checkpoint_dir=5"),
        ({"dataset": ""}, "dataset=''"),
        ({"max_inflation": 0.5}, "max_inflation=0.5"),
        ({"noise_seed": "a"}, "noise_seed='a'"),
        ({"unit": "foo"}, r"unit='foo' must be one of \['node', 'user', 'example'\]"),
        ({"relation": "foo"}, r"relation='foo' must be one of"),
        ({"metrics": "foo"}, r"metrics='foo' must be 'none', "),
        ({"rounding": "foo"}, r"rounding='foo' must be one of"),
        ({"give_up_after": 0}, "give_up_after=0"),
        ({"clipping": FixedClipping}, "clipping="),
    ],
)
def test_a_bad_argument_is_named_with_its_value(changes, named):
    with pytest.raises(ValueError, match=named):
        strategy(**changes)


def test_a_clip_norm_that_no_float_holds_is_refused():
    with pytest.raises(ValueError, match="clip_norm="):
        FixedClipping(10**400)


def test_a_model_that_is_no_numbers_is_refused_before_it_is_charged():
    start = record(np.array([0.0, math.nan]))
    with pytest.raises(ValueError, match=r"initial_arrays\['a0'\] must be finite"):
        strategy().start(RecordingGrid(adding(0.1), NODES), start, 1)


class Cyclic(CustomSampling):
    population = NODES
    expected_cohort = 2

    def draw(self, registry, rng):
        return list(registry)[:2]


def test_a_cohort_rule_of_ones_own_covers_units_that_stay_registered():
    with pytest.raises(ValueError, match=r"one of \['replace-one', 'zero-out'\], for which Cyclic"):
        strategy(sampling=Cyclic())
    result = strategy(sampling=Cyclic(), relation="zero-out").start(
        RecordingGrid(adding(0.1), NODES), model(), 1
    )
    assert "zero-out" in str(result.privacy)


def test_a_unit_inside_a_node_is_refused_where_the_node_is_what_is_clipped():
    with pytest.raises(ValueError, match=r"unit='example'.*num_nodes"):
        strategy(unit="example")
    # Not by relation='replace-one' either: delta would be held against the number of nodes.
    with pytest.raises(ValueError, match=r"unit='user' must be 'node'"):
        strategy(unit="user", relation="replace-one")
    strategy(unit="node", relation="replace-one")


def test_runs_of_one_strategy_share_its_budget_also_without_a_file():
    private = strategy(noise_multiplier=8.0, budget=PrivacyBudget(epsilon=2.0, delta=1e-5))
    first = private.start(RecordingGrid(adding(0.0), NODES), model(), 2)
    second = private.start(RecordingGrid(adding(0.0), NODES), model(), 2)
    assert (first.privacy.releases, second.privacy.releases) == (2, 4)
    assert second.privacy.epsilon > first.privacy.epsilon


def test_metrics_that_were_let_through_are_named_beside_epsilon():
    grid = RecordingGrid(loss_client, NODES)
    loud = strategy(metrics="not_private").start(grid, model(), 1)
    assert "NOT PRIVATE, and are not covered" in repr(loud)
    quiet = strategy().start(RecordingGrid(loss_client, NODES), model(), 1)
    assert "NOT PRIVATE" not in repr(quiet)


@pytest.mark.parametrize("bad", [lambda n: 1 / (n - n), lambda n: 47.11, lambda n: None])
def test_a_weight_that_fails_costs_its_unit_the_round_and_says_nothing(bad, caplog):
    caplog.set_level(logging.DEBUG)

    class Bad(DPFedAvg):
        def weigh(self, num_examples):
            return bad(num_examples) if num_examples == 4711 else 1.0

    private = Bad(
        noise_multiplier=0.0,
        sampling=EveryoneSampling(NODES),
        clipping=FixedClipping(10.0),
        wait_seconds=0.0,
    )

    def client(message):
        count = 4711 if message.metadata.dst_node_id == 100 else 1
        return reply(record(np.full(5, 0.1, np.float32)), count)

    result = private.start(RecordingGrid(client, NODES), model(), 1)
    np.testing.assert_allclose(flat(result.arrays), 0.1 * (NODES - 1) / NODES, rtol=1e-3)
    assert not any("47" in entry.getMessage() for entry in caplog.records)


def test_a_cohort_is_not_drawn_twice_for_one_round():
    grid = RecordingGrid(adding(0.0), NODES)
    private = strategy()
    arrays = private.prepare(model(), 2)
    private.configure_train(1, arrays, ConfigRecord(), grid)
    with pytest.raises(RuntimeError, match="not drawn again"):
        private.configure_train(1, arrays, ConfigRecord(), grid)
    private.close()
