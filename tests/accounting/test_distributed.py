"""Distributed noise: its Rényi curves against divergences summed directly, and what is refused."""

import itertools
import json
import math

import mpmath
import numpy as np
import pytest
from dp_accounting.rdp import rdp_privacy_accountant
from scipy.special import logsumexp

from dpfl_flower.accounting import (
    Composed,
    DistributedDiscreteGaussian,
    DistributedSkellam,
    Gaussian,
    Ledger,
    PoissonSampled,
    PoissonSampling,
    PrivacyBudget,
    Relation,
    UnsupportedEvent,
    calibrate,
    calibrate_event,
    delta,
    distributed,
    epsilon,
    event_from_json,
)
from dpfl_flower.accounting.accountant import require_supported
from dpfl_flower.accounting.dominance import dearest
from dpfl_flower.accounting.pld import supports as pld_supports

ADD, REPLACE, ZERO = Relation.ADD_OR_REMOVE_ONE, Relation.REPLACE_ONE, Relation.ZERO_OUT
KINDS = [DistributedDiscreteGaussian, DistributedSkellam]
BOTH = pytest.mark.parametrize("kind", KINDS)


def event(kind=DistributedDiscreteGaussian, **changes):
    fields = {
        "squared_scale": 100,
        "shares": 4,
        "l2_sensitivity": 20,
        "l1_sensitivity": 60,
        "dimension": 16,
    }
    return kind(**{**fields, **changes})


# --- what it costs ---------------------------------------------------------------------------


def test_golden_tau():
    assert distributed.tau(4, shares=100) == pytest.approx(7.16e-17, rel=1e-3)
    assert distributed.tau(0.25, shares=100) == pytest.approx(9.70, rel=1e-3)
    assert distributed.tau(0.25, shares=1) == 0


@pytest.mark.parametrize("shares", [1, 2, 3, 9_999, 10_000, 10_001, 10_002, 30_000])
def test_a_long_sum_of_shares_is_bounded_without_adding_all_of_it(shares):
    exact = 10 * math.fsum(math.exp(-2 * math.pi**2 * 0.3 * k / (k + 1)) for k in range(1, shares))
    stated = distributed.tau(0.3, shares=shares)
    assert exact <= stated <= exact * (1 + 1e-3) or (shares == 1 and stated == 0)
    assert distributed.tau(4, shares=10**15) > 0  # at once


def one_share(kind, squared, reach):
    """The pmf on -reach..reach, from the definition."""
    with mpmath.workprec(120):
        if kind is DistributedSkellam:
            half = [mpmath.besseli(k, squared) * mpmath.exp(-squared) for k in range(reach + 1)]
        else:
            half = [mpmath.exp(-mpmath.mpf(k * k) / (2 * squared)) for k in range(reach + 1)]
            total = 2 * sum(half) - half[0]
            half = [w / total for w in half]
        return np.array([float(p) for p in half[:0:-1] + half])


def divergence(kind, squared, shares, shift, order):
    """D_order(noise || noise + shift) in one coordinate, by adding up all of it."""
    reach = 60
    single = one_share(kind, squared, reach)
    law = single
    for _ in range(shares - 1):
        law = np.convolve(law, single)
    law = law[law > 1e-290]
    moved = np.abs(shift)
    p, q = (law[moved:], law[: law.size - moved]) if moved else (law, law)
    return float(logsumexp(order * np.log(p) + (1 - order) * np.log(q))) / (order - 1)


CASES = [
    # squared scale of a share, shares, the integer vector by which neighbours differ
    (1, 1, (1,)),
    (1, 3, (1, -1)),
    (1, 5, (3, 1, -2)),
    (2, 2, (2, 0, 0, 1)),
    (4, 3, (1, 1, 1, 1)),
    (9, 2, (4,)),
]


@BOTH
@pytest.mark.parametrize(("squared", "shares", "shift"), CASES)
@pytest.mark.parametrize("order", [1.1, 1.5, 2, 2.5, 4, 11.3])
def test_the_curve_bounds_the_divergence_and_hardly_more(kind, squared, shares, shift, order):
    l1, l2 = sum(map(abs, shift)), math.sqrt(sum(x * x for x in shift))
    true = sum(divergence(kind, squared, shares, x, order) for x in shift)
    if kind is DistributedSkellam:
        stated = distributed.skellam_rdp(order, squared * shares, l2=l2, l1=l1)
    else:
        stated = distributed.discrete_gaussian_rdp(
            order, squared, shares=shares, l2=l2, l1=l1, dimension=len(shift)
        )
    assert true <= stated * (1 + 1e-9)
    # Not vacuous: a thousandth less of it would be too little for the discrete Gaussian, a fifth
    # less for the Skellam, whose bound is loosest where a step moves far beyond its scale.
    if kind is DistributedDiscreteGaussian and squared >= 4:
        assert stated * 0.999 < true
    if kind is DistributedSkellam and order in (2, 4):
        assert stated * (0.8 if squared * shares >= 12 else 0.3) < true


def test_both_terms_of_the_skellam_curve_are_those_of_the_paper():
    # a D2^2 / (2 mu) + min(((2a - 1) D2^2 + 6 D1) / (4 mu^2), 3 D1 / (2 mu)), by hand.
    first = 4 * 9 / 200 + (7 * 9 + 6 * 7) / 40_000
    assert distributed.skellam_rdp(4, 100, l2=3, l1=7) == pytest.approx(first, rel=1e-12)
    second = 4 * 9 / 2 + 3 * 3 / 2
    assert distributed.skellam_rdp(4, 1, l2=3, l1=3) == pytest.approx(second, rel=1e-12)


@pytest.mark.parametrize("least", range(3))
def test_each_of_the_three_bounds_on_the_discrete_gaussian_is_the_least_somewhere(least):
    # (order, squared scale, shares, l2, l1, dimension); the third is only ever as good as the
    # second, where the norms meet Cauchy and Schwarz.
    case = [
        (64.0, 1, 10, 5.0, 20.0, 16),
        (1.5, 1, 10, 1.0, 1.0, 16),
        (1.5, 1, 10, 1.0, 4.0, 16),
    ][least]
    order, squared, shares, l2, l1, dimension = case
    stddev = math.sqrt(squared * shares)
    off = distributed.tau(squared, shares=shares)
    d2, d1 = l2 / stddev, l1 / stddev
    three = [
        order * d2**2 / 2 + off * dimension,
        order / 2 * (d2**2 + 2 * d1 * off + off**2 * dimension),
        order / 2 * (d2 + math.sqrt(dimension) * off) ** 2,
    ]
    assert min(three) == pytest.approx(three[least], rel=1e-12)
    stated = distributed.discrete_gaussian_rdp(
        order, squared, shares=shares, l2=l2, l1=l1, dimension=dimension
    )
    assert stated == pytest.approx(min(three), rel=1e-12)


def test_between_integers_the_skellam_curve_is_convex_and_never_below_the_integers():
    orders = np.linspace(1.05, 6, 200)
    curve = np.array([distributed.skellam_rdp(a, 30.0, l2=4, l1=9) for a in orders])
    assert (np.diff(curve) >= -1e-15).all()
    assert distributed.skellam_rdp(1.01, 30.0, l2=4, l1=9) == pytest.approx(
        distributed.skellam_rdp(2, 30.0, l2=4, l1=9)
    )


def test_golden_discrete_is_dearer_than_continuous():
    # Sensitivity 1, squared scale 1: delta(2) is 2.48e-2, the continuous Gaussian's 2.09e-2.
    k = np.arange(-60, 61)
    p = np.exp(-(k**2) / 2) / np.exp(-(k**2) / 2).sum()
    q = np.exp(-((k - 1) ** 2) / 2) / np.exp(-(k**2) / 2).sum()
    true = np.maximum(p - math.exp(2) * q, 0).sum()
    assert true == pytest.approx(2.48e-2, rel=5e-3)
    one = event(squared_scale=1, shares=1, l2_sensitivity=1, l1_sensitivity=1, dimension=1)
    assert delta([one], epsilon=2, relation=ADD) >= true
    assert delta([Gaussian(1.0)], epsilon=2, relation=ADD) == pytest.approx(2.09e-2, rel=5e-3)


@BOTH
@pytest.mark.parametrize("rounds", [1, 30])
def test_epsilon_is_that_of_an_independent_conversion(kind, rounds):
    release = event(kind, squared_scale=2**20, l2_sensitivity=500, l1_sensitivity=2000)
    orders = np.array(rdp_privacy_accountant.DEFAULT_RDP_ORDERS)
    mu = 4 * 2**20
    curve = rounds * orders * 500**2 / (2 * mu)
    # arXiv 2004.00010, Proposition 12.
    found = curve + np.log1p(-1 / orders) - np.log(1e-5 * orders) / (orders - 1)
    expected = found[orders > 1.01].min()
    got = epsilon([Composed(release, rounds)], delta=1e-5, relation=ADD)
    # The other terms of both curves are small beside it at this scale.
    assert expected <= got <= expected * 1.01


@BOTH
def test_replacing_costs_as_much_as_twice_the_sensitivity(kind):
    single, double = event(kind), event(kind, l2_sensitivity=40, l1_sensitivity=120)
    for relation in (ADD, ZERO):
        assert epsilon([single], delta=1e-5, relation=REPLACE) == pytest.approx(
            epsilon([double], delta=1e-5, relation=relation), rel=1e-12
        )


@BOTH
def test_fewer_shares_cost_more(kind):
    prices = [epsilon([event(kind, shares=n)], delta=1e-5, relation=ADD) for n in (1, 2, 3, 10)]
    assert all(a > b * 1.2 for a, b in itertools.pairwise(prices))


def test_a_share_too_narrow_for_the_sum_to_be_gaussian_is_dear_only_for_the_discrete_gaussian():
    # tau = 10 exp(-pi^2) and more: in a million dimensions the sum is not what it seems.
    narrow = {"squared_scale": 1, "shares": 100, "l2_sensitivity": 10, "l1_sensitivity": 100}
    gaussian = event(DistributedDiscreteGaussian, **narrow, dimension=2**20)
    skellam = event(DistributedSkellam, **narrow, dimension=2**20)
    assert epsilon([gaussian], delta=1e-5, relation=ADD) > 5.5
    assert epsilon([skellam], delta=1e-5, relation=ADD) < 4.8


@BOTH
def test_it_composes_with_everything_else(kind):
    both = [Composed(event(kind), 3), Composed(PoissonSampled(0.1, Gaussian(2.0)), 10)]
    total = epsilon(both, delta=1e-5, relation=ADD)
    assert total > max(epsilon([one], delta=1e-5, relation=ADD) for one in both)
    assert total <= sum(epsilon([one], delta=5e-6, relation=ADD) for one in both)
    assert 0 < delta(both, epsilon=total, relation=ADD) <= 1e-5 * (1 + 1e-9)


def test_a_budget_is_met_from_below():
    budget = PrivacyBudget(1.0, 1e-4, "example")

    def rounds(z):
        l2 = max(1, math.floor(2**14 / z))
        return Composed(event(squared_scale=2**28, shares=1, l2_sensitivity=l2,
                              l1_sensitivity=4 * l2), 30)  # fmt: skip

    z = calibrate_event(rounds, budget)
    spent = epsilon([rounds(z)], delta=1e-4, relation=ADD)
    assert 0.99 < spent <= 1.0
    # What accounting by Rényi curves costs: the Gaussian's exact figure is lower.
    exact = calibrate(budget, None, 30)
    assert 1.05 < z / exact < 1.15


# --- what it is ------------------------------------------------------------------------------


@BOTH
def test_it_survives_json(kind):
    release = Composed(event(kind), 7)
    assert event_from_json(json.loads(json.dumps(release.to_json()))) == release


@BOTH
def test_it_is_never_priced_by_the_loss_of_a_continuous_law(kind):
    assert not any(pld_supports(event(kind), relation) for relation in Relation)


@BOTH
def test_no_sampling_amplifies_it(kind):
    with pytest.raises(ValueError, match="must be a Gaussian or Laplace"):
        PoissonSampled(0.1, event(kind))
    with pytest.raises(ValueError, match="event="):
        PoissonSampling(10, 100).event(event(kind))


@BOTH
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("squared_scale", 0),
        ("squared_scale", 2.5),
        ("shares", 0),
        ("l2_sensitivity", -1),
        ("l1_sensitivity", 19),
        ("dimension", True),
    ],
)
def test_impossible_fields_are_refused(kind, field, value):
    with pytest.raises(ValueError, match=field):
        event(kind, **{field: value})


@BOTH
def test_a_node_that_is_removed_takes_its_share_along_so_that_is_refused(kind):
    with pytest.raises(UnsupportedEvent, match="takes its share"):
        require_supported(Composed(event(kind), 3), ADD, unit="node")
    for relation in (REPLACE, ZERO):
        require_supported(event(kind), relation, unit="node")
    require_supported(event(kind), ADD, unit="user")
    require_supported(Gaussian(1.0), ADD, unit="node")
    with (
        Ledger.in_memory(dataset="x", delta=1e-5, unit="node") as ledger,
        pytest.raises(UnsupportedEvent, match="takes its share"),
    ):
        ledger.plan("run", event(kind), 3)
    with Ledger.in_memory(dataset="x", delta=1e-5, unit="node", relation="zero-out") as ledger:
        ledger.plan("run", event(kind), 3)
        ledger.charge("run")
        assert ledger.epsilon() == epsilon([event(kind)], delta=1e-5, relation=ZERO)


def test_a_bound_by_renyi_curves_does_not_rank_against_other_prices():
    cheap, dear = event(shares=8), event()
    assert dearest([cheap, dear], ADD) == [dear]
    assert set(dearest([dear, Gaussian(5.0)], ADD)) == {dear, Gaussian(5.0)}
