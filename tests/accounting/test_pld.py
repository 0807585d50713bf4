import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution

from dpfl_flower.accounting import CappedPoissonSampled, Gaussian, Laplace, PoissonSampled, Relation
from dpfl_flower.accounting import pld as ours
from dpfl_flower.accounting.events import FixedSizeSampled

THEIRS = {
    Relation.ADD_OR_REMOVE_ONE: dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
    Relation.REPLACE_ONE: dp_accounting.NeighboringRelation.REPLACE_ONE,
    Relation.ZERO_OUT: dp_accounting.NeighboringRelation.REPLACE_SPECIAL,
}
CASES = [
    (1e-3, 0.6161519, 1500, 1e-3),
    (0.1, 1.13, 200, 1e-3),
    (0.5, 0.3, 5, 1e-3),
    (0.999, 0.7, 10, 1e-3),
    (1e-6, 2.0, 10**6, 1e-4),
    (0.01, 20.0, 10_000, 1e-5),
]


@pytest.mark.parametrize("relation", list(Relation))
@pytest.mark.parametrize(("rate", "z", "rounds", "interval"), CASES)
def test_the_vector_inversion_is_dp_accountings_point_by_point(rate, z, rounds, interval, relation):
    event = PoissonSampled(rate, Gaussian(z))
    mine = ours.compose({event: 1}, relation, interval)
    reference = privacy_loss_distribution.from_gaussian_mechanism(
        z,
        sampling_prob=rate,
        value_discretization_interval=interval,
        neighboring_relation=THEIRS[relation],
    )
    for side in ("_pmf_remove", "_pmf_add"):
        a, b = getattr(mine, side).to_dense_pmf(), getattr(reference, side).to_dense_pmf()
        assert a._lower_loss == b._lower_loss
        assert np.abs(a._probs - b._probs).max() < 1e-9
        assert a._infinity_mass == pytest.approx(b._infinity_mass, abs=1e-30)
    composed = mine.self_compose(rounds).get_epsilon_for_delta(1e-6)
    assert composed == pytest.approx(
        reference.self_compose(rounds).get_epsilon_for_delta(1e-6), rel=1e-6, abs=1e-9
    )


@pytest.mark.parametrize("relation", list(Relation))
@pytest.mark.parametrize("cap", [52, 60, 80, 999, 1000])
def test_the_capped_price_is_dp_accountings(relation, cap):
    event = CappedPoissonSampled(1000, 0.05, cap, 1.0)
    mine = ours.compose({event: 200}, relation, 2e-3)
    reference = privacy_loss_distribution.from_truncated_subsampled_gaussian_mechanism(
        1000,
        0.05,
        cap,
        1.0,
        value_discretization_interval=2e-3,
        neighboring_relation=THEIRS[relation],
    ).self_compose(200)
    expected = reference.get_epsilon_for_delta(1e-5)
    assert mine.get_epsilon_for_delta(1e-5) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("relation", list(Relation))
def test_more_events_and_more_of_each_never_refine_the_grid(relation):
    gentle, harsh = PoissonSampled(0.01, Gaussian(5.0)), PoissonSampled(0.5, Gaussian(0.1))
    previous = 0.0
    for counts in ({gentle: 1}, {gentle: 10**4}, {gentle: 10**4, harsh: 1}, {harsh: 10**4}):
        interval = ours.interval_for(counts, relation)
        assert interval >= previous
        previous = interval
    assert ours.interval_for({PoissonSampled(0.05, Gaussian(1.0)): 200}, relation) == 1e-4


def test_a_coarser_grid_is_never_cheaper():
    counts = {PoissonSampled(0.05, Gaussian(1.0)): 200, Laplace(3.0): 2, Gaussian(6.0): 4}
    costs = [
        ours.compose(counts, Relation.ADD_OR_REMOVE_ONE, h).get_epsilon_for_delta(1e-5)
        for h in (2e-4, 4e-4, 1e-3, 4e-3)
    ]
    assert costs == sorted(costs)
    assert costs[-1] < 1.1 * costs[0]


def test_what_has_no_distribution_is_not_given_one():
    fixed = FixedSizeSampled(10, 5, Gaussian(1.0))
    assert not ours.supports(fixed, Relation.REPLACE_ONE)
    assert not ours.supports(PoissonSampled(0.1, Laplace(1.0)), Relation.REPLACE_ONE)
    for question in (
        lambda: ours.compose({fixed: 1}, Relation.REPLACE_ONE, 1e-3),
        lambda: ours.interval_for({fixed: 1}, Relation.REPLACE_ONE),
    ):
        with pytest.raises(TypeError, match="no privacy loss distribution"):
            question()
