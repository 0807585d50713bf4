import itertools
import math
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpfl_flower.clipping import Norm
from dpfl_flower.quantize import BoundedSum, IntegerGrid, Rounding
from dpfl_flower.quantize.dither import PERIOD, dither

SEED = b"public"
LONG = PERIOD + 4_000  # more than one block
HOSTILE = [0.0, 5e-324, 1e-300, 1e-45, 1e-23, 1e-8, 0.5, 1.0, 1e5, 1e30, 3e38, 1e155, 1.7e308]


def make_grid(dimension, multiplier=1.0, rounding="nearest", **kwargs):
    kwargs = {"max_inflation": 1.5, **kwargs}
    return IntegerGrid.for_noise_multiplier(multiplier, dimension, rounding=rounding, **kwargs)


def make_sum(grid, clip_norm=1.0):
    seed = SEED if grid.rounding is Rounding.DITHERED else None
    return BoundedSum(grid, clip_norm=clip_norm, dither_seed=seed)


# --- an independent computation -------------------------------------------------------------------


def by_hand(grid, clip_norm, values, reference=None, weight=1.0):
    """One unit's integers, by the definition and without blocks; None where the bound fails."""
    arrays = [*values, *(reference or [])]
    wide = any(a.dtype == np.float64 for a in arrays) or grid.sensitivity_units > 2**20
    real = np.float64 if wide else np.float32
    x = np.concatenate([np.ravel(v).astype(real) for v in values])
    if reference is not None:
        x = x - np.concatenate([np.ravel(r).astype(real) for r in reference])
    if not np.isfinite(x).all():
        return np.zeros(grid.width, np.int64)
    length = math.hypot(*x.tolist()) if grid.norm is Norm.L2 else math.fsum(map(abs, x.tolist()))
    if weight * length <= clip_norm:
        factor = weight * (grid.clip_units / clip_norm)
    else:
        factor = Fraction(grid.clip_units) / Fraction(length)
        shift = 16 - math.frexp(float(factor))[1]
        factor = float(Fraction(math.floor(factor * Fraction(2) ** shift)) / Fraction(2) ** shift)
    scale = real(factor)
    while scale > factor:
        scale = np.nextafter(scale, real(0))
    y = x * scale
    if grid.rounding is Rounding.DITHERED:
        y = y + np.resize(dither(SEED, PERIOD), x.size)
    q = [int(v) for v in np.rint(y)]
    if grid.norm is Norm.L2:
        fits = sum(v * v for v in q) <= grid.sensitivity_units**2
    else:
        fits = sum(map(abs, q)) <= grid.sensitivity_units
    if not fits:
        return None
    if grid.indicator_units:
        q.append(grid.indicator_units if weight * length <= clip_norm else -grid.indicator_units)
    return np.array(q)


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    dimension=st.integers(1, 200),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
    size=st.sampled_from([1e-20, 1e-3, 0.3, 1.0, 50.0]),
    weight=st.sampled_from([0.0, 1e-3, 0.7, 1.0]),
    multiplier=st.sampled_from([0.0, 0.005, 0.3, 1.0, 20.0]),
    rounding=st.sampled_from(Rounding),
    norm=st.sampled_from(Norm),
    with_reference=st.booleans(),
)
def test_contributions_equal_the_definition_bit_for_bit(
    seed, dimension, dtype, size, weight, multiplier, rounding, norm, with_reference
):
    rng = np.random.default_rng(seed)
    grid = make_grid(
        dimension,
        multiplier,
        rounding,
        norm=norm,
        indicator_noise=None if norm is Norm.L1 else max(multiplier, 1.0),
    )
    values = [(size * rng.standard_normal(dimension)).astype(dtype)]
    reference = [rng.standard_normal(dimension).astype(dtype)] if with_reference else None
    expected = by_hand(grid, 0.8, values, reference, weight)
    found = make_sum(grid, 0.8).contribution(values, reference, weight=weight)
    if expected is not None:
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("rounding", list(Rounding))
@pytest.mark.parametrize("dimension", [PERIOD - 1, PERIOD, PERIOD + 1, 3 * PERIOD + 1025])
def test_long_vectors_equal_the_definition_bit_for_bit(rounding, dimension):
    grid = make_grid(dimension, rounding=rounding)
    rng = np.random.default_rng(dimension)
    for size in (0.5, 20.0):  # unclipped, clipped
        values = [rng.standard_normal(dimension, dtype=np.float32)]
        values[0] *= np.float32(size / np.linalg.norm(values[0]))
        found = make_sum(grid).contribution(values)
        np.testing.assert_array_equal(found, by_hand(grid, 1.0, values))


# --- isolation and sensitivity --------------------------------------------------------------------

units = st.tuples(
    st.lists(st.sampled_from([*HOSTILE, *(-h for h in HOSTILE), math.nan, math.inf]), min_size=1),
    st.floats(0, 1),
    st.sampled_from([np.float32, np.float64]),
)


def unit_arrays(unit, dimension):
    entries, weight, dtype = unit
    with np.errstate(over="ignore"):
        return [np.resize(np.array(entries).astype(dtype), dimension)], weight


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    cohort=st.lists(units, max_size=3),
    unit=units,
    dimension=st.integers(1, 40),
    multiplier=st.sampled_from([0.0, 0.02, 1.0, 40.0]),
    rounding=st.sampled_from(Rounding),
    norm=st.sampled_from(Norm),
    clip_norm=st.sampled_from([1e-30, 1e-3, 1.0, 1e8]),
)
def test_a_unit_moves_the_sum_by_its_contribution_which_is_within_the_bound(
    cohort, unit, dimension, multiplier, rounding, norm, clip_norm
):
    grid = make_grid(
        dimension,
        multiplier,
        rounding,
        norm=norm,
        max_inflation=60.0,
        indicator_noise=None if norm is Norm.L1 else max(multiplier, 1.0),
    )
    without, with_unit = make_sum(grid, clip_norm), make_sum(grid, clip_norm)
    for other in cohort:
        values, weight = unit_arrays(other, dimension)
        without.add(values, weight=weight)
        with_unit.add(values, weight=weight)
    values, weight = unit_arrays(unit, dimension)
    with_unit.add(values, weight=weight)
    moved = with_unit.total - without.total
    alone = make_sum(grid, clip_norm).contribution(values, weight=weight)
    np.testing.assert_array_equal(moved, alone)
    q = [int(v) for v in moved[:dimension]]
    if norm is Norm.L2:
        assert sum(v * v for v in q) <= grid.sensitivity_units**2
        assert int(moved[-1]) in {-grid.indicator_units, 0, grid.indicator_units}
    else:
        assert sum(map(abs, q)) <= grid.sensitivity_units
    if not np.isfinite(values[0]).all():
        assert not moved.any()


def test_the_order_of_the_units_does_not_matter():
    grid = make_grid(LONG, rounding="dithered")
    rng = np.random.default_rng(0)
    cohort = [
        (rng.standard_normal(LONG).astype(dtype) * 10.0**size, weight)
        for dtype, size, weight in itertools.product(
            [np.float32, np.float64], [-6, -3, 0, 3], [0.3, 1.0]
        )
    ]
    totals = []
    for order in range(3):
        random.Random(order).shuffle(cohort)
        bounded = make_sum(grid)
        for values, weight in cohort:
            bounded.add([values], weight=weight)
        totals.append(bounded.total)
    np.testing.assert_array_equal(totals[0], totals[1])
    np.testing.assert_array_equal(totals[0], totals[2])
    apart = sum(make_sum(grid).contribution([v], weight=w) for v, w in cohort)
    np.testing.assert_array_equal(totals[0], apart)


@pytest.mark.parametrize("multiplier", [1.0, 0.05, 0.016, 0.0])
def test_2049_aligned_units_lose_nothing(multiplier):
    # In one float32 the sum would stop growing exactly beyond 2^24, which 1025 units reach.
    grid = make_grid(2, multiplier)
    bounded = make_sum(grid)
    unit = [np.array([0.99999, 1e-4], np.float32)]
    one = [int(q) for q in bounded.contribution(unit)]
    expected = [0, 0]
    for _ in range(2049):
        bounded.add(unit)
        expected = [total + q for total, q in zip(expected, one, strict=True)]
    assert one[0] * 2049 > 2**24
    assert bounded.total.tolist() == expected
    assert bounded.total.tolist() == expected  # asking changes nothing


def test_adding_goes_on_after_the_total_was_read():
    bounded = make_sum(make_grid(1))
    bounded.add([np.ones(1)])
    first = bounded.total
    first[:] = 0  # a copy
    bounded.add([np.ones(1)])
    assert bounded.total[0] == 2 * bounded.contribution([np.ones(1)])[0]


# --- defined outcomes -----------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, torch.bfloat16])
@pytest.mark.parametrize("dimension", [3, LONG])
def test_nan_or_infinity_anywhere_contributes_zeros(bad, dtype, dimension):
    grid = make_grid(dimension, indicator_noise=5.0)
    values = np.ones(dimension, np.float32)
    values[-1] = bad
    array = torch.tensor(values, dtype=dtype) if dtype is torch.bfloat16 else values.astype(dtype)
    bounded = make_sum(grid)
    for weight in (0.0, 0.5, 1.0):
        assert not bounded.contribution([array], weight=weight).any()
    bounded.add([array])
    bounded.add([np.zeros(dimension, np.float32)], [array] if dtype is not torch.bfloat16 else None)
    assert not bounded.total[:-1].any()


def test_a_difference_beyond_its_dtype_counts_as_infinite():
    bounded = make_sum(make_grid(1))
    big = np.array([3e38], np.float32)
    assert not bounded.contribution([big], [-big]).any()
    assert bounded.contribution([big.astype(np.float64)], [-big]).any()
    assert not bounded.contribution([np.array([1.7e308])], [np.array([-1.7e308])]).any()


@pytest.mark.parametrize("rounding", list(Rounding))
def test_a_zero_update_stays_zero_and_is_a_valid_unit(rounding):
    grid = make_grid(100, rounding=rounding, indicator_noise=5.0)
    for values, reference in (([np.zeros(100)], None), ([np.ones(100)], [np.ones(100)])):
        q = make_sum(grid).contribution(values, reference)
        assert not q[:-1].any()
        assert q[-1] == grid.indicator_units


@pytest.mark.parametrize("dimension", [4, LONG])
@pytest.mark.parametrize("rounding", list(Rounding))
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_entries_of_1e_minus_23_survive_under_a_clip_norm_of_their_size(dimension, rounding, dtype):
    # Their squares vanish in float32.
    grid = make_grid(dimension, rounding=rounding)
    values = (1e-23 * np.linspace(0.5, 1.5, dimension)).astype(dtype)
    bounded = make_sum(grid, clip_norm=1e-23 * math.sqrt(dimension) / 2)
    q = bounded.contribution([values]).astype(float)
    assert np.linalg.norm(q) == pytest.approx(grid.clip_units, rel=0.01)
    assert not make_sum(make_grid(dimension)).contribution([values]).any()


@pytest.mark.parametrize("dimension", [4, LONG])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_entries_of_1e30_are_clipped_to_the_clip_norm(dimension, dtype):
    grid = make_grid(dimension)
    q = make_sum(grid).contribution([(1e30 * np.linspace(0.5, 1.5, dimension)).astype(dtype)])
    q = q.astype(float)
    assert np.linalg.norm(q) == pytest.approx(grid.clip_units, rel=0.01)


@pytest.mark.parametrize("clip_norm", [1e-100, 1e-37, 1e37, 1e100])
def test_any_clip_norm_has_its_grid(clip_norm):
    grid = make_grid(2)
    bounded = make_sum(grid, clip_norm)
    q = bounded.contribution([np.array([clip_norm, 0.0])])
    assert q[0] == pytest.approx(grid.clip_units, abs=1)
    if clip_norm == 1e-37:  # float32 holds the entries, but not the factor
        q = bounded.contribution([np.array([clip_norm, 0.0], np.float32)])
        assert q[0] == pytest.approx(grid.clip_units, abs=1)
    half = bounded.contribution([np.array([1.0, 0.0], np.float32)], weight=0.5)
    assert half[0] == pytest.approx(min(1, 0.5 / clip_norm) * grid.clip_units, abs=1)


def test_a_clip_norm_too_small_for_float64_is_refused():
    with pytest.raises(ValueError, match="clip_norm=1e-308"):
        make_sum(make_grid(2), clip_norm=1e-308)


def test_0d_arrays_are_clipped_like_all_others():
    grid = make_grid(3)
    arrays = [np.array(300.0), np.array([0.0, 400.0])]
    q = make_sum(grid).contribution(arrays)
    np.testing.assert_array_equal(q, np.rint(np.array([0.6, 0, 0.8]) * grid.clip_units))


@pytest.mark.parametrize("array", [np.zeros(2, int), np.zeros(2, bool), torch.zeros(2).long()])
def test_integers_and_booleans_are_never_released(array):
    bounded = make_sum(make_grid(2))
    for arguments in (([array],), ([np.zeros(2)], [array])):
        with pytest.raises(ValueError, match="never released"):
            bounded.add(*arguments)


def test_every_floating_dtype_and_every_layout_in_memory_counts_the_same():
    values = np.array([[0.5, -0.25, 0.125], [0.0625, 0.5, -0.5]])
    bounded = make_sum(make_grid(6))
    expected = bounded.contribution([values])
    reference = [np.zeros(6)]
    padded = np.zeros((4, 9))
    padded[::2, ::3] = values
    read_only = values.copy()
    read_only.setflags(write=False)
    same = [
        values.astype(np.float16),
        values.astype(np.float32),
        values.astype(">f4"),
        np.asfortranarray(values),
        padded[::2, ::3],
        values[::-1][::-1],
        read_only,
        torch.tensor(values, dtype=torch.bfloat16),
        torch.tensor(values, dtype=torch.float16),
        torch.tensor(values.T.copy(), requires_grad=True).T,
    ]
    for array in same:
        np.testing.assert_array_equal(bounded.contribution([array]), expected)
        np.testing.assert_array_equal(bounded.contribution([array], reference), expected)
    rows = [values[0], np.zeros((0, 3)), values[1]]
    np.testing.assert_array_equal(bounded.contribution(rows), expected)


def test_the_caller_keeps_its_arrays():
    values, reference = np.full(LONG, 3.0, np.float32), np.ones(LONG, np.float32)
    bounded = make_sum(make_grid(LONG, rounding="dithered"))
    bounded.add([values], [reference])
    before = bounded.total
    values[:] = np.nan  # nothing of it is needed any more
    assert (reference == 1).all()
    np.testing.assert_array_equal(bounded.total, before)


def test_weights_come_before_the_clip():
    grid = make_grid(2, indicator_noise=5.0)
    bounded = make_sum(grid)
    update = [np.array([1.2, 1.6])]  # norm 2
    k = grid.indicator_units
    for weight, length, indicator in ((0, 0, k), (0.25, 0.5, k), (0.5, 1, k), (1, 1, -k)):
        q = bounded.contribution(update, weight=weight)
        expected = np.array([0.6, 0.8]) * length * grid.clip_units
        np.testing.assert_allclose(q[:2], expected, atol=0.5001)
        assert q[2] == indicator


@pytest.mark.parametrize("weight", [-1e-12, 1.0000001, 2, math.nan, math.inf, True, "1", None])
def test_a_weight_out_of_range_is_refused(weight):
    bounded = make_sum(make_grid(2))
    with pytest.raises(ValueError, match="weight="):
        bounded.add([np.ones(2)], weight=weight)
    assert not bounded.total.any()


@pytest.mark.parametrize(
    ("values", "reference", "message"),
    [
        ([np.zeros(3)], None, "arrays have 3 entries, must be 2"),
        ([], None, "arrays have 0 entries, must be 2"),
        ([np.zeros(2)], [np.zeros(3)], "arrays have 3 entries, must be 2"),
        ([np.zeros(1), np.zeros(1)], [np.zeros(2)], r"reference has arrays of \[2\] entries"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(values, reference, message):
    bounded = make_sum(make_grid(2))
    with pytest.raises(ValueError, match=message):
        bounded.add(values, reference)


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, math.nan, math.inf])
def test_a_clip_norm_that_is_no_positive_number_is_refused(clip_norm):
    with pytest.raises(ValueError, match="clip_norm="):
        BoundedSum(make_grid(2), clip_norm=clip_norm)


def test_a_dither_seed_is_given_exactly_when_it_is_used():
    with pytest.raises(ValueError, match="dither_seed=None"):
        BoundedSum(make_grid(2, rounding="dithered"), clip_norm=1.0)
    with pytest.raises(ValueError, match="dither_seed=b'x'"):
        BoundedSum(make_grid(2), clip_norm=1.0, dither_seed=b"x")


def test_ten_million_parameters():
    dimension = 10**7
    grid = IntegerGrid.for_noise_multiplier(1.0, dimension, rounding="dithered")
    bounded = make_sum(grid)
    values = np.random.default_rng(0).standard_normal(dimension, dtype=np.float32)
    bounded.add([values])
    q = bounded.total.astype(float)
    length = np.linalg.norm(q)
    assert 0.999 * grid.clip_units < length <= grid.sensitivity_units
    assert q @ values / length / np.linalg.norm(values) > 0.99


# --- rounding -------------------------------------------------------------------------------------


def test_small_entries_keep_their_direction():
    # Each entry is below one grid unit, so that rounding toward zero would leave nothing of them.
    dimension = 612_042
    nearest = IntegerGrid.for_noise_multiplier(1.0, dimension)
    assert nearest.noise_units == 2**14
    signs = np.random.default_rng(0).choice([-1.0, 1.0], dimension)
    update = (0.9 * nearest.unit_size(1.0) * signs).astype(np.float32)
    assert not np.trunc(update / nearest.unit_size(1.0)).any()
    q = make_sum(nearest).contribution([update]).astype(float)
    assert cosine(q, update) > 0.99
    dithered = IntegerGrid.for_noise_multiplier(1.0, dimension, rounding="dithered")
    q = make_sum(dithered).contribution([update]).astype(float)
    kept = q @ update / (update @ update) * dithered.unit_size(1.0)
    assert kept == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("rounding", list(Rounding))
def test_an_update_of_the_clip_norm_keeps_its_direction_and_length(rounding):
    dimension = 612_042
    grid = IntegerGrid.for_noise_multiplier(1.0, dimension, rounding=rounding)
    update = np.random.default_rng(1).standard_normal(dimension, dtype=np.float32)
    q = make_sum(grid).contribution([update]).astype(float)
    assert cosine(q, update) > 0.999
    length = np.linalg.norm(update)
    assert q @ update / length == pytest.approx(grid.clip_units, rel=1e-3)


def cosine(a, b):
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def test_dithered_rounding_is_unbiased():
    entries = np.array([0.3, -0.3, 0.01, 2.5, -7.9, 1000.2, 0.0, 1e-9])
    grid = IntegerGrid.for_noise_multiplier(1.0, entries.size, rounding="dithered")
    update = [entries * grid.unit_size(1.0)]
    rounds = 4000
    sums = np.zeros(entries.size)
    for round_ in range(rounds):
        bounded = BoundedSum(grid, clip_norm=1.0, dither_seed=round_.to_bytes(4, "big"))
        sums += bounded.contribution(update)
    # Each rounding has a standard deviation of at most 1/2 unit.
    np.testing.assert_allclose(sums / rounds, entries, atol=4.9 * 0.5 / math.sqrt(rounds))
    assert sums[6] == 0


def test_what_2000_units_agree_on_survives_dithering_and_is_lost_by_rounding_to_nearest():
    units, rounds = 2000, 30
    dithered = IntegerGrid.for_noise_multiplier(1.0, 200, rounding="dithered")
    nearest = IntegerGrid.for_noise_multiplier(1.0, 200)
    update = [np.full(200, 0.3 * dithered.unit_size(1.0))]
    lost = make_sum(nearest)
    for _ in range(units):
        lost.add(update)
    assert not lost.total.any()
    means = []
    for round_ in range(rounds):
        bounded = BoundedSum(dithered, clip_norm=1.0, dither_seed=bytes([round_]))
        for _ in range(units if round_ == 0 else 1):
            bounded.add(update)
        means.append(bounded.total / (units if round_ == 0 else 1))  # identical units round alike
    assert np.mean(means) == pytest.approx(0.3, abs=4.9 * 0.46 / math.sqrt(200 * rounds))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_unit_that_rounding_would_carry_over_the_bound_is_shrunk_into_it(dtype):
    # All entries lie just above a half, so that rounding to nearest moves all of them outwards.
    grid = make_grid(4000, multiplier=400.0, max_inflation=2.0, indicator_noise=4000.0)
    units = np.zeros(4000)
    units[:700] = np.resize([0.51, -1.51], 700)
    update = [(units * grid.unit_size(1.0)).astype(dtype)]
    assert np.linalg.norm(update[0]) < 1
    assert by_hand(grid, 1.0, update) is None
    bounded = make_sum(grid)
    q = bounded.contribution(update)
    assert 0 < int(q[:-1] @ q[:-1]) <= grid.sensitivity_units**2
    assert cosine(q[:-1].astype(float), units) > 0.9
    assert q[-1] == grid.indicator_units
    bounded.add(update)
    bounded.add(update, weight=0.9)
    expected = q + bounded.contribution(update, weight=0.9)
    np.testing.assert_array_equal(bounded.total, expected)


def test_a_unit_that_no_shrinking_brings_into_the_bound_contributes_nothing():
    # A grid that lies about its bound by a hair: what it allows is less than its clip norm.
    grid = make_grid(50, indicator_noise=5.0)
    object.__setattr__(grid, "sensitivity_units", 1)
    bounded = make_sum(grid)
    q = bounded.contribution([np.linspace(0.1, 1.0, 50)])
    assert int(q[:-1] @ q[:-1]) <= 1
    bounded.add([np.linspace(0.1, 1.0, 50)])
    np.testing.assert_array_equal(bounded.total, q)
