import numpy as np
import pytest
from scipy import stats

from dpfl_flower.accounting import (
    CappedPoissonSampled,
    CappedPoissonSampling,
    CustomSampling,
    EveryoneSampling,
    FixedSizeSampled,
    FixedSizeSampling,
    Gaussian,
    Laplace,
    PoissonSampled,
    PoissonSampling,
    Relation,
    Sampling,
)
from dpfl_flower.rng import SeededRandom

RELEASE = Gaussian(1.0)
ROUNDS = 4000
ACCEPT = 1e-6


def inclusion(sampling, registry, seed=1):
    """How often each unit was drawn, and the cohort sizes."""
    rng = SeededRandom(seed)
    counts = dict.fromkeys(registry, 0)
    sizes = []
    for _ in range(ROUNDS):
        drawn = sampling.draw(registry, rng)
        assert len(set(drawn)) == len(drawn)
        for node in drawn:
            counts[node] += 1
        sizes.append(len(drawn))
    return np.array([counts[node] for node in registry]), np.array(sizes)


def p_value(counts, probability):
    """Of all inclusion counts, against one probability of being drawn: of each, and in sum."""
    errors = counts - ROUNDS * probability
    variance = ROUNDS * probability * (1 - probability)
    each = stats.chi2.sf((errors**2 / variance).sum(), len(counts))
    in_sum = 2 * stats.norm.sf(abs(errors.sum()) / np.sqrt(len(counts) * variance))
    return 2 * min(each, in_sum)


def test_poisson_draws_each_registered_unit_by_its_own_coin():
    registry = list(range(100, 140))
    sampling = PoissonSampling(expected_cohort=20, population=100)  # most have not registered
    counts, sizes = inclusion(sampling, registry)
    assert p_value(counts, 0.2) > ACCEPT
    assert p_value(counts, 0.2 * 1.03) < ACCEPT
    # Independent coins: the cohort's variance is binomial, not smaller as for a fixed size.
    assert sizes.var() == pytest.approx(40 * 0.2 * 0.8, rel=0.1)


def test_poisson_keeps_its_rate_when_more_have_registered_than_were_expected():
    counts, _ = inclusion(PoissonSampling(expected_cohort=5, population=20), range(40))
    assert p_value(counts, 0.25) > ACCEPT


def test_capped_poisson_truncates_to_a_uniform_subset():
    sampling = CappedPoissonSampling(expected_cohort=10, population=40, cap=11)
    counts, sizes = inclusion(sampling, range(40))
    assert sizes.max() == 11
    law = stats.binom(40, 0.25)
    expected = sum(min(k, 11) * law.pmf(k) for k in range(41)) / 40
    assert p_value(counts, expected) > ACCEPT
    assert p_value(counts, 0.25) < ACCEPT


def test_fixed_size_draws_places_so_that_absentees_raise_nobodys_chance():
    sampling = FixedSizeSampling(cohort=10, population=40)
    counts, sizes = inclusion(sampling, range(40))
    assert set(sizes) == {10}
    assert p_value(counts, 0.25) > ACCEPT
    counts, sizes = inclusion(sampling, range(20))
    assert p_value(counts, 0.25) > ACCEPT
    assert p_value(counts, 10 / 20) < ACCEPT
    assert sizes.max() <= 10


def test_everyone_is_everyone():
    assert EveryoneSampling(5).draw([3, 1, 2], SeededRandom(0)) == [3, 1, 2]


def test_each_sampling_prices_a_release_as_it_samples():
    assert PoissonSampling(50, 1000).event(RELEASE) == PoissonSampled(0.05, RELEASE)
    assert PoissonSampling(50, 1000).event(Laplace(2.0)) == PoissonSampled(0.05, Laplace(2.0))
    assert PoissonSampling(1000, 1000).event(RELEASE) == RELEASE
    assert CappedPoissonSampling(50, 1000, 80).event(RELEASE) == CappedPoissonSampled(
        1000, 0.05, 80, 1.0
    )
    assert FixedSizeSampling(50, 1000).event(RELEASE) == FixedSizeSampled(1000, 50, RELEASE)
    assert EveryoneSampling(1000).event(RELEASE) == RELEASE


def test_a_rule_of_ones_own_claims_no_amplification_and_cannot():
    class Cyclic(CustomSampling):
        population = 100
        expected_cohort = 10

        def draw(self, registry, rng):
            return list(registry)[:10]

    assert Cyclic().event(RELEASE) == RELEASE
    # One unit less brings another one in: the sum moves by two clip norms, not one.
    assert not Cyclic().supports(Relation.ADD_OR_REMOVE_ONE)
    assert Cyclic().supports(Relation.REPLACE_ONE)
    assert Cyclic().supports(Relation.ZERO_OUT)
    assert Cyclic().max_cohort is None


def everyone(self, registry, rng):
    return list(registry)


def unpriced(self, release):
    return Gaussian(1e9)


class Discount:
    event = unpriced


@pytest.mark.parametrize(
    "bases",
    [
        (PoissonSampling,),
        (CappedPoissonSampling,),
        (FixedSizeSampling,),
        (EveryoneSampling,),
        (Sampling,),
        (CustomSampling, PoissonSampling),
        (PoissonSampling, CustomSampling),
    ],
)
def test_a_price_cannot_be_kept_for_another_way_to_draw(bases):
    with pytest.raises(TypeError, match="Cyclic must subclass CustomSampling"):
        type("Cyclic", bases, {"draw": everyone})


@pytest.mark.parametrize(
    ("bases", "body", "named"),
    [
        ((CustomSampling,), {"event": unpriced}, "event"),
        ((CustomSampling,), {"supports": lambda self, relation: True}, "supports"),
        ((Discount, CustomSampling), {}, "event"),
    ],
)
def test_the_price_of_a_rule_of_ones_own_cannot_be_overridden(bases, body, named):
    with pytest.raises(TypeError, match=rf"Cyclic\.{named} cannot be overridden"):
        type("Cyclic", bases, body)


def test_only_replace_one_prices_a_fixed_size():
    assert {r for r in Relation if FixedSizeSampling(5, 10).supports(r)} == {Relation.REPLACE_ONE}
    for sampling in (
        PoissonSampling(5, 10),
        CappedPoissonSampling(5, 10, 8),
        EveryoneSampling(10),
    ):
        assert all(sampling.supports(relation) for relation in Relation)


def test_cohorts_are_bounded_where_the_rule_bounds_them():
    assert PoissonSampling(5, 10).max_cohort is None
    assert EveryoneSampling(10).max_cohort is None
    assert CappedPoissonSampling(5, 10, 8).max_cohort == 8
    assert CappedPoissonSampling(5, 10, 99).max_cohort == 10
    assert FixedSizeSampling(5, 10).max_cohort == 5


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: PoissonSampling(11, 10), "expected_cohort=11"),
        (lambda: PoissonSampling(0, 10), "expected_cohort=0"),
        (lambda: PoissonSampling(5, 0), "population=0"),
        (lambda: CappedPoissonSampling(5, 10, 4), "cap=4 must be >= expected_cohort"),
        (lambda: CappedPoissonSampling(2**60 - 1, 2**60, 2**60 - 1), "rate=1.0 must be < 1"),
        (lambda: CappedPoissonSampling(11, 10, 12), "expected_cohort=11"),
        (lambda: FixedSizeSampling(11, 10), "cohort=11"),
        (lambda: FixedSizeSampling(2.5, 10), "cohort=2.5"),
        (lambda: EveryoneSampling(0), "population=0"),
        (lambda: CappedPoissonSampling(5, 10, 8).event(Laplace(1.0)), "must be a Gaussian"),
        (lambda: FixedSizeSampling(5, 10).event(Laplace(1.0)), "must be a Gaussian"),
    ],
)
def test_a_bad_sampling_is_refused_by_name_and_value(make, named):
    with pytest.raises(ValueError, match=named):
        make()


@pytest.mark.parametrize("sampling", [CappedPoissonSampling(5, 10, 8), FixedSizeSampling(5, 10)])
def test_a_registry_above_the_population_that_was_priced_is_refused(sampling):
    with pytest.raises(ValueError, match="registry of 11 units must be <= population = 10"):
        sampling.draw(range(11), SeededRandom(0))


@pytest.mark.parametrize(
    "sampling",
    [
        PoissonSampling(5, 10),
        CappedPoissonSampling(5, 10, 8),
        FixedSizeSampling(5, 10),
        EveryoneSampling(10),
    ],
)
def test_nobody_has_two_coins(sampling):
    with pytest.raises(ValueError, match="each unit once"):
        sampling.draw([1, 2, 1], SeededRandom(0))
    assert repr(sampling).startswith(type(sampling).__name__)
    assert sampling.population == 10
    assert sampling.expected_cohort in (5, 10)
