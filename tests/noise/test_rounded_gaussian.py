import dataclasses
import multiprocessing
import pickle
from itertools import pairwise

import mpmath
import numpy as np
import pytest
from scipy import stats

from dpfl_flower.noise import NoiseDistribution, RoundedGaussian, rounded_gaussian
from dpfl_flower.rng import SeededRandom, secure
from tests.support.goodness import (
    ACCEPT,
    REJECT,
    binned_chi_square,
    cell_chi_square,
    correlation_in_errors,
)
from tests.support.scripted_random import ScriptedRandom, constant_seeds

ONE = 1 << 127
DRAWS = 1_000_000


def exact_cell(k, scale):
    """P(k) in units of 2^-127, by mpmath: a difference of upper tails, which does not cancel."""
    upper, lower = (mpmath.mpf(2 * k + side) / (2 * scale) for side in (1, -1))
    tails = [mpmath.erfc(x / mpmath.sqrt(2)) / 2 for x in (lower, upper)]
    return (tails[0] - tails[1]) * ONE


@pytest.fixture(scope="module")
def draws():
    return {s: RoundedGaussian(s).sample(DRAWS, SeededRandom(s)) for s in (1, 2, 30, 1000, 2**14)}


# --- the table -------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1, 2, 3, 7, 8, 100, 1000, 2**14, 2**17])
def test_probabilities_are_within_one_unit_of_the_exact_ones(scale):
    cells = rounded_gaussian.probabilities(scale)
    with mpmath.workprec(400):
        spots = {1, 2, scale // 3, scale, 2 * scale, 5 * scale, 9 * scale, 13 * scale} - {0}
        for k in spots:
            assert abs(cells[k] - exact_cell(k, scale)) < 0.75, k
        # P(0) also holds what the others leave of 1.
        assert abs(cells[0] - exact_cell(0, scale)) < 2 * len(cells)


@pytest.mark.parametrize("scale", [1, 2, 5, 64, 512])
def test_the_table_is_a_symmetric_unimodal_law_to_the_last_bit(scale):
    cells = rounded_gaussian.probabilities(scale)
    assert cells[0] + 2 * sum(cells[1:]) == ONE
    assert all(a >= b >= 0 for a, b in pairwise(cells))
    assert len(cells) == 13 * scale + 1
    # The sampler's table holds them on both sides: its middle number gives 0, its ends the ends.
    draw = RoundedGaussian(scale).sample
    assert draw(1, ScriptedRandom([1 << 63])).tolist() == [0]
    if scale < 64:
        assert draw(1, ScriptedRandom([0, 0])).tolist() == [-13 * scale]
        assert draw(1, ScriptedRandom([2**64 - 1, 2**64 - 1])).tolist() == [13 * scale]


@pytest.mark.parametrize("scale", [1, 2, 8])
def test_the_stated_total_variation_bounds_the_true_one(scale):
    cells = rounded_gaussian.probabilities(scale)
    with mpmath.workprec(400):
        differences = sum(
            (1 if k == 0 else 2) * abs(cell - exact_cell(k, scale)) for k, cell in enumerate(cells)
        )
        beyond = mpmath.erfc((len(cells) - mpmath.mpf(1) / 2) / (scale * mpmath.sqrt(2))) * ONE
        true = (differences + beyond) / 2 / ONE
    stated = RoundedGaussian(scale).total_variation
    assert true <= stated <= 1e4 * true


def test_total_variation_is_negligible_where_it_is_used():
    # 200 rounds of 10 million coordinates at eps 8 add less than 1e-19 to delta.
    stated = RoundedGaussian(2**17).total_variation
    assert (1 + np.exp(8)) * stated * 1e7 * 200 < 1e-18


def test_a_wrong_constant_is_found_out_when_the_table_is_built(monkeypatch):
    fixed_point = rounded_gaussian.fixed_point
    right = fixed_point.inverse_sqrt_two_pi
    monkeypatch.setattr(
        fixed_point, "inverse_sqrt_two_pi", lambda *, bits: right(bits=bits) * (2**110 + 1) >> 110
    )
    with pytest.raises(ArithmeticError, match="scale=64"):
        rounded_gaussian.probabilities(64)


# --- the variance ----------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1, 2, 3, 50])
def test_variance_is_that_of_the_table(scale):
    cells = rounded_gaussian.probabilities(scale)
    exact = 2 * sum(k * k * cell for k, cell in enumerate(cells)) / ONE
    noise = RoundedGaussian(scale)
    assert noise.variance == pytest.approx(exact, rel=1e-14)
    assert noise.stddev == pytest.approx(exact**0.5, rel=1e-14)


def test_variance_holds_the_rounding():
    assert RoundedGaussian(2**14).variance == 2.0**28 + 1 / 12
    assert RoundedGaussian(1).variance < 1 + 1 / 12  # by 1.1e-8, the first correction


# --- the draws -------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1, 2, 30, 1000])
def test_every_cell_has_its_probability_and_not_that_of_a_scale_3_percent_off(draws, scale):
    reach = 13 * scale
    edges = np.arange(-reach, reach + 2) - 0.5

    def p_value(assumed):
        return cell_chi_square(
            draws[scale], -reach, np.diff(stats.norm.cdf(edges / (scale * assumed)))
        )

    assert p_value(1) > ACCEPT
    assert p_value(1.03) < REJECT
    assert p_value(1 / 1.03) < REJECT


@pytest.mark.parametrize("scale", [1000, 2**14])
def test_the_scale_is_right_and_3_percent_off_is_rejected(draws, scale):
    sample = draws[scale]
    for law, holds in ((1, True), (1.03, False), (1 / 1.03, False)):
        normal = stats.norm(scale=scale * law)
        p_values = [binned_chi_square(sample, normal)]
        # Spread evenly over their cells, rounded draws are continuous enough for KS.
        spread = sample + np.random.default_rng(1).uniform(-0.5, 0.5, DRAWS)
        p_values.append(stats.kstest(spread, normal.cdf).pvalue)
        assert all((p > ACCEPT) if holds else (p < REJECT) for p in p_values), (law, p_values)


@pytest.mark.parametrize("scale", [1, 2, 30, 1000, 2**14])
def test_mean_and_variance_are_the_stated_ones(draws, scale):
    sample, noise = draws[scale], RoundedGaussian(scale)
    assert sample.dtype == np.int64
    assert abs(sample.mean()) < 5 * noise.stddev / np.sqrt(DRAWS)
    ratio = np.square(sample.astype(float)).mean() / noise.variance
    assert abs(ratio - 1) < 5 * np.sqrt(2 / DRAWS)  # 0.7 %: 3 % off in scale is 6 % here


@pytest.mark.parametrize("scale", [30, 1000, 2**14])
@pytest.mark.parametrize("width", [3, 4])
def test_both_tails_are_there(draws, scale, width):
    probability = stats.norm.sf((width * scale + 0.5) / scale)
    for side in (draws[scale], -draws[scale]):
        count = int((side > width * scale).sum())
        assert stats.binomtest(count, DRAWS, probability).pvalue > ACCEPT


def test_low_bits_are_uniform_where_the_scale_is_wide(draws):
    # A real Gaussian of this scale, rounded, has uniform residues to far below what can be seen.
    for bits in (1, 6, 8):
        counts = np.bincount(draws[2**14] & ((1 << bits) - 1), minlength=1 << bits)
        assert stats.chisquare(counts).pvalue > ACCEPT


def test_neighbouring_draws_are_uncorrelated(draws):
    sample = draws[2**14].astype(float)
    for lag in (1, 2, 64, 16_384):
        assert correlation_in_errors(sample[lag:], sample[:-lag]) < 5.5


def test_secure_draws_are_fresh_whatever_is_seeded():
    noise = RoundedGaussian(2**10)
    calls = []
    for _ in range(4):
        constant_seeds()
        calls.append(noise.sample(100_000, secure()))
    for i, a in enumerate(calls):
        assert all(correlation_in_errors(a, b) < 5.5 for b in calls[:i])
    assert (np.std(calls, axis=0) > 0).all(), "a coordinate is constant"


def _noise_of_worker(_):
    return RoundedGaussian(2**10).sample(50_000, secure())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_noise_of_forked_workers_is_uncorrelated():
    parent = RoundedGaussian(2**10).sample(50_000, secure())
    with multiprocessing.get_context("fork").Pool(3) as pool:
        workers = [parent, *pool.map(_noise_of_worker, range(3), chunksize=1)]
    for i, a in enumerate(workers):
        assert all(correlation_in_errors(a, b) < 5.5 for b in workers[:i])


# --- the object ------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0, -1, 1.5, 2.0, "8", True, 2**18 + 1, float("nan"), None])
def test_impossible_scales_are_refused(scale):
    with pytest.raises(ValueError, match="scale="):
        RoundedGaussian(scale)


def test_it_is_plain_frozen_data():
    noise = RoundedGaussian(4)
    assert isinstance(noise, NoiseDistribution)
    assert noise == RoundedGaussian(np.int64(4)) == pickle.loads(pickle.dumps(noise))
    with pytest.raises(dataclasses.FrozenInstanceError):
        noise.scale = 5
    assert noise.sample(0, secure()).shape == (0,)
    with pytest.raises(ValueError, match="n=-1"):
        noise.sample(-1, secure())


def test_a_table_is_built_once_per_process(monkeypatch):
    RoundedGaussian(6).sample(1, secure())
    monkeypatch.setattr(rounded_gaussian, "probabilities", None)
    RoundedGaussian(6).sample(1, secure())
