import dataclasses
from fractions import Fraction
from itertools import pairwise

import mpmath
import numpy as np
import pytest
from scipy import stats

from dpfl_flower.noise import NoiseDistribution, RoundedLaplace, rounded_laplace
from dpfl_flower.rng import SeededRandom, secure
from tests.support.goodness import (
    ACCEPT,
    REJECT,
    binned_chi_square,
    cell_chi_square,
    correlation_in_errors,
)
from tests.support.scripted_random import CountingRandom

ONE = 1 << 127
DRAWS = 1_000_000
SCALES = [1, 2.5, 40, 1000.3, 2**14]


def exact_cell(k, scale):
    """P(k) by mpmath."""
    q = mpmath.exp(-1 / mpmath.mpf(scale))
    return 1 - mpmath.sqrt(q) if k == 0 else (q ** (abs(k) - 0.5) - q ** (abs(k) + 0.5)) / 2


def table_cell(k, scale):
    """P(k) as the product of the two tables' entries, an exact fraction."""
    scale = Fraction(float(scale))
    steps = rounded_laplace.step_probabilities(scale)
    places = rounded_laplace.place_probabilities(scale)
    if k == 0:
        return Fraction(steps[0], ONE)
    step, place = divmod(abs(k) - 1, len(places))
    return Fraction(steps[1 + step], ONE) * Fraction(places[place], ONE)


@pytest.fixture(scope="module")
def draws():
    return {s: RoundedLaplace(s).sample(DRAWS, SeededRandom(int(s))) for s in SCALES}


# --- the tables ------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [*SCALES, 1.7, 2**17 + 0.3, 2**18])
def test_probabilities_are_the_exact_ones_to_the_last_bits(scale):
    stride = len(rounded_laplace.place_probabilities(Fraction(float(scale))))
    with mpmath.workprec(400):
        for k in (0, 1, 2, stride, stride + 1, int(scale), int(7.3 * scale), int(60 * scale)):
            mine = table_cell(k, scale)
            difference = abs(mpmath.mpf(mine.numerator) / mine.denominator - exact_cell(k, scale))
            # Cell 0 of either table holds what the others leave of 1.
            assert difference * ONE < (10_000 if k == 0 or (k - 1) % stride == 0 else 2), k


@pytest.mark.parametrize("scale", [1, 2.5, 40, 1000.3, 2**18])
def test_the_tables_are_laws_to_the_last_bit(scale):
    steps = rounded_laplace.step_probabilities(Fraction(float(scale)))
    places = rounded_laplace.place_probabilities(Fraction(float(scale)))
    assert steps[0] + 2 * sum(steps[1:]) == ONE
    assert sum(places) == ONE
    for geometric in (steps[1:], places):
        assert all(a >= b >= 0 for a, b in pairwise(geometric))
    assert len(steps) + len(places) < 20_000  # however wide the scale


@pytest.mark.parametrize("scale", [1, 3.5, 33])
def test_the_stated_total_variation_bounds_the_true_one(scale):
    noise, rational = RoundedLaplace(scale), Fraction(float(scale))
    steps = rounded_laplace.step_probabilities(rational)
    places = rounded_laplace.place_probabilities(rational)
    with mpmath.workprec(400):
        differences, k = abs(mpmath.mpf(steps[0]) / ONE - exact_cell(0, scale)), 0
        for step in steps[1:]:
            for place in places:
                k += 1
                mine = mpmath.mpf(step) * place / ONE**2
                differences += 2 * abs(mine - exact_cell(k, scale))
        beyond = mpmath.exp(-(k + mpmath.mpf(1) / 2) / scale)
        true = (differences + beyond) / 2
    assert true <= noise.total_variation <= 1e5 * true


def test_total_variation_is_negligible_where_it_is_used():
    assert RoundedLaplace(2**18).total_variation < 2.0**-112


# --- the draws -------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1, 2.5, 40])
def test_every_cell_has_its_probability_and_not_that_of_a_scale_3_percent_off(draws, scale):
    reach = int(90 * scale)
    edges = np.arange(-reach, reach + 2) - 0.5

    def p_value(assumed):
        law = stats.laplace(scale=scale * assumed)
        return cell_chi_square(draws[scale], -reach, np.diff(law.cdf(edges)))

    assert p_value(1) > ACCEPT
    assert p_value(1.03) < REJECT
    assert p_value(1 / 1.03) < REJECT


@pytest.mark.parametrize("scale", [1000.3, 2**14])
def test_the_scale_is_right_and_3_percent_off_is_rejected(draws, scale):
    sample = draws[scale]
    # Spread evenly over their cells, rounded draws are continuous enough for KS.
    spread = sample + np.random.default_rng(1).uniform(-0.5, 0.5, DRAWS)
    for off, holds in ((1, True), (1.03, False), (1 / 1.03, False)):
        law = stats.laplace(scale=scale * off)
        p_values = [binned_chi_square(sample, law), stats.kstest(spread, law.cdf).pvalue]
        assert all((p > ACCEPT) if holds else (p < REJECT) for p in p_values), (off, p_values)


@pytest.mark.parametrize("scale", SCALES)
def test_mean_variance_and_stddev_are_the_stated_ones(draws, scale):
    sample, noise = draws[scale], RoundedLaplace(scale)
    assert sample.dtype == np.int64
    assert abs(sample.mean()) < 5 * noise.stddev / np.sqrt(DRAWS)
    squares = np.square(sample.astype(float))
    assert abs(squares.mean() - noise.variance) < 5 * squares.std() / np.sqrt(DRAWS)
    assert noise.stddev**2 == pytest.approx(noise.variance)


@pytest.mark.parametrize("scale", [1, 1.7, 12])
def test_variance_is_that_of_the_law(scale):
    with mpmath.workprec(200):
        exact = 2 * sum(k * k * exact_cell(k, scale) for k in range(1, int(150 * scale)))
    assert RoundedLaplace(scale).variance == pytest.approx(float(exact), rel=1e-12)


def test_variance_of_a_wide_scale_is_that_of_the_real_law_and_the_rounding():
    assert RoundedLaplace(1000).variance == pytest.approx(2e6 + 1 / 12, abs=1e-3)


@pytest.mark.parametrize("scale", [40, 1000.3, 2**14])
@pytest.mark.parametrize("width", [5, 10])
def test_both_tails_are_there(draws, scale, width):
    beyond = int(width * scale)
    probability = stats.laplace.sf((beyond + 0.5) / scale)
    for side in (draws[scale], -draws[scale]):
        count = int((side > beyond).sum())
        assert stats.binomtest(count, DRAWS, probability).pvalue > ACCEPT


@pytest.mark.parametrize("scale", [1000.3, 2**14])
def test_low_bits_are_independent_of_sign_and_size(draws, scale):
    sample = draws[scale][draws[scale] != 0]
    place = (np.abs(sample) - 1) % 32
    for other in (np.sign(sample), np.abs(sample) // 32, sample > scale):
        assert correlation_in_errors(place, other) < 5.5


def test_secure_draws_are_fresh():
    noise = RoundedLaplace(100)
    a, b = noise.sample(100_000, secure()), noise.sample(100_000, secure())
    assert correlation_in_errors(a, b) < 5.5


def test_two_words_a_draw():
    source = CountingRandom(SeededRandom(1))
    RoundedLaplace(2**14).sample(100_000, source)
    assert 200_000 <= source.bytes_taken / 8 <= 202_000


# --- the object ------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0, 0.99, -3, "8", True, 2**18 + 1, float("nan"), float("inf")])
def test_impossible_scales_are_refused(scale):
    with pytest.raises(ValueError, match="scale="):
        RoundedLaplace(scale)


def test_it_is_plain_frozen_data():
    noise = RoundedLaplace(4)
    assert isinstance(noise, NoiseDistribution)
    assert noise == RoundedLaplace(4.0) == RoundedLaplace(np.float32(4))
    assert RoundedLaplace(np.float32(4)).sample(10, SeededRandom(1)).tolist() == (
        noise.sample(10, SeededRandom(1)).tolist()
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        noise.scale = 5
    for n in (0, 1, 16_385):
        assert noise.sample(n, secure()).shape == (n,)
    with pytest.raises(ValueError, match="n=-1"):
        noise.sample(-1, secure())
