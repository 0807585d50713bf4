"""Bounded metrics behind the update: the same bound, the same noise, the same price."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpfl_flower.quantize import BoundedSum, IntegerGrid, Rounding

HOSTILE = [-1.0, 1.0, 0.0, -1e308, 1e308, math.inf, -math.inf, math.nan, 0.3]
places = st.sampled_from(HOSTILE) | st.floats(-1, 1)
entries = st.sampled_from([0.0, 1.0, -1.0, 1e30, -1e5, math.nan, math.inf, 1e-8])


def make_grid(dimension=4, multiplier=1.0, *, metrics=2, share=0.01, **kwargs):
    kwargs = {"max_inflation": 1.5, **kwargs}
    return IntegerGrid.for_noise_multiplier(
        multiplier, dimension, num_metrics=metrics, metric_share=share, **kwargs
    )


def make_sum(grid):
    seed = b"public" if grid.rounding is Rounding.DITHERED else None
    return BoundedSum(grid, clip_norm=1.0, dither_seed=seed)


def squared_bound(grid):
    """S_int^2 + K^2 + m K_m^2, from the grid's parts and in whole numbers."""
    metrics = grid.num_metrics * grid.metric_units**2
    return grid.sensitivity_units**2 + grid.indicator_units**2 + metrics


# --- the grid -------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(
    multiplier=st.floats(1e-3, 100),
    dimension=st.integers(1, 10**7),
    metrics=st.integers(1, 50),
    share=st.floats(1e-6, 1),
    indicator=st.none() | st.floats(0.51, 1e4),
    rounding=st.sampled_from(Rounding),
)
def test_what_is_accounted_is_at_least_what_was_asked(
    multiplier, dimension, metrics, share, indicator, rounding
):
    try:
        grid = make_grid(
            dimension,
            multiplier,
            metrics=metrics,
            share=share,
            rounding=rounding,
            indicator_noise=None if indicator is None else multiplier * indicator,
        )
    except ValueError as refused:
        assert "raise max_inflation" in str(refused)
        return
    assert grid.noise_units**2 >= Fraction(multiplier) ** 2 * squared_bound(grid)
    assert grid.noise_multiplier >= multiplier
    assert grid.noise_multiplier == pytest.approx(
        grid.noise_units / math.sqrt(squared_bound(grid)), rel=1e-15
    )
    assert (grid.num_metrics, grid.metric_units > 0) == (metrics, True)
    assert grid.width == dimension + (indicator is not None) + metrics


@pytest.mark.parametrize("share", [0.001, 0.01, 0.1, 1.0])
@pytest.mark.parametrize("metrics", [1, 2, 30])
@pytest.mark.parametrize("adaptive", [False, True])
def test_the_noise_on_the_update_grows_by_the_share(share, metrics, adaptive):
    indicator = {"indicator_noise": 2.0} if adaptive else {}
    plain = make_grid(1000, metrics=0, **indicator)
    grid = make_grid(1000, metrics=metrics, share=share, **indicator)
    assert grid.noise_units == plain.noise_units
    # K_m is rounded down by up to 1: m K_m^2 lacks up to 2 m K_m, and S_int has half as much more.
    rounding = 2e-4 + metrics * grid.metric_units / grid.sensitivity_units**2
    expected = pytest.approx(1 + share, rel=rounding)
    assert plain.sensitivity_units / grid.sensitivity_units == expected
    assert grid.unit_size(1.0) / plain.unit_size(1.0) == pytest.approx(1 + share, rel=4 * rounding)
    assert grid.indicator_units == plain.indicator_units
    assert 1 <= grid.noise_multiplier <= 1 + 2e-4  # at the same price
    expected = plain.sensitivity_units * math.sqrt((1 - (1 + share) ** -2) / metrics)
    assert grid.metric_units == pytest.approx(expected, abs=1)
    assert grid.metric_noise == grid.noise_units / grid.metric_units


def test_a_grid_without_metrics_is_what_it_was():
    grid = IntegerGrid.for_noise_multiplier(1.0, 1000, indicator_noise=5.0)
    assert (grid.num_metrics, grid.metric_units, grid.width) == (0, 0, 1001)
    assert grid == IntegerGrid.for_noise_multiplier(1.0, 1000, indicator_noise=5.0, num_metrics=0)
    with pytest.raises(ValueError, match="no metrics"):
        _ = grid.metric_noise
    assert grid.mean_places(np.zeros(1001, np.int64), 5).shape == (0,)


def test_without_noise_metrics_are_as_good_as_exact():
    grid = make_grid(multiplier=0.0)
    assert (grid.noise_units, grid.metric_units) == (0, 2**20)
    assert grid.metric_noise == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"num_metrics": -1}, "num_metrics"),
        ({"num_metrics": 1, "metric_units": 0}, "metric_units"),
        ({"num_metrics": 0, "metric_units": 1}, "num_metrics"),
        ({"num_metrics": 1, "metric_units": 1, "norm": "l1"}, "num_metrics=1 must be 0 for norm"),
        ({"num_metrics": 1, "metric_units": 2**27}, "metric_units=134217728 .* within 2"),
        ({"num_metrics": 2**53, "metric_units": 1}, "within 2"),
    ],
)
def test_a_grid_made_by_hand_is_checked(arguments, named):
    good = {"dimension": 3, "noise_units": 4, "clip_units": 9.0, "sensitivity_units": 10}
    with pytest.raises(ValueError, match=named):
        IntegerGrid(**good, **arguments)
    largest = IntegerGrid(**good, num_metrics=3, metric_units=20)
    assert (largest.largest_entry, largest.noise_multiplier) == (20, 4 / math.sqrt(1300))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [({"share": 0.0}, "metric_share"), ({"metrics": 1.5}, "num_metrics"), ({"norm": "l1"}, "l1")],
)
def test_a_bad_argument_is_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        make_grid(**arguments)


# --- the sum --------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(
    cohort=st.lists(st.tuples(st.lists(entries, min_size=1), st.lists(places, min_size=3))),
    unit=st.tuples(st.lists(entries, min_size=1), st.lists(places, min_size=3, max_size=3)),
    other=st.tuples(st.lists(entries, min_size=1), st.lists(places, min_size=3, max_size=3)),
    weight=st.sampled_from([0.0, 0.3, 1.0]),
    multiplier=st.sampled_from([0.0, 0.02, 1.0, 40.0]),
    share=st.sampled_from([0.01, 1.0]),
    adaptive=st.booleans(),
    rounding=st.sampled_from(Rounding),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_a_unit_moves_the_sum_by_its_contribution_and_that_within_what_is_charged(
    cohort, unit, other, weight, multiplier, share, adaptive, rounding, dtype
):
    grid = make_grid(
        5,
        multiplier,
        metrics=3,
        share=share,
        rounding=rounding,
        indicator_noise=max(multiplier, 1.0) if adaptive else None,
        max_inflation=60.0,
    )

    def total(units):
        bounded = make_sum(grid)
        for values, metrics in units:
            with np.errstate(over="ignore"):
                array = np.resize(np.array(values).astype(dtype), 5)
            bounded.add([array], weight=weight, metrics=metrics[:3])
        return [int(q) for q in bounded.total]

    def moved(first, second):
        return [a - b for a, b in zip(first, second, strict=True)]

    cohort = [(values, metrics) for values, metrics in cohort if len(metrics) >= 3]
    without = total(cohort)
    alone = moved(total([*cohort, unit]), without)
    assert alone == total([unit])
    assert all(abs(q) <= grid.metric_units for q in alone[-3:])
    # sum q^2 (noise multiplier)^2 <= s^2: what is charged covers it, without any rounding.
    assert sum(q * q for q in alone) <= squared_bound(grid)
    assert sum(q * q for q in alone) * Fraction(multiplier) ** 2 <= grid.noise_units**2 or (
        multiplier == 0
    )
    replaced = moved(total([*cohort, unit]), total([*cohort, other]))
    assert sum(q * q for q in replaced) <= 4 * squared_bound(grid)
    if not np.isfinite(np.array(unit[0]).astype(dtype)[:5]).all():
        assert not any(alone)


def test_metrics_at_their_extremes_and_an_update_at_the_clip_norm_use_up_the_bound():
    grid = make_grid(1, metrics=2, share=0.1)
    q = make_sum(grid).contribution([np.array([9.0])], metrics=[1.0, -1.0]).tolist()
    assert q[1:] == [grid.metric_units, -grid.metric_units]
    assert sum(v * v for v in q) == pytest.approx(squared_bound(grid), rel=1e-3)


@pytest.mark.parametrize("adaptive", [False, True])
def test_sums_equal_contributions_and_the_order_of_the_entries_is_kept(adaptive):
    grid = make_grid(2, metrics=2, **({"indicator_noise": 1.0} if adaptive else {}))
    rng = np.random.default_rng(0)
    units = [(rng.normal(size=2).astype(t), rng.uniform(-1, 1, 2)) for t in ("f4", "f8") * 3]
    bounded = make_sum(grid)
    for values, metrics in units:
        bounded.add([values], metrics=metrics)
    apart = sum(make_sum(grid).contribution([v], metrics=m) for v, m in units)
    np.testing.assert_array_equal(bounded.total, apart)
    one = make_sum(grid).contribution([np.zeros(2)], metrics=[0.5, -0.25])
    k = grid.metric_units
    assert one.tolist()[-2:] == [round(k / 2), round(-k / 4)]
    assert one.tolist()[2:-2] == ([grid.indicator_units] if adaptive else [])
    means = grid.mean_places(bounded.total, len(units))
    np.testing.assert_allclose(means, np.mean([m for _, m in units], axis=0), atol=1 / k)


def test_metrics_that_are_not_finite_count_as_missing_and_are_not_weighted():
    grid = make_grid(1, metrics=3)
    k = grid.metric_units
    bounded = make_sum(grid)
    for weight in (0.0, 0.25, 1.0):
        q = bounded.contribution([np.ones(1)], weight=weight, metrics=[math.nan, math.inf, 1.0])
        assert q.tolist()[1:] == [0, 0, k]
    zeros = bounded.contribution([np.array([math.nan])], metrics=[1.0, 1.0, 1.0])
    assert not zeros.any()


def test_metrics_that_do_not_fit_the_grid_are_refused_before_anything_is_added():
    for grid, metrics in (
        (make_grid(1), ()),
        (make_grid(1), (1.0,)),
        (make_grid(1, metrics=0), (1.0,)),
    ):
        bounded = make_sum(grid)
        for use in (bounded.add, bounded.contribution):
            with pytest.raises(ValueError, match="metrics has"):
                use([np.ones(1)], metrics=metrics)
        assert not bounded.total.any()
