"""Every golden value and every trap of accounting that this library stands on."""

import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting import rdp
from dp_accounting.pld import privacy_loss_distribution
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from dpfl_flower.accounting import (
    CappedPoissonSampled,
    Composed,
    FixedSizeSampled,
    Gaussian,
    Laplace,
    PoissonSampled,
    Relation,
    UnsupportedEvent,
    delta,
    epsilon,
    total_variation_delta,
)
from dpfl_flower.accounting import rdp as renyi
from dpfl_flower.accounting.accountant import Price
from dpfl_flower.accounting.analytic import gaussian_delta, gaussian_mu

ADD_REMOVE, REPLACE, ZERO_OUT = Relation.ADD_OR_REMOVE_ONE, Relation.REPLACE_ONE, Relation.ZERO_OUT
POISSON = [Composed(PoissonSampled(0.05, Gaussian(1.0)), 200)]
CAPPED = [Composed(CappedPoissonSampled(1000, 0.05, 60, 1.0), 200)]
FIXED = [Composed(FixedSizeSampled(1000, 50, Gaussian(1.0)), 200)]


# An accountant of the tests' own: privacy losses of densities on a fine grid of outputs, composed
# by FFT. Nothing of dp-accounting is in it. Mass is split between the two nearest losses, so that
# it is neither pessimistic nor optimistic.

STEP = 5e-4


def loss_distribution(upper, lower, reach=14.0, cells=200_000):
    """Return (offset, probabilities) of log(upper / lower) under upper, densities given."""
    edges = np.linspace(-reach, reach, cells + 1)
    x = (edges[1:] + edges[:-1]) / 2
    mass = upper(x) * (edges[1] - edges[0])
    loss = np.log(upper(x) / lower(x)) / STEP
    low = np.floor(loss).astype(int)
    share = loss - low
    offset = low.min()
    grid = np.zeros(low.max() - offset + 2)
    np.add.at(grid, low - offset, mass * (1 - share))
    np.add.at(grid, low - offset + 1, mass * share)
    return offset, grid


def divergence(distribution, times, size=2**19):
    """Return the composed losses and their probabilities."""
    offset, grid = distribution
    composed = np.fft.irfft(np.fft.rfft(grid, size) ** times, size)
    indices = np.arange(size)
    # The transform wraps around: read it as centred on the mean.
    centre = round(times * float((np.arange(len(grid)) * grid).sum()))
    indices = (indices - centre + size // 2) % size + centre - size // 2
    return (indices + times * offset) * STEP, composed


def integrated_epsilon(upper, lower, times, target):
    losses, probabilities = divergence(loss_distribution(upper, lower), times)

    def excess(value):
        above = losses > value
        return (probabilities[above] * -np.expm1(value - losses[above])).sum() - target

    return optimize.brentq(excess, 0, 60) if excess(0) > 0 else 0.0


def normal(mean, scale):
    return stats.norm(mean, scale).pdf


def mixture(rate, one, other):
    return lambda x: (1 - rate) * one(x) + rate * other(x)


def test_poisson_agrees_with_an_independent_integration():
    plain = normal(0, 1.0)
    with_unit = mixture(0.05, plain, normal(1, 1.0))
    removed = integrated_epsilon(with_unit, plain, 200, 1e-5)
    added = integrated_epsilon(plain, with_unit, 200, 1e-5)
    ours = epsilon(POISSON, delta=1e-5, relation=ADD_REMOVE)
    assert removed > added
    assert removed <= ours * (1 + 1e-5)
    assert ours == pytest.approx(removed, rel=2e-4)
    # The check has power: 3 % less noise is noticed.
    weaker = [Composed(PoissonSampled(0.05, Gaussian(0.97)), 200)]
    assert epsilon(weaker, delta=1e-5, relation=ADD_REMOVE) > 1.03 * removed


def test_poisson_under_replace_one_agrees_with_an_independent_integration():
    plain = normal(0, 1.0)
    upper, lower = mixture(0.05, plain, normal(1, 1.0)), mixture(0.05, plain, normal(-1, 1.0))
    independent = integrated_epsilon(upper, lower, 200, 1e-5)
    assert epsilon(POISSON, delta=1e-5, relation=REPLACE) == pytest.approx(independent, rel=2e-4)


def test_delta_agrees_with_an_independent_integration():
    plain = normal(0, 1.0)
    upper = mixture(0.05, plain, normal(1, 1.0))
    losses, probabilities = divergence(loss_distribution(upper, plain), 200)
    above = losses > 3.0
    independent = (probabilities[above] * -np.expm1(3.0 - losses[above])).sum()
    assert delta(POISSON, epsilon=3.0, relation=ADD_REMOVE) == pytest.approx(independent, rel=2e-3)


@pytest.mark.parametrize(
    ("events", "at", "relation", "golden"),
    [
        ([Composed(PoissonSampled(0.1, Gaussian(3.0)), 512)], 1e-6, ADD_REMOVE, 3.7697),
        (POISSON, 1e-5, ADD_REMOVE, 4.7659),
        (POISSON, 1e-5, ZERO_OUT, 4.7659),
        (POISSON, 1e-5, REPLACE, 7.107),
        (CAPPED, 1e-5, ADD_REMOVE, 11.008),
        ([Composed(CappedPoissonSampled(1000, 0.05, 80, 1.0), 200)], 1e-5, ADD_REMOVE, 4.806),
        ([Composed(CappedPoissonSampled(1000, 0.05, 100, 1.0), 200)], 1e-5, ADD_REMOVE, 4.7659),
        # The bound on the population is part of the price.
        ([Composed(CappedPoissonSampled(1200, 0.05, 80, 1.0), 200)], 1e-5, ADD_REMOVE, 7.0246),
        ([Composed(Gaussian(10.0), 100)], 1e-5, ADD_REMOVE, 4.3772),
        ([Composed(Gaussian(10.0), 100)], 1e-5, ZERO_OUT, 4.3772),
        ([Composed(Gaussian(10.0), 100)], 1e-5, REPLACE, 9.9973),
        (FIXED, 1e-5, REPLACE, 58.400),
        ([Gaussian(1.0)], 1e-5, ADD_REMOVE, 4.3772),
        ([Gaussian(1.0)], 1e-5, REPLACE, 9.9973),
        ([Laplace(1.0)], 1e-5, ADD_REMOVE, 1.0),
        ([Laplace(1.0)], 1e-5, REPLACE, 2.0),
        ([], 1e-5, REPLACE, 0.0),
    ],
)
def test_golden_values(events, at, relation, golden):
    assert epsilon(events, delta=at, relation=relation) == pytest.approx(golden, abs=6e-5, rel=5e-5)


def test_privacy_loss_distributions_beat_renyi_where_they_are_valid():
    event = dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(3.0))
    looser = rdp.RdpAccountant().compose(event, 512).get_epsilon(1e-6)
    assert looser == pytest.approx(4.051, abs=5e-4)
    event = dp_accounting.PoissonSampledDpEvent(0.05, dp_accounting.GaussianDpEvent(1.0))
    assert rdp.RdpAccountant().compose(event, 200).get_epsilon(1e-5) == pytest.approx(5.368, 1e-3)
    assert epsilon(POISSON, delta=1e-5, relation=ADD_REMOVE) < 5.368


def lower_bound_for_a_fixed_size(noise_multiplier, rounds):
    """Everyone else holds -1, one unit +1 or -1: what anyone can tell apart from sums of 50.

    The sum is shifted by 2 when the unit was drawn, by 0 else: a Poisson-sampled Gaussian with
    half the noise, whose epsilon is integrated here.
    """
    plain = normal(0, noise_multiplier)
    upper = mixture(0.05, plain, normal(2, noise_multiplier))
    return integrated_epsilon(upper, plain, rounds, 1e-5)


def test_a_fixed_size_needs_half_the_noise_multiplier_in_dp_accountings_renyi():
    event = dp_accounting.SampledWithoutReplacementDpEvent(
        1000, 50, dp_accounting.GaussianDpEvent(1.0)
    )
    naive = rdp.RdpAccountant(
        neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE
    ).compose(event, 200)
    assert naive.get_epsilon(1e-5) == pytest.approx(9.28, abs=0.01)
    attack = lower_bound_for_a_fixed_size(1.0, 200)
    assert naive.get_epsilon(1e-5) < attack  # so the naive price is no bound
    assert attack < epsilon(FIXED, delta=1e-5, relation=REPLACE)


def test_dp_accountings_renyi_forgets_that_replacing_moves_a_sum_twice():
    replace = dp_accounting.NeighboringRelation.REPLACE_ONE
    laplace = rdp.RdpAccountant(neighboring_relation=replace)
    laplace.compose(dp_accounting.LaplaceDpEvent(1.0))
    assert laplace.get_epsilon(1e-5) == pytest.approx(1.01, abs=0.01)  # the truth is 2
    gaussian = rdp.RdpAccountant(neighboring_relation=replace)
    gaussian.compose(dp_accounting.GaussianDpEvent(1.0))
    assert gaussian.get_epsilon(1e-5) == pytest.approx(4.73, abs=0.01)  # the truth is 9.997
    # Together with a fixed-size sample, both are priced by Rényi curves here: above the truth.
    tiny = FixedSizeSampled(10**9, 1, Gaussian(100.0))
    assert epsilon([Laplace(1.0), tiny], delta=1e-5, relation=REPLACE) >= 2.0
    assert epsilon([Gaussian(1.0), tiny], delta=1e-5, relation=REPLACE) >= 9.997


@pytest.mark.parametrize("relation", [ADD_REMOVE, ZERO_OUT])
@pytest.mark.parametrize("cohort", [50, 1000])
def test_a_fixed_size_is_refused_unless_units_are_replaced(relation, cohort):
    event = FixedSizeSampled(1000, cohort, Gaussian(1.0))
    for question in (
        lambda: epsilon([event], delta=1e-5, relation=relation),
        lambda: delta([event], epsilon=1.0, relation=relation),
    ):
        with pytest.raises(UnsupportedEvent, match=r"must be <Relation\.REPLACE_ONE"):
            question()


def test_a_sampled_laplace_has_no_price_when_units_are_replaced():
    event = PoissonSampled(0.1, Laplace(1.0))
    assert 0 < epsilon([event], delta=1e-5, relation=ADD_REMOVE) < 1
    with pytest.raises(UnsupportedEvent, match="no valid price"):
        epsilon([event], delta=1e-5, relation=REPLACE)


def test_a_fixed_size_of_everyone_is_no_sample():
    everyone = epsilon([FixedSizeSampled(50, 50, Gaussian(1.0))], delta=1e-5, relation=REPLACE)
    assert everyone == epsilon([Gaussian(1.0)], delta=1e-5, relation=REPLACE)


def test_a_rate_of_one_is_no_sample():
    event = PoissonSampled(1.0, Gaussian(1.0))
    assert epsilon([event], delta=1e-5, relation=ADD_REMOVE) == pytest.approx(4.3772, abs=1e-4)


def test_a_cap_that_cannot_bind_costs_nothing():
    capped = [Composed(CappedPoissonSampled(100, 0.05, 100, 1.0), 20)]
    plain = [Composed(PoissonSampled(0.05, Gaussian(1.0)), 20)]
    for relation in Relation:
        assert epsilon(capped, delta=1e-5, relation=relation) == epsilon(
            plain, delta=1e-5, relation=relation
        )


@pytest.mark.parametrize(
    "event",
    [
        Gaussian(0.0),
        Laplace(0.0),
        PoissonSampled(1e-9, Gaussian(0.0)),
        PoissonSampled(0.5, Laplace(0.0)),
        CappedPoissonSampled(100, 0.1, 20, 0.0),
        FixedSizeSampled(100, 10, Gaussian(0.0)),
    ],
)
def test_no_noise_is_no_privacy(event):
    relation = REPLACE if isinstance(event, FixedSizeSampled) else ADD_REMOVE
    assert epsilon([Gaussian(5.0), event], delta=1e-5, relation=relation) == math.inf
    assert delta([event], epsilon=5.0, relation=relation) == 1.0


def test_replacing_costs_a_gaussian_what_half_the_noise_costs():
    for z in (0.3, 1.0, 7.0):
        assert epsilon([Gaussian(z)], delta=1e-6, relation=REPLACE) == pytest.approx(
            epsilon([Gaussian(z / 2)], delta=1e-6, relation=ADD_REMOVE)
        )


def test_a_hundred_gaussians_are_one_of_a_tenth_the_noise():
    many = epsilon([Composed(Gaussian(10.0), 50)] * 2, delta=1e-5, relation=ADD_REMOVE)
    assert many == pytest.approx(epsilon([Gaussian(1.0)], delta=1e-5, relation=ADD_REMOVE))


def test_the_gaussian_is_exact():
    # Integrated: sup over sets is attained above the point where the loss is epsilon.
    upper, lower = stats.norm(1, 1), stats.norm(0, 1)
    for value in (0.0, 0.5, 2.0, 4.0):
        cut = value + 0.5
        exact = upper.sf(cut) - math.exp(value) * lower.sf(cut)
        assert gaussian_delta(1.0, value) == pytest.approx(exact, rel=1e-9)
        assert delta([Gaussian(1.0)], epsilon=value, relation=ADD_REMOVE) == pytest.approx(exact)


def test_the_classical_gaussian_is_not_used():
    assert 1 / gaussian_mu(1.0, 1e-5) == pytest.approx(3.7306, abs=1e-4)  # classical: 4.845
    assert dp_accounting.get_sigma_gaussian(1.0, 1e-5) == pytest.approx(3.7306, abs=1e-4)


def test_the_laplace_is_exact_and_doubles_when_units_are_replaced():
    # delta = 1 - e^((epsilon - 1/b) / 2) for neighbouring means one apart.
    assert epsilon([Laplace(1.0)], delta=1e-3, relation=ADD_REMOVE) == pytest.approx(
        1.0 + 2 * math.log1p(-1e-3), rel=1e-6
    )
    assert epsilon([Laplace(1.0)], delta=1e-3, relation=REPLACE) == pytest.approx(
        2.0 + 2 * math.log1p(-1e-3), rel=1e-6
    )


def test_one_coordinate_is_the_worst_case_of_a_laplace_vector():
    # An L1 change split over two coordinates is two releases at half the change each.
    for value in (0.0, 0.1, 0.5, 0.9):
        together = delta([Laplace(1.0)], epsilon=value, relation=ADD_REMOVE)
        split = delta([Composed(Laplace(2.0), 2)], epsilon=value, relation=ADD_REMOVE)
        assert split <= together * (1 + 1e-6)


def test_the_discrete_gaussian_costs_more_than_the_continuous_one():
    discrete = privacy_loss_distribution.from_discrete_gaussian_mechanism(1.0)
    assert discrete.get_delta_for_epsilon(2.0) == pytest.approx(2.48e-2, rel=5e-3)
    assert gaussian_delta(1.0, 2.0) == pytest.approx(2.09e-2, rel=5e-3)


def test_rounding_a_gaussian_is_post_processing():
    """The rounded Gaussian's divergence, summed integer by integer, stays below the Gaussian's."""
    scale, shift = 20, 20
    k = np.arange(-400, 421)

    def mass(mean):
        return stats.norm.cdf((k + 0.5 - mean) / scale) - stats.norm.cdf((k - 0.5 - mean) / scale)

    for value in (0.0, 0.5, 1.0, 2.0, 3.0):
        rounded = np.maximum(0, mass(shift) - math.exp(value) * mass(0)).sum()
        assert rounded <= gaussian_delta(1.0, value) + 1e-15
        assert rounded == pytest.approx(gaussian_delta(1.0, value), rel=5e-3)


def test_a_person_in_several_nodes_gets_the_composition():
    node = Gaussian(1 / gaussian_mu(1.0, 1e-4))
    for nodes, expected in ((1, 1.0), (2, 1.48), (4, 2.21)):
        cost = epsilon([node] * nodes, delta=1e-4, relation=ADD_REMOVE)
        assert cost == pytest.approx(expected, abs=5e-3)


def test_what_only_renyi_and_what_only_losses_can_price_still_adds_up():
    fixed, poisson = FIXED[0], POISSON[0]
    both = epsilon([fixed, poisson], delta=1e-5, relation=REPLACE)
    parts = [epsilon([event], delta=5e-6, relation=REPLACE) for event in (fixed, poisson)]
    assert both == pytest.approx(sum(parts))
    spent = delta([fixed, poisson], epsilon=80.0, relation=REPLACE)
    assert spent == pytest.approx(
        sum(delta([event], epsilon=40.0, relation=REPLACE) for event in (fixed, poisson))
    )


def test_a_divergence_lost_to_rounding_is_not_taken_for_no_loss():
    # dp-accounting reads a divergence that rounds to zero or below as epsilon 0 at any delta.
    for event, relation in (
        (FixedSizeSampled(10**9, 1, Gaussian(1e6)), REPLACE),
        (PoissonSampled(1e-9, Gaussian(1e6)), ADD_REMOVE),
    ):
        assert (renyi.compose({event: 1}, relation).divergences > 0).all()
        assert epsilon([Composed(event, 10)], delta=1e-14, relation=relation) > 0


def test_gaussians_join_fixed_size_samples_in_one_renyi_curve():
    both = epsilon([*FIXED, Gaussian(2.0)], delta=1e-5, relation=REPLACE)
    assert both > epsilon(FIXED, delta=1e-5, relation=REPLACE)
    assert 0 < delta([*FIXED, Gaussian(2.0)], epsilon=70.0, relation=REPLACE) < 1e-3


def test_a_delta_too_small_for_ffts_is_priced_by_renyi_or_refused():
    tiny = epsilon(POISSON, delta=1e-14, relation=ADD_REMOVE)
    assert tiny > epsilon(POISSON, delta=1e-9, relation=ADD_REMOVE)
    with pytest.raises(UnsupportedEvent, match="delta=1e-14 must be >= 1e-10"):
        epsilon(POISSON, delta=1e-14, relation=REPLACE)


@pytest.mark.parametrize("relation", list(Relation))
@pytest.mark.parametrize("z", [1e-5, 0.01, 0.1])
def test_hardly_any_noise_has_a_huge_but_finite_price(relation, z):
    for event in (
        Gaussian(z),
        PoissonSampled(0.5, Gaussian(z)),
        CappedPoissonSampled(100, 0.1, 15, z),
    ):
        cost = epsilon([Composed(event, 20), Laplace(1.0)], delta=1e-5, relation=relation)
        assert 100 < cost < math.inf
    assert delta([PoissonSampled(0.5, Gaussian(z))], epsilon=1.0, relation=relation) > 0.1


def test_order_and_grouping_do_not_matter():
    parts = [PoissonSampled(0.05, Gaussian(1.0)), Gaussian(5.0), Laplace(4.0)]
    grouped = [Composed(event, 3) for event in parts]
    once = epsilon(grouped, delta=1e-5, relation=ADD_REMOVE)
    assert epsilon(parts * 3, delta=1e-5, relation=ADD_REMOVE) == once
    assert epsilon(grouped[::-1], delta=1e-5, relation=ADD_REMOVE) == once


@settings(max_examples=6, deadline=None)
@given(
    st.floats(0.01, 0.9),
    st.floats(0.4, 20.0),
    st.integers(1, 200),
    st.sampled_from(list(Relation)),
)
def test_more_rounds_less_noise_and_less_delta_cost_more(rate, z, rounds, relation):
    def cost(rate=rate, z=z, rounds=rounds, at=1e-5):
        return epsilon(
            [Composed(PoissonSampled(rate, Gaussian(z)), rounds)], delta=at, relation=relation
        )

    slack = 1e-9
    base = cost()
    assert cost(rounds=2 * rounds) >= base - slack
    assert cost(z=1.5 * z) <= base + slack
    assert cost(rate=rate / 2) <= base + slack
    assert cost(at=1e-6) >= base - slack
    # Never more than without coins.
    plain = epsilon([Composed(Gaussian(z), rounds)], delta=1e-5, relation=relation)
    assert base <= plain * (1 + 1e-3) + 1e-3


@settings(max_examples=8, deadline=None)
@given(st.floats(0.01, 0.9), st.floats(0.5, 5.0), st.integers(1, 100))
def test_epsilon_and_delta_invert_each_other(rate, z, rounds):
    events = [Composed(PoissonSampled(rate, Gaussian(z)), rounds)]
    cost = epsilon(events, delta=1e-4, relation=ADD_REMOVE)
    assert delta(events, epsilon=cost, relation=ADD_REMOVE) <= 1e-4 * (1 + 1e-6)


@pytest.mark.parametrize("relation", list(Relation))
@pytest.mark.parametrize(
    "events",
    [
        [],
        [Composed(PoissonSampled(0.2, Gaussian(0.7)), 12)],
        [Composed(PoissonSampled(0.01, Gaussian(1.0)), 1000)],
        [Composed(PoissonSampled(0.25, Gaussian(20.0)), 5000), Laplace(4.0)],
        [Composed(CappedPoissonSampled(100, 0.1, 15, 1.0), 30)],
        [PoissonSampled(1e-7, Gaussian(5.0))],
        [Gaussian(3.0), Laplace(2.0)],
        [Gaussian(0.0)],
    ],
    ids=str,
)
def test_a_quick_look_costs_no_less_and_hardly_more(events, relation):
    price = Price(events, relation, total_variation=1e-9)
    exact, quick = price.epsilon(1e-5), price.quick_epsilon(1e-5)
    if math.isinf(exact):
        assert quick == exact
    else:
        assert exact - 1e-9 <= quick <= exact * 1.001 + 1e-6


def test_inexact_samplers_cost_delta():
    # 63-bit tables of scale 1000: a million parameters, 200 rounds, at epsilon 8.
    assert total_variation_delta(3.2e-19 * 1000, 10**6 * 200, epsilon=8.0) == pytest.approx(
        1.9e-4, rel=0.01
    )
    assert total_variation_delta(0.0, 10**9, epsilon=1e6) == 0.0
    assert total_variation_delta(1e-30, 1, epsilon=1e6) == math.inf


def test_total_variation_is_subtracted_from_delta_before_epsilon_is_computed():
    events = [Gaussian(2.0)]
    exact = epsilon(events, delta=1e-5, relation=ADD_REMOVE)
    negligible = epsilon(events, delta=1e-5, relation=ADD_REMOVE, total_variation=1e-30)
    assert exact < negligible < exact * (1 + 1e-6)
    variation = 2e-7
    claimed = epsilon(events, delta=1e-5, relation=ADD_REMOVE, total_variation=variation)
    back = delta(events, epsilon=claimed, relation=ADD_REMOVE, total_variation=variation)
    assert 0.9e-5 < back <= 1e-5
    left = delta(events, epsilon=claimed, relation=ADD_REMOVE)
    assert left + variation * (1 + math.exp(claimed)) <= 1e-5
    assert claimed > exact
    hopeless = epsilon(events, delta=1e-5, relation=ADD_REMOVE, total_variation=1e-4)
    assert hopeless == math.inf


@pytest.mark.parametrize("bad", [0.0, 1.0, float("nan")])
def test_delta_must_be_a_probability(bad):
    with pytest.raises(ValueError, match="delta="):
        epsilon(POISSON, delta=bad, relation=ADD_REMOVE)


def test_the_relation_must_be_one():
    with pytest.raises(ValueError, match="swap"):
        epsilon(POISSON, delta=1e-5, relation="swap")
    with pytest.raises(TypeError, match="relation"):
        epsilon(POISSON, delta=1e-5)
