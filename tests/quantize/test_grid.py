import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpfl_flower.clipping import Norm
from dpfl_flower.quantize import BoundedSum, IntegerGrid, Rounding, to_float

multipliers = st.floats(1e-3, 100)
dimensions = st.one_of(st.integers(1, 100), st.integers(1, 10**7))


def requested(multiplier, dimension, **kwargs):
    try:
        return IntegerGrid.for_noise_multiplier(multiplier, dimension, **kwargs)
    except ValueError as refused:
        assert "raise max_inflation" in str(refused)
        return None


@settings(max_examples=400)
@given(
    multiplier=multipliers,
    dimension=dimensions,
    norm=st.sampled_from(Norm),
    rounding=st.sampled_from(Rounding),
    share=st.none() | st.floats(0.51, 1e4),
)
def test_what_is_accounted_is_at_least_what_was_asked(multiplier, dimension, norm, rounding, share):
    if norm is Norm.L1:
        share = None
    noise = None if share is None else multiplier * share
    grid = requested(multiplier, dimension, norm=norm, rounding=rounding, indicator_noise=noise)
    if grid is None:
        return
    assert grid.noise_multiplier >= multiplier
    # The same without any rounding: s^2 >= z^2 (S_int^2 + K^2).
    charged = grid.sensitivity_units**2 + grid.indicator_units**2
    assert grid.noise_units**2 >= Fraction(multiplier) ** 2 * charged
    assert grid.sensitivity_units / grid.clip_units <= 1.01
    assert grid.noise_units.bit_count() == 1
    assert 2**14 <= grid.noise_units <= 2**17
    if noise is not None:
        assert grid.indicator_noise >= noise or grid.indicator_units == 1
    if multiplier <= 1 and share is None:
        assert grid.noise_multiplier <= multiplier * 1.0002  # and hardly any more


@pytest.mark.parametrize("rounding", list(Rounding))
@pytest.mark.parametrize(
    ("dimension", "draws"),
    [(1, 2000), (2, 2000), (3, 2000), (10, 2000), (100, 1000), (10_000, 100), (1_000_000, 4)],
)
def test_an_honest_unit_of_norm_exactly_c_is_never_shrunk(rounding, dimension, draws):
    grid = IntegerGrid.for_noise_multiplier(1.0, dimension, rounding=rounding)
    rng = np.random.default_rng(dimension)
    bounded = BoundedSum(grid, clip_norm=0.37, dither_seed=seed_for(grid))
    for _ in range(draws):
        unit = rng.standard_normal(dimension)
        unit *= 0.37 / np.linalg.norm(unit)
        q = bounded.contribution([unit.astype(np.float32)]).astype(float)
        if dimension == 1:
            assert abs(q[0]) >= math.floor(grid.clip_units)
        # A shrunk one would be shorter by a factor of 1 - 2^-10 at least.
        assert q @ unit / 0.37 > grid.clip_units * (1 - 2.0**-11) - 4


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    dimension=st.integers(1, 300),
    rounding=st.sampled_from(Rounding),
    multiplier=st.floats(0.01, 30),
)
def test_short_vectors_of_norm_c_surely_fit(seed, dimension, rounding, multiplier):
    grid = requested(multiplier, dimension, rounding=rounding)
    if grid is None:
        return
    unit = np.random.default_rng(seed).standard_normal(dimension)
    unit *= grid.clip_units / np.linalg.norm(unit)
    nearest, up = np.rint(unit), np.where(unit > 0, np.ceil(unit), np.floor(unit))
    worst = nearest if rounding is Rounding.NEAREST else up
    if grid.clip_units + math.sqrt(dimension) <= grid.sensitivity_units:
        assert np.linalg.norm(worst) <= grid.sensitivity_units
    if rounding is Rounding.NEAREST:
        assert np.linalg.norm(nearest) <= grid.sensitivity_units


def seed_for(grid):
    return b"public" if grid.rounding is Rounding.DITHERED else None


def test_the_grid_grows_finer_only_as_needed():
    units = [
        IntegerGrid.for_noise_multiplier(z, 10**6).noise_units for z in (0.5, 1, 8, 20, 30, 50)
    ]
    assert units == sorted(units)
    assert units[0] == units[1] == 2**14
    assert units[-1] == 2**17
    assert IntegerGrid.for_noise_multiplier(1.0, 10**7).noise_units == 2**14


def test_a_grid_that_cannot_be_fine_enough_is_refused_with_the_ways_out():
    with pytest.raises(ValueError, match=r"noise_multiplier=200.*dimension=1000000.*") as refused:
        IntegerGrid.for_noise_multiplier(200, 10**6)
    for way_out in ("raise max_inflation", "lower the noise multiplier", "fewer parameters"):
        assert way_out in str(refused.value)
    asked = IntegerGrid.for_noise_multiplier(200, 10**6, max_inflation=2.0)
    assert 1.01 < asked.sensitivity_units / asked.clip_units <= 2
    assert asked.noise_multiplier >= 200


def test_noise_too_small_to_mean_anything_is_refused():
    with pytest.raises(ValueError, match="must be 0 or at least"):
        IntegerGrid.for_noise_multiplier(1e-5, 10)


def test_without_noise_the_grid_is_as_fine_as_float32():
    grid = IntegerGrid.for_noise_multiplier(0.0, 10**6, indicator_noise=2.0)
    assert (grid.noise_units, grid.clip_units, grid.indicator_units) == (0, 2.0**24, 1)
    assert grid.noise_multiplier == 0
    assert grid.indicator_noise == 0
    for dimension in (1, 10**7):
        assert IntegerGrid.for_noise_multiplier(0, dimension).sensitivity_units <= 2**26


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"noise_multiplier": -1.0}, "noise_multiplier"),
        ({"noise_multiplier": math.nan}, "noise_multiplier"),
        ({"dimension": 0}, "dimension"),
        ({"dimension": 1.5}, "dimension"),
        ({"max_inflation": 1.0}, "max_inflation"),
        ({"max_inflation": math.inf}, "max_inflation"),
        ({"indicator_noise": 0.0}, "indicator_noise"),
        ({"indicator_noise": 0.5}, "noise_multiplier=1.0 must be < 2 \\* indicator_noise"),
        ({"norm": "l1", "indicator_noise": 4.0}, "indicator_units"),
        ({"norm": "l3"}, "l3"),
        ({"rounding": "up"}, "up"),
    ],
)
def test_a_bad_argument_is_named(arguments, named):
    arguments = {"noise_multiplier": 1.0, "dimension": 10, **arguments}
    with pytest.raises(ValueError, match=named):
        IntegerGrid.for_noise_multiplier(**arguments)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"dimension": 0}, "dimension"),
        ({"noise_units": -1}, "noise_units"),
        ({"clip_units": 11.0}, "clip_units"),
        ({"clip_units": 0.0}, "clip_units"),
        ({"sensitivity_units": 2**26 + 1}, "sensitivity_units"),
        ({"indicator_units": -1}, "indicator_units"),
        ({"indicator_units": 2**26 + 1}, "indicator_units"),
    ],
)
def test_a_grid_made_by_hand_is_checked(arguments, named):
    good = {"dimension": 3, "noise_units": 4, "clip_units": 9.0, "sensitivity_units": 10}
    assert IntegerGrid(**good).noise_multiplier == 0.4
    with pytest.raises(ValueError, match=f"{named}="):
        IntegerGrid(**{**good, **arguments})


def test_names_are_parsed():
    grid = IntegerGrid(3, 4, 9.0, 10, norm="l1", rounding="dithered")
    assert grid.norm is Norm.L1
    assert grid.rounding is Rounding.DITHERED


def test_units_follow_the_clip_norm_and_floats_come_last():
    grid = IntegerGrid.for_noise_multiplier(2.0, 10)
    assert grid.unit_size(3.0) == 3.0 / grid.clip_units
    with pytest.raises(ValueError, match="clip_norm="):
        grid.unit_size(0.0)
    mean = to_float(np.array([4, -6]), 0.5, 8)
    np.testing.assert_array_equal(mean, [0.25, -0.375])
    assert mean.dtype == np.float64
    with pytest.raises(ValueError, match="expected_cohort="):
        to_float(np.array([4]), 0.5, 0)


def test_the_noisy_fraction_counts_those_within_and_absent_units_as_halves():
    grid = IntegerGrid.for_noise_multiplier(1.0, 10, indicator_noise=5.0)
    k = grid.indicator_units
    assert grid.width == 11
    assert grid.fraction_within(100 * k, 100) == 1.0
    assert grid.fraction_within(-100 * k, 100) == 0.0
    assert grid.fraction_within(50 * k, 100) == 0.75  # 50 within, 50 dropped out
    without = IntegerGrid.for_noise_multiplier(1.0, 10)
    assert without.width == 10
    for ask in (lambda: without.indicator_noise, lambda: without.fraction_within(1, 100)):
        with pytest.raises(ValueError, match="no indicator"):
            ask()
