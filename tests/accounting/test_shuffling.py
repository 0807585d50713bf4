import math

import numpy as np
import pytest
from scipy import stats

from dpfl_flower.accounting import (
    ShuffledStatement,
    shuffled_epsilon,
    shuffled_gaussian_epsilon,
)
from dpfl_flower.accounting.analytic import gaussian_delta, gaussian_epsilon


def true_delta(epsilon0, reports, epsilon):
    """Shuffled binary randomised response: exactly how far one reply of 1 shows among zeros."""
    truth = math.exp(epsilon0) / (1 + math.exp(epsilon0))
    others = stats.binom.pmf(np.arange(reports + 1), reports - 1, 1 - truth)
    shifted = np.concatenate([[0.0], others[:-1]])
    one, zero = (p * shifted + (1 - p) * others for p in (truth, 1 - truth))
    return max(
        np.maximum(a - math.exp(epsilon) * b, 0).sum() for a, b in ((one, zero), (zero, one))
    )


@pytest.mark.parametrize("epsilon0", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("reports", [2_000, 20_000])
def test_it_bounds_what_shuffling_really_hides(epsilon0, reports):
    delta = 1e-6
    stated = shuffled_epsilon(epsilon0, reports=reports, delta=delta)
    assert stated < epsilon0
    assert true_delta(epsilon0, reports, stated) <= delta
    # And not more than ten times as much: a tenth of it would be wrong.
    assert true_delta(epsilon0, reports, stated / 10) > delta


def test_where_the_theorem_does_not_hold_the_local_epsilon_stays():
    assert shuffled_epsilon(5.0, reports=1000, delta=1e-6) == 5.0
    assert shuffled_epsilon(5.0, reports=1000, delta=1e-6, rounds=3) == 15.0
    assert shuffled_epsilon(0.1, reports=1, delta=1e-6) == 0.1


def test_rounds_share_delta_and_add_up():
    once = shuffled_epsilon(1.0, reports=10**6, delta=1e-7)
    assert shuffled_epsilon(1.0, reports=10**6, delta=1e-6, rounds=10) == pytest.approx(10 * once)


@pytest.mark.parametrize(
    ("name", "value"),
    [("local_epsilon", 0.0), ("reports", 0), ("delta", 0.0), ("delta", 1.0), ("rounds", 0)],
)
def test_impossible_arguments_are_refused(name, value):
    arguments = {"local_epsilon": 1.0, "reports": 100, "delta": 1e-6, "rounds": 1, name: value}
    with pytest.raises(ValueError, match=f"{name}="):
        shuffled_epsilon(arguments.pop("local_epsilon"), **arguments)


def clones_delta(epsilon0, reports, epsilon):
    """Exactly how far the clones tell two data sets apart: all that the theorem's proof leaves.

    Of the other reports each is a clone with probability e^-e0, of either kind by a fair coin; the
    node's own is of the kind of its data set with odds e^e0 : 1. What is seen is how many there are
    of each kind. A window of 9 standard deviations leaves out less than 1e-17.
    """
    chance, odds = math.exp(-epsilon0), math.exp(epsilon0) / (1 + math.exp(epsilon0))
    mean, spread = reports * chance, 9 * math.sqrt(reports * chance) + 9
    total = 0.0
    for clones in range(max(0, int(mean - spread)), min(reports - 1, int(mean + spread)) + 1):
        kind = np.concatenate([[0.0], stats.binom.pmf(np.arange(clones + 1), clones, 0.5), [0.0]])
        one = odds * kind[:-1] + (1 - odds) * kind[1:]
        zero = (1 - odds) * kind[:-1] + odds * kind[1:]
        weight = stats.binom.pmf(clones, reports - 1, chance)
        total += weight * np.maximum(one - math.exp(epsilon) * zero, 0).sum()
    return total


@pytest.mark.parametrize("epsilon0", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("delta", [1e-4, 1e-8])
def test_the_closed_form_is_no_less_than_what_clones_hide(epsilon0, delta):
    reports = 4_000
    stated = shuffled_epsilon(epsilon0, reports=reports, delta=delta)
    assert stated < epsilon0
    assert clones_delta(epsilon0, reports, stated) <= delta
    assert clones_delta(epsilon0, reports, stated / 10) > delta


@pytest.mark.parametrize("mu", [0.3, 1.0])
@pytest.mark.parametrize("local", [0.5, 2.0, 3.5])
@pytest.mark.parametrize("other", [0.0, 0.3, 0.5, 1.0])
def test_a_gaussian_report_is_a_clone_but_for_the_distance_that_is_charged(mu, local, other):
    # The node's own report is centred at 0 or mu, another's anywhere between.
    x = np.linspace(-30, 30, 600_001)
    step = x[1] - x[0]
    p, q, law = (stats.norm.pdf(x, at) for at in (0.0, mu, other * mu))
    small = gaussian_delta(mu, local)
    short = np.maximum(math.exp(-local) * (p + q) / 2 - law, 0).sum() * step
    assert short <= math.exp(-local) * small * (1 + 1e-4) + 1e-15
    # The node's own two laws, cut to where they differ by a factor of e^local at most.
    moved = np.maximum(p - math.exp(local) * q, 0).sum() * step
    assert moved == pytest.approx(small, rel=1e-3, abs=1e-15)


def test_gaussian_reports_are_never_dearer_than_without_a_shuffler_and_never_free():
    for noise_multiplier in (0.5, 2.0, 8.0, 50.0):
        for reports in (1, 100, 10_000, 1_000_000):
            for rounds in (1, 10):
                stated = shuffled_gaussian_epsilon(
                    noise_multiplier, reports=reports, delta=1e-6, rounds=rounds
                )
                mu = 2 / noise_multiplier * math.sqrt(rounds)
                assert stated <= gaussian_epsilon(mu, 1e-6)
                # Whoever sees the reports can add them up: that much is seen for certain.
                assert stated >= gaussian_epsilon(mu / math.sqrt(reports), 1e-6)


def test_shuffled_gaussian_reports_hide_more_the_more_there_are():
    found = [
        shuffled_gaussian_epsilon(4.0, reports=n, delta=1e-6)
        for n in (10, 10_000, 100_000, 10_000_000)
    ]
    assert found[0] == pytest.approx(gaussian_epsilon(0.5, 1e-6))
    assert found[0] >= found[1] > found[2] > found[3]


def test_what_samplers_leave_is_charged_for_every_report():
    exact = shuffled_epsilon(1.0, reports=100_000, delta=1e-6)
    near = shuffled_epsilon(1.0, reports=100_000, delta=1e-6, total_variation=1e-30)
    assert exact < near < 1.1 * exact
    assert shuffled_epsilon(1.0, reports=100_000, delta=1e-6, total_variation=1e-11) == 1.0


@pytest.mark.parametrize("reports", [1, 100_000])
def test_no_figure_holds_whose_delta_does_not_cover_the_nodes_own_sampler(reports):
    arguments = {"reports": reports, "delta": 1e-6, "rounds": 2}
    for local, found in ((1.0, shuffled_epsilon), (2.0, shuffled_gaussian_epsilon)):
        assert found(local, **arguments, total_variation=1e-5) == math.inf
    alone = shuffled_gaussian_epsilon(2.0, reports=1, delta=1e-6, total_variation=1e-20)
    exact = gaussian_epsilon(1.0, 1e-6)
    assert exact < alone < exact * (1 + 1e-5)


def test_the_statement_says_what_it_is_not():
    said = str(ShuffledStatement(epsilon=0.5, delta=1e-6, reports=1000, rounds=3))
    assert "no part of the epsilon that nodes claim" in said and "1000 reports" in said
