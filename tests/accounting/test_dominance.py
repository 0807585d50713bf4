import pytest

from dpfl_flower.accounting import (
    CappedPoissonSampled,
    Composed,
    FixedSizeSampled,
    Gaussian,
    Laplace,
    PoissonSampled,
    Relation,
    epsilon,
)
from dpfl_flower.accounting.dominance import dearest


@pytest.mark.parametrize("relation", list(Relation))
def test_the_dearest_of_comparable_events_is_one(relation):
    family = [PoissonSampled(0.05, Gaussian(z)) for z in (2.0, 1.0, 3.0)]
    assert dearest(family, relation) == [PoissonSampled(0.05, Gaussian(1.0))]
    rates = [PoissonSampled(rate, Gaussian(1.0)) for rate in (0.05, 0.1, 0.01)]
    assert dearest(rates, relation) == [PoissonSampled(0.1, Gaussian(1.0))]
    sampled_or_not = [PoissonSampled(0.5, Gaussian(1.0)), Gaussian(1.0)]
    assert dearest(sampled_or_not, relation) == [Gaussian(1.0)]
    more = [Composed(Gaussian(2.0), 3), Gaussian(2.0)]
    assert dearest(more, relation) == [Composed(Gaussian(2.0), 3)]
    capped = [CappedPoissonSampled(100, 0.05, cap, 1.0) for cap in (20, 6)]
    assert dearest(capped, relation) == [CappedPoissonSampled(100, 0.05, 6, 1.0)]


def test_equal_events_count_once_and_none_is_none():
    assert dearest([Gaussian(1.0), Gaussian(1.0)], Relation.REPLACE_ONE) == [Gaussian(1.0)]
    assert dearest([], Relation.REPLACE_ONE) == []


def test_no_noise_is_dearest():
    events = [Gaussian(1.0), Gaussian(0.0), Laplace(0.1)]
    assert dearest(events, Relation.ADD_OR_REMOVE_ONE) == [Gaussian(0.0)]


def test_a_single_price_would_rank_these_wrongly_so_both_are_kept():
    rare, steady = PoissonSampled(0.001, Gaussian(0.3)), Gaussian(20.0)
    relation = Relation.ADD_OR_REMOVE_ONE

    def cost(event, count, delta):
        return epsilon([Composed(event, count)], delta=delta, relation=relation)

    assert cost(rare, 1, 1e-2) < cost(steady, 1, 1e-2) or cost(rare, 1, 1e-2) == 0
    assert cost(rare, 1, 1e-6) > cost(steady, 1, 1e-6)
    assert dearest([rare, steady], relation) == [rare, steady]


@pytest.mark.parametrize("relation", list(Relation))
def test_gaussians_are_ranked_also_where_every_profile_is_one(relation):
    for events in ([Gaussian(0.05), Gaussian(0.03)], [Gaussian(0.03), Gaussian(0.05)]):
        assert dearest(events, relation) == [Gaussian(0.03)]
    assert dearest([Composed(Gaussian(0.05), 3), Gaussian(0.03)], relation) == [
        Composed(Gaussian(0.05), 3)
    ]


def test_what_ties_at_every_point_is_kept():
    events = [Laplace(0.001), Laplace(0.002)]
    assert dearest(events, Relation.ADD_OR_REMOVE_ONE) == events
    assert dearest(events[::-1], Relation.ADD_OR_REMOVE_ONE) == events[::-1]


def test_fixed_sizes_are_ranked_among_themselves_only():
    small, large = (FixedSizeSampled(1000, m, Gaussian(1.0)) for m in (10, 20))
    assert dearest([small, large], Relation.REPLACE_ONE) == [large]
    assert dearest([small, Gaussian(0.5)], Relation.REPLACE_ONE) == [small, Gaussian(0.5)]
