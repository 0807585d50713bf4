import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpfl_flower.accounting import (
    CappedPoissonSampling,
    Composed,
    EveryoneSampling,
    FixedSizeSampling,
    Gaussian,
    Laplace,
    PoissonSampled,
    PoissonSampling,
    PrivacyBudget,
    Relation,
    UnsupportedEvent,
    affordable_rounds,
    cache,
    calibrate,
    calibrate_event,
    calibration,
    epsilon,
)

ADD_REMOVE, REPLACE = Relation.ADD_OR_REMOVE_ONE, Relation.REPLACE_ONE


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    monkeypatch.setenv("DPFL_CACHE", "0")


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """The cache, on, in a folder of its own."""
    monkeypatch.setenv("DPFL_CACHE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "dpfl-flower"


def cost(budget, event, rounds, prior=()):
    events = [*prior, Composed(event, rounds)]
    return epsilon(events, delta=budget.delta, relation=budget.relation)


@pytest.mark.parametrize(
    ("budget", "sampling", "rounds"),
    [
        (PrivacyBudget(2.0, 1e-6), PoissonSampling(1, 1000), 1500),
        (PrivacyBudget(8.0, 1e-5), PoissonSampling(100, 1000), 200),
        (PrivacyBudget(0.01, 1e-5), PoissonSampling(1, 1000), 1500),
        (PrivacyBudget(100.0, 1e-5), PoissonSampling(100, 1000), 200),
        (PrivacyBudget(1.0, 1e-5, relation=REPLACE), PoissonSampling(10, 1000), 50),
        (PrivacyBudget(2.0, 1e-6), CappedPoissonSampling(50, 1000, 80), 100),
        (PrivacyBudget(4.0, 1e-5, relation=REPLACE), FixedSizeSampling(10, 1000), 50),
        (PrivacyBudget(0.01, 1e-5), EveryoneSampling(10), 50),
        (PrivacyBudget(100.0, 1e-5), None, 1000),
    ],
)
def test_the_answer_spends_the_budget_and_no_more(budget, sampling, rounds):
    z = calibrate(budget, sampling, rounds)
    event = Gaussian(z) if sampling is None else sampling.event(Gaussian(z))
    spent = cost(budget, event, rounds)
    assert budget.epsilon * (1 - 1e-4) <= spent <= budget.epsilon
    assert affordable_rounds(budget, event, at_most=2 * rounds) >= rounds


def test_everyone_in_every_round_is_solved_exactly():
    z = calibrate(PrivacyBudget(1.0, 1e-5), EveryoneSampling(10), rounds=1)
    assert z == pytest.approx(3.7306, abs=3e-4)
    many = calibrate(PrivacyBudget(1.0, 1e-5), None, rounds=100)
    assert many == pytest.approx(10 * z, rel=1e-4)
    # Replacing moves a sum twice as far.
    twice = calibrate(PrivacyBudget(1.0, 1e-5, relation=REPLACE), None, rounds=1)
    assert twice == pytest.approx(2 * z, rel=1e-4)


def test_prior_releases_leave_less():
    budget, sampling = PrivacyBudget(2.0, 1e-5), PoissonSampling(50, 1000)
    prior = [Composed(sampling.event(Gaussian(2.0)), 50), Gaussian(10.0)]
    fresh = calibrate(budget, sampling, 50)
    after = calibrate(budget, sampling, 50, prior=prior)
    assert after > fresh
    spent = cost(budget, sampling.event(Gaussian(after)), 50, prior)
    assert 0.9999 * budget.epsilon <= spent <= budget.epsilon
    assert affordable_rounds(budget, sampling.event(Gaussian(after)), prior=prior) >= 50


def test_a_budget_that_prior_releases_used_up_is_refused():
    budget = PrivacyBudget(1.0, 1e-5)
    with pytest.raises(ValueError, match=r"prior events cost epsilon 4\.37.*< 1 "):
        calibrate(budget, None, 10, prior=[Gaussian(1.0)])
    assert affordable_rounds(budget, Gaussian(50.0), prior=[Gaussian(1.0)]) == 0


def test_a_sampling_without_a_price_is_refused():
    with pytest.raises(UnsupportedEvent, match="FixedSizeSampling"):
        calibrate(PrivacyBudget(1.0, 1e-5), FixedSizeSampling(10, 100), 5)


@pytest.mark.parametrize("rounds", [0, -1, 2.5])
def test_rounds_are_counted(rounds):
    with pytest.raises(ValueError, match="rounds="):
        calibrate(PrivacyBudget(1.0, 1e-5), None, rounds)


def test_events_of_any_shape_can_be_calibrated():
    # DP-SGD: 20 rounds of 5 local steps, and a Laplace count beside each round.
    budget = PrivacyBudget(1.0, 1e-4, unit="example")
    counts = Composed(Laplace(200.0), 20)
    steps = lambda z: Composed(Composed(PoissonSampled(0.05, Gaussian(z)), 5), 20)  # noqa: E731
    z = calibrate_event(steps, budget, prior=[counts])
    spent = epsilon([counts, steps(z)], delta=1e-4, relation=ADD_REMOVE)
    assert 0.9999 <= spent <= 1.0


def test_laplace_noise_can_be_calibrated():
    z = calibrate_event(Laplace, PrivacyBudget(0.5, 1e-9))
    assert z == pytest.approx(2.0, rel=2e-4)


def test_noise_that_no_multiplier_makes_enough_is_refused():
    stubborn = lambda z: Gaussian(1.0 + min(z, 0.01))  # noqa: E731
    with pytest.raises(ValueError, match="no noise multiplier"):
        calibrate_event(stubborn, PrivacyBudget(0.1, 1e-5))


def test_a_rate_below_delta_is_priced_by_coins_down_to_where_they_are_believed():
    # A unit joins with probability 1e-7 in all: epsilon 0 for nearly any noise at delta 1e-5.
    z = calibrate_event(lambda z: PoissonSampled(1e-7, Gaussian(z)), PrivacyBudget(1.0, 1e-5))
    event = PoissonSampled(1e-7, Gaussian(z))
    assert epsilon([event], delta=1e-5, relation=ADD_REMOVE) <= 1.0


@pytest.mark.parametrize(
    ("target", "rounds", "rate"), [(0.01, 300, 1.0), (100.0, 1, 1e-3), (3.0, 100, 0.05)]
)
def test_more_budget_needs_less_noise_and_more_rounds_need_more(target, rounds, rate):
    sampling = PoissonSampling(rate * 1000, 1000)

    def solve(target=target, rounds=rounds):
        return calibrate(PrivacyBudget(target, 1e-5), sampling, rounds)

    slack = 1 + 1e-3
    z = solve()
    assert cost(PrivacyBudget(target, 1e-5), sampling.event(Gaussian(z)), rounds) <= target
    assert solve(target=2 * target) <= z * slack
    assert solve(rounds=2 * rounds) >= z / slack


@settings(max_examples=4, deadline=None)
@given(st.floats(0.3, 8.0), st.floats(0.5, 5.0), st.floats(1e-3, 0.3))
def test_affordable_rounds_is_the_last_that_fits(target, z, rate):
    budget, event = PrivacyBudget(target, 1e-5), PoissonSampled(rate, Gaussian(z))
    n = affordable_rounds(budget, event, at_most=20_000)
    assert n == 0 or cost(budget, event, n) <= target
    assert n == 20_000 or cost(budget, event, n + 1) > target


def test_affordable_rounds_of_gaussians_are_exact():
    for target in (0.1, 1.0, 7.0, 50.0):
        budget = PrivacyBudget(target, 1e-6)
        n = affordable_rounds(budget, Gaussian(100.0))
        assert cost(budget, Gaussian(100.0), n) <= target < cost(budget, Gaussian(100.0), n + 1)


def test_affordable_rounds_stop_counting_where_asked():
    budget = PrivacyBudget(1.0, 1e-5)
    assert affordable_rounds(budget, Gaussian(1e6), at_most=7) == 7
    assert affordable_rounds(budget, Gaussian(0.0)) == 0
    assert affordable_rounds(budget, Gaussian(0.1)) == 0
    assert affordable_rounds(budget, Gaussian(1e9)) == 10_000_000
    with pytest.raises(ValueError, match="at_most=0"):
        affordable_rounds(budget, Gaussian(1.0), at_most=0)


def test_inexact_samplers_buy_fewer_rounds_and_need_more_noise():
    budget = PrivacyBudget(1.0, 1e-5)
    exact = affordable_rounds(budget, Gaussian(50.0))
    assert affordable_rounds(budget, Gaussian(50.0), total_variation=2e-6) < exact
    noisier = calibrate(budget, None, 100, total_variation=2e-6)
    assert noisier > calibrate(budget, None, 100)


# The cache.


class Solved(Exception):
    """The search ran, though the answer should have been known."""


@pytest.fixture
def solver_is_gone(monkeypatch):
    """Return a function after whose call no search succeeds."""

    def remove():
        def fail(*_, **__):
            raise Solved

        monkeypatch.setattr(calibration, "smallest_within", fail)
        monkeypatch.setattr(calibration, "largest_within", fail)

    return remove


BUDGET = PrivacyBudget(2.0, 1e-5)
SAMPLING = PoissonSampling(50, 1000)


def test_an_answer_is_looked_up_the_second_time(folder, solver_is_gone):
    z = calibrate(BUDGET, SAMPLING, 20, prior=[Gaussian(10.0)])
    n = affordable_rounds(BUDGET, Gaussian(10.0))
    assert len(list(folder.iterdir())) == 2
    solver_is_gone()
    assert calibrate(BUDGET, SAMPLING, 20, prior=[Gaussian(10.0)]) == z
    assert calibrate(BUDGET, PoissonSampling(50.0, 1000), 20, prior=[Gaussian(10)]) == z
    assert affordable_rounds(BUDGET, Gaussian(10.0)) == n
    for different in (
        lambda: calibrate(BUDGET, SAMPLING, 20),
        lambda: calibrate(BUDGET, SAMPLING, 21, prior=[Gaussian(10.0)]),
        lambda: calibrate(PrivacyBudget(2.1, 1e-5), SAMPLING, 20, prior=[Gaussian(10.0)]),
        lambda: calibrate(PrivacyBudget(2.0, 1e-6), SAMPLING, 20, prior=[Gaussian(10.0)]),
        lambda: affordable_rounds(BUDGET, Gaussian(10.0), at_most=5),
        lambda: affordable_rounds(BUDGET, Gaussian(11.0)),
        lambda: affordable_rounds(PrivacyBudget(2.0, 1e-5, relation=REPLACE), Gaussian(10.0)),
    ):
        with pytest.raises(Solved):
            different()


def test_zero_turns_the_cache_off(folder, monkeypatch, solver_is_gone):
    calibrate(BUDGET, None, 20)
    monkeypatch.setenv("DPFL_CACHE", "0")
    solver_is_gone()
    with pytest.raises(Solved):
        calibrate(BUDGET, None, 20)
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: "not json",
        lambda text: text[:-1],
        lambda text: "[]",
        lambda text: text.replace('"answer": ', '"answer": 1'),
        lambda text: json.dumps({**json.loads(text), "answer": 0.001}),
        lambda text: json.dumps({**json.loads(text), "answer": "NaN"}),
        lambda text: json.dumps({**json.loads(text), "event": None}),
    ],
)
def test_a_damaged_answer_is_solved_again(folder, damage):
    z = calibrate(BUDGET, None, 20)
    (file,) = folder.iterdir()
    whole = file.read_text()
    file.write_text(damage(whole))
    assert calibrate(BUDGET, None, 20) == z
    assert file.read_text() == whole


def test_an_answer_of_another_version_is_not_used(folder, monkeypatch, solver_is_gone):
    calibrate(BUDGET, None, 20)
    monkeypatch.setattr(cache, "versions", lambda: {"dp-accounting": "99"})
    solver_is_gone()
    with pytest.raises(Solved):
        calibrate(BUDGET, None, 20)


def test_an_answer_for_a_family_that_only_looks_the_same_is_not_used(folder):
    plain = calibrate_event(Gaussian, BUDGET)
    # Equal at both probes, different where it matters.
    sly = lambda z: Gaussian(z if z in (0.7182818, 3.1415926) else z / 2)  # noqa: E731
    assert calibrate_event(sly, BUDGET) == pytest.approx(2 * plain, rel=1e-3)


def test_a_cache_that_cannot_be_written_only_costs_time(monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("DPFL_CACHE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert calibrate(BUDGET, None, 20) > 0


def test_without_xdg_the_cache_is_below_home(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.directory() == tmp_path / ".cache" / "dpfl-flower"


def test_a_failed_search_leaves_nothing_behind(folder):
    with pytest.raises(ValueError, match="prior events"):
        calibrate(BUDGET, None, 20, prior=[Gaussian(0.0)])
    assert not folder.exists() or not list(folder.iterdir())


def test_an_answer_is_never_half_written(folder, monkeypatch):
    replace = Path.replace
    seen = []

    def watched(temporary, target):
        seen.append(json.loads(temporary.read_text())["answer"])  # whole before it has its name
        assert not target.exists()
        return replace(temporary, target)

    monkeypatch.setattr(Path, "replace", watched)
    assert seen == [] and [calibrate(BUDGET, None, 20)] == seen

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    calibrate(BUDGET, None, 21)
    assert [file.suffix for file in folder.iterdir()] == [".json"]
