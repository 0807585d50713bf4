import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpfl_flower.clipping import AdaptiveClipping, FixedClipping, Norm, norm
from dpfl_flower.noise import RoundedGaussian
from dpfl_flower.quantize import BoundedSum, IntegerGrid
from dpfl_flower.rng import SeededRandom

finite = st.floats(-1e150, 1e150, allow_subnormal=False)


@given(st.lists(finite, max_size=50))
def test_norms_equal_an_exact_computation(entries):
    array = np.array(entries, dtype=np.float64)
    assert norm([array]) == pytest.approx(math.hypot(*entries), rel=1e-12)
    assert norm([array], Norm.L1) == pytest.approx(math.fsum(map(abs, entries)), rel=1e-12)


@pytest.mark.parametrize("size", [1e-315, 1e-200, 1e-23, 1.0, 1e30, 1e200, 3e307])
def test_squares_neither_overflow_nor_vanish(size):
    assert norm([np.array([3 * size]), np.array(-4 * size)]) == pytest.approx(5 * size, rel=1e-15)
    assert norm([np.full(5, size)], Norm.L1) == pytest.approx(5 * size, rel=1e-15)
    assert norm([np.array([5e-324])]) == 5e-324


def test_float32_and_float16_are_summed_in_float64():
    # In float16 the squares overflow at once; in float32 the sum of 2^24 + 1 ones stops at 2^24.
    assert norm([np.full(10, 60_000, np.float16)]) == pytest.approx(60_000 * math.sqrt(10))
    ones = np.broadcast_to(np.float32(1), (1 << 24) + 100_000)
    assert norm([ones], Norm.L1) == ones.size
    assert norm([ones]) == pytest.approx(math.sqrt(ones.size), rel=1e-12)


def test_the_norm_spans_all_arrays_0d_and_empty_included():
    arrays = [np.array(2.0), np.zeros((0, 3)), torch.tensor([[1.0, 2.0], [4.0, 0.0]]).T]
    assert norm(arrays) == 5
    assert norm([torch.tensor([3.0, -4.0], dtype=torch.bfloat16)]) == 5
    assert norm([]) == 0
    assert norm([np.zeros(3)]) == 0


@pytest.mark.parametrize("kind", list(Norm))
def test_nan_and_infinity_are_reported(kind):
    assert norm([np.array([1.0, -np.inf])], kind) == math.inf
    assert math.isnan(norm([np.array([np.inf]), np.array([np.nan])], kind))
    assert norm([np.array([1e308, 1e308, 1e308])], kind) > 1e308  # finite or not, no warning


@pytest.mark.parametrize("clip_norm", [0, -1.0, math.nan, math.inf, "1", True])
def test_a_clip_norm_that_is_no_positive_number_is_refused(clip_norm):
    with pytest.raises(ValueError, match="clip_norm="):
        FixedClipping(clip_norm)


def test_fixed_clipping_starts_where_it_stays():
    assert FixedClipping(0.5).initial_clip_norm == 0.5


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"initial": 0.0}, "initial"),
        ({"quantile": 0.0}, "quantile"),
        ({"quantile": 1.0}, "quantile"),
        ({"learning_rate": -0.2}, "learning_rate"),
        ({"indicator_noise": 0.0}, "indicator_noise"),
        ({"minimum": 0.0}, "minimum"),
        ({"initial": 2.0, "maximum": 1.0}, "initial"),
        ({"initial": 0.1, "minimum": 0.2}, "minimum"),
        ({"maximum": math.inf}, "maximum"),
    ],
)
def test_adaptive_clipping_names_a_bad_argument(arguments, named):
    with pytest.raises(ValueError, match=f"{named}="):
        AdaptiveClipping(**arguments)


def test_the_split_of_the_noise_has_its_golden_value():
    # Andrew et al., arXiv 1905.03871: z = 1, m = 100, s_b = m / 20 = 5.
    clipping = AdaptiveClipping()
    assert clipping.indicator_stddev(1.0, 100) == 5.0
    assert clipping.update_noise_multiplier(1.0, 100) == pytest.approx(1.005038, abs=5e-7)
    grid = IntegerGrid.for_noise_multiplier(1.0, 10, indicator_noise=5.0)
    assert grid.noise_units / grid.sensitivity_units == pytest.approx(1.005038, rel=1e-4)


def test_the_indicator_gets_at_least_the_noise_of_a_small_cohort():
    assert AdaptiveClipping().indicator_stddev(3.0, 10) == 3.0
    assert AdaptiveClipping(indicator_noise=9.0).indicator_stddev(3.0, 1000) == 9.0
    assert AdaptiveClipping().indicator_stddev(0.0, 40) == 2.0


@pytest.mark.parametrize("noise_multiplier", [2.0, 2.5])
def test_an_indicator_that_would_take_the_whole_budget_is_refused(noise_multiplier):
    with pytest.raises(ValueError, match="must be < 2 \\* indicator_noise"):
        AdaptiveClipping(indicator_noise=1.0).indicator_stddev(noise_multiplier, 100)


def test_the_update_rule_is_the_papers():
    clipping = AdaptiveClipping(quantile=0.75, learning_rate=0.3)
    for fraction in (-0.2, 0.0, 0.3, 0.75, 1.0, 1.4):
        expected = 2.0 * math.exp(-0.3 * (fraction - 0.75))
        assert clipping.updated(2.0, fraction) == pytest.approx(expected, rel=1e-15)


def test_the_clip_norm_stays_within_its_bounds_whatever_the_noise():
    clipping = AdaptiveClipping(minimum=0.05, maximum=3.0)
    assert clipping.updated(0.1, 1e9) == 0.05
    assert clipping.updated(0.1, -1e9) == 3.0


@pytest.mark.parametrize("start", [0.1, 10.0])
def test_with_all_norms_1_the_clip_norm_converges_towards_1(start):
    cohort, dimension, noise_multiplier = 60, 5, 1.0
    clipping = AdaptiveClipping(initial=start)
    grid = IntegerGrid.for_noise_multiplier(
        noise_multiplier,
        dimension,
        indicator_noise=clipping.indicator_stddev(noise_multiplier, cohort),
    )
    noise, rng = RoundedGaussian(grid.noise_units), SeededRandom(5)
    unit = [np.eye(dimension)[0]]
    clip_norm, path = clipping.initial_clip_norm, []
    for _ in range(60):
        bounded = BoundedSum(grid, clip_norm=clip_norm)
        for _ in range(cohort):
            bounded.add(unit)
        noisy = bounded.total + noise.sample(grid.width, rng)
        clip_norm = clipping.updated(clip_norm, grid.fraction_within(int(noisy[-1]), cohort))
        path.append(abs(math.log(clip_norm)))
    assert max(path[30:]) < 0.3
    assert max(path[30:]) < abs(math.log(start)) / 5
    # On the way it goes straight: all fit or none, so every step is eta / 2 but for the noise.
    steps = -np.diff([abs(math.log(start)), *path[:15]])
    assert np.mean(steps) == pytest.approx(0.1, abs=0.02)
