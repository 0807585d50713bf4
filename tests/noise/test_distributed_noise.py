"""What the discrete Gaussian and the Skellam distribution have in common, and what not."""

import dataclasses
import math

import mpmath
import numpy as np
import pytest
from scipy import stats

from dpfl_flower.noise import (
    DiscreteGaussian,
    NoiseDistribution,
    Skellam,
    discrete_gaussian,
    skellam,
)
from dpfl_flower.rng import SeededRandom, secure
from tests.support.goodness import ACCEPT, REJECT, cell_chi_square, correlation_in_errors
from tests.support.scripted_random import CountingRandom

ONE = 1 << 127
DRAWS = 1_000_000
MODULES = {DiscreteGaussian: discrete_gaussian, Skellam: skellam}
BOTH = pytest.mark.parametrize("law", [DiscreteGaussian, Skellam])
SQUARED = [1, 2, 12, 400, 2**20]


def exact_cells(law, squared, count):
    """P(0), ..., P(count - 1) by mpmath, from the definitions."""
    if law is Skellam:
        return [mpmath.besseli(k, squared) * mpmath.exp(-squared) for k in range(count)]
    weights = [mpmath.exp(-mpmath.mpf(k * k) / (2 * squared)) for k in range(count)]
    total = mpmath.jtheta(3, 0, mpmath.exp(-mpmath.mpf(1) / (2 * squared)))
    return [w / total for w in weights]


@pytest.fixture(scope="module")
def draws():
    laws = ((law, v) for law in MODULES for v in SQUARED)
    return {(law, v): law(v).sample(DRAWS, SeededRandom(v)) for law, v in laws}


# --- the tables ------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("squared", [1, 2, 12, 399])
def test_the_table_and_its_stated_total_variation_hold_against_the_definition(law, squared):
    table = MODULES[law].probabilities(squared)
    assert table[0] + 2 * sum(table[1:]) == ONE
    with mpmath.workprec(300):
        exact = exact_cells(law, squared, len(table) + 20)
        gaps = [abs(mpmath.mpf(mine) / ONE - p) for mine, p in zip(table, exact, strict=False)]
        assert max(gaps[1:]) * ONE <= 0.75
        true = (gaps[0] + 2 * sum(gaps[1:]) + 2 * sum(exact[len(table) :])) / 2
        stated = law(squared).total_variation
        assert true <= stated <= 1000 * true


@BOTH
@pytest.mark.parametrize("squared", [2**20, 2**28])
def test_a_wide_table_is_exact_to_the_last_bits_too(law, squared):
    table = MODULES[law].probabilities(squared)
    assert table[0] + 2 * sum(table[1:]) == ONE
    with mpmath.workprec(300):
        for k in (2, 3, math.isqrt(squared), 5 * math.isqrt(squared), len(table) - 2):
            if law is Skellam:
                # Bessel's function of so large an argument by its integral would take minutes:
                # the recurrence that defines it up to a factor, where P(0) takes no part.
                left = mpmath.mpf(table[k - 1] - table[k + 1]) * squared
                assert abs(left - 2 * k * table[k]) <= 1.5 * squared + 2 * k
            else:
                exact = mpmath.exp(-mpmath.mpf(k * k) / (2 * squared))
                # For a squared scale so large the sum of the weights is the integral.
                exact /= mpmath.sqrt(2 * mpmath.pi * squared)
                assert abs(mpmath.mpf(table[k]) - exact * ONE) <= 0.75


@BOTH
def test_total_variation_is_negligible_at_the_widest(law):
    assert law(2**36).total_variation < 2.0**-103


@pytest.mark.parametrize("squared", [1, 10, 2**28, 2**36])
def test_the_skellam_tail_bound_is_one_and_leaves_what_the_table_needs(squared):
    reach = skellam._reach(squared)
    assert skellam.log_tail_bound(squared, reach + 1) <= -128 * math.log(2)
    # Where the recurrence begins, the law has vanished for every digit that is kept.
    assert skellam.log_tail_bound(squared, reach + reach // 4 + 16) < -190 * math.log(2)
    if squared < 2**20:
        for k in (1, 3, 10):
            exact = stats.skellam.sf(k - 1, squared / 2, squared / 2)
            assert math.log(exact) <= skellam.log_tail_bound(squared, k)


# --- the draws -------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("squared", [1, 2, 12, 400])
def test_every_cell_has_its_probability_and_not_that_of_a_scale_3_percent_off(draws, law, squared):
    reach = len(MODULES[law].probabilities(squared)) + 2
    k = np.arange(-reach, reach + 1)

    def p_value(off):
        variance = squared * off**2
        if law is Skellam:
            cells = stats.skellam.pmf(k, variance / 2, variance / 2)
        else:
            cells = np.exp(-(k**2) / (2 * variance))
            cells /= cells.sum()
        return cell_chi_square(draws[law, squared], -reach, cells)

    # A 3 % wrong scale moves chi-square by about 1,800 of 4 standard deviations' room for any cell.
    assert p_value(1) > ACCEPT
    assert p_value(1.03) < REJECT
    assert p_value(1 / 1.03) < REJECT


@BOTH
@pytest.mark.parametrize("squared", SQUARED)
def test_mean_and_variance_are_the_stated_ones(draws, law, squared):
    sample, noise = draws[law, squared], law(squared)
    assert sample.dtype == np.int64
    assert abs(sample.mean()) < 5 * noise.stddev / np.sqrt(DRAWS)
    squares = np.square(sample.astype(float))
    # Five standard errors are 0.7 % of the variance: an error of 2 % would be seen.
    assert abs(squares.mean() - noise.variance) < 5 * squares.std() / np.sqrt(DRAWS)
    assert noise.stddev**2 == pytest.approx(noise.variance)


@pytest.mark.parametrize("squared", [1, 2, 3, 50])
def test_the_variance_of_the_discrete_gaussian_is_that_of_the_law(squared):
    with mpmath.workprec(200):
        cells = exact_cells(DiscreteGaussian, squared, 40 * (math.isqrt(squared) + 1))
        exact = 2 * sum(k * k * p for k, p in enumerate(cells))
    assert DiscreteGaussian(squared).variance == pytest.approx(float(exact), rel=1e-12)


def test_a_sum_of_skellams_is_skellam_and_a_sum_of_discrete_gaussians_is_not():
    def convolved(law, squared, n):
        half = [p / ONE for p in MODULES[law].probabilities(squared)]
        cells = np.array(half[:0:-1] + half)
        total = cells
        for _ in range(n - 1):
            total = np.convolve(total, cells)
        return total

    def distance(law, squared, n):
        ours = convolved(law, squared, n)
        whole = np.array([p / ONE for p in MODULES[law].probabilities(n * squared)])
        centre = ours[len(ours) // 2 :][:8]
        return float(np.abs(centre / whole[:8] - 1).max())

    assert distance(Skellam, 1, 5) < 1e-12
    assert distance(DiscreteGaussian, 1, 5) > 1e-8


@BOTH
def test_secure_draws_are_fresh_and_take_one_word_each(law):
    noise = law(10_000)
    a, b = noise.sample(100_000, secure()), noise.sample(100_000, secure())
    assert correlation_in_errors(a, b) < 5.5
    source = CountingRandom(SeededRandom(1))
    noise.sample(100_000, source)
    assert 100_000 <= source.bytes_taken / 8 <= 101_000


# --- the objects -----------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("squared", [0, 0.5, 4.0, -3, "8", True, 2**36 + 1, float("nan")])
def test_impossible_scales_are_refused(law, squared):
    with pytest.raises(ValueError, match="squared_scale="):
        law(squared)


@BOTH
def test_they_are_plain_frozen_data(law):
    noise = law(4)
    assert isinstance(noise, NoiseDistribution)
    assert noise == law(np.int64(4))
    with pytest.raises(dataclasses.FrozenInstanceError):
        noise.squared_scale = 5
    for n in (0, 1, 16_385):
        assert noise.sample(n, secure()).shape == (n,)
