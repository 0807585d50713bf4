import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpfl_flower.quantize import DistributedGrid, DistributedSum, Rotation, decoded, reduced
from dpfl_flower.quantize.distributed_grid import rounded_norm_bound
from dpfl_flower.rng import SeededRandom

SEED = b"round 1"


def open_sum(bound=1000, dimension=60, clip_norm=1.0, bits=24, rng=None):
    grid = DistributedGrid.within(bound, dimension=dimension, bits=bits)
    return DistributedSum(grid, clip_norm=clip_norm, rotation_seed=SEED, rng=rng), grid


# --- the grid --------------------------------------------------------------------------------


def test_golden_rounded_norm():
    assert rounded_norm_bound(100.0, 2**20, beta=math.exp(-0.5)) == pytest.approx(522.26, abs=5e-3)


@given(st.integers(50, 2**26), st.integers(1, 2**12), st.floats(0.01, 0.99))
def test_the_clip_norm_is_the_largest_whose_rounding_stays_within_the_bound(bound, dimension, beta):
    grid = DistributedGrid.within(bound, dimension=dimension, bits=32, beta=beta)
    assert rounded_norm_bound(grid.clip_units, grid.padded, beta=beta) <= bound
    assert rounded_norm_bound(grid.clip_units * (1 + 1e-6), grid.padded, beta=beta) > bound


@given(st.integers(1, 300), st.integers(1, 64))
def test_integers_that_keep_to_the_l2_bound_keep_to_the_l1_bound(seed, dimension):
    vector = np.random.default_rng(seed).integers(-5, 6, size=64)
    vector[dimension:] = 0
    bound = math.isqrt(int(vector @ vector)) + 1
    grid = DistributedGrid(dimension=64, clip_units=1.0, sensitivity_units=bound, bits=16)
    assert np.abs(vector).sum() <= grid.l1_units
    assert grid.l1_units <= bound * min(math.sqrt(64), bound) < grid.l1_units + 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dimension", 0),
        ("clip_units", 0.0),
        ("clip_units", 1000.5),
        ("sensitivity_units", 2**26 + 1),
        ("bits", 7),
        ("bits", 63),
        ("bits", 16.0),
    ],
)
def test_impossible_grids_are_refused(field, value):
    fields = {"dimension": 8, "clip_units": 900.0, "sensitivity_units": 1000, "bits": 16}
    with pytest.raises(ValueError, match=f"{field}="):
        DistributedGrid(**{**fields, field: value})


def test_a_bound_that_rounding_alone_fills_is_refused():
    with pytest.raises(ValueError, match="allow more bits"):
        DistributedGrid.within(500, dimension=2**20, bits=16)


# --- one unit's contribution -----------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.floats(width=64, allow_nan=True, allow_infinity=True) | st.floats(-2, 2),
        min_size=5,
        max_size=5,
    ),
    st.floats(0, 1),
    st.sampled_from([8, 30, 1000, 2**26]),
)
def test_whatever_a_unit_holds_its_integers_keep_to_the_bound(values, weight, bound):
    total, grid = open_sum(bound, dimension=5, clip_norm=0.7)
    integers = total.contribution([np.array(values)], weight=weight)
    assert integers.dtype == np.int64
    assert sum(int(x) ** 2 for x in integers) <= bound**2
    assert np.abs(integers).sum() <= grid.l1_units


@pytest.mark.parametrize("bound", [17, 40, 2**20])
def test_a_unit_beyond_the_clip_norm_fills_the_bound_and_never_breaks_it(bound):
    total, _ = open_sum(bound, dimension=64)
    vector = np.full(64, 1e3)
    norms = [np.linalg.norm(total.contribution([vector])) for _ in range(200)]
    assert max(norms) <= bound
    assert max(norms) > 0.75 * bound


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_unit_with_a_number_that_is_none_contributes_zeros(bad):
    total, grid = open_sum()
    total.add([np.full(60, 0.01)])
    before = total.total
    total.add([np.array([bad] + [1.0] * 59)])
    total.add([np.full(60, 1e308)], [np.full(60, -1e308)])
    np.testing.assert_array_equal(total.total, before)
    assert before.shape == (grid.padded,)


def test_rounding_is_right_on_the_mean():
    total, grid = open_sum(40, dimension=4, rng=SeededRandom(3))
    update = np.array([0.3, -0.2, 0.1, 0.5])
    draws = np.array([total.contribution([update]) for _ in range(20_000)])
    exact = Rotation(4, SEED).apply(update) * grid.clip_units
    assert np.abs(draws - exact).max() < 1
    # Standard errors are at most 0.5 / sqrt(20,000) = 0.0035.
    np.testing.assert_allclose(draws.mean(axis=0), exact, atol=5.5 * 0.0036)
    assert len(np.unique(draws, axis=0)) > 4  # and drawn afresh


def test_a_reference_is_subtracted_and_a_weight_multiplies_before_the_clip():
    big = [np.full(30, 5.0, np.float32), torch.full((30,), 5.0)]
    less = [np.full(30, 4.9, np.float32), torch.full((30,), 4.9)]
    total, grid = open_sum(2**24, bits=40)
    total.add(big, less, weight=0.5)
    mean = decoded(
        reduced(total.total, bits=40), grid, clip_norm=1.0, rotation_seed=SEED, expected_cohort=1
    )
    np.testing.assert_allclose(mean, 0.05, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "weight", "says"),
    [
        ([np.zeros(59)], 1.0, "59 entries"),
        ([np.zeros(60, np.int64)], 1.0, "must be floating"),
        ([np.zeros(60)], 1.1, "weight=1.1"),
        ([np.zeros(60)], math.nan, "weight=nan"),
    ],
)
def test_what_does_not_fit_is_refused(values, weight, says):
    total, _ = open_sum()
    with pytest.raises(ValueError, match=says):
        total.add(values, weight=weight)


# --- the way there and back ------------------------------------------------------------------


def test_the_decoded_sum_is_the_sum_but_for_rounding():
    total, grid = open_sum(2**20, dimension=1000, clip_norm=3.0, bits=32)
    rng = np.random.default_rng(6)
    updates = rng.normal(size=(40, 1000)) / 40
    for update in updates:
        total.add([update])
    modular = reduced(total.total, bits=32)
    mean = decoded(modular, grid, clip_norm=3.0, rotation_seed=SEED, expected_cohort=40)
    # Rounding errors: 40 of at most 1 unit, of variance at most 1/4 each, turned back.
    stddev = math.sqrt(40 / 4) * grid.unit_size(3.0) / 40
    assert np.abs(mean - updates.mean(axis=0)).max() < 6 * stddev


def test_a_small_modulus_wraps_and_the_next_larger_one_does_not():
    decodings = []
    for bits in (10, 16):
        total, grid = open_sum(1000, dimension=4, bits=bits)
        for _ in range(3):
            total.add([np.array([0.5, 0.5, 0.5, 0.5])])
        modular = reduced(total.total, bits=bits)
        decodings.append(
            decoded(modular, grid, clip_norm=1.0, rotation_seed=SEED, expected_cohort=3)
        )
    assert np.abs(decodings[0] - 0.5).max() > 0.1
    assert np.abs(decodings[1] - 0.5).max() < 0.01
