"""Grids for masked sums: fewer bytes where half the units give them, and never less noise."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpfl_flower.quantize import USUAL_NOISE_UNITS, IntegerGrid
from dpfl_flower.secagg import encoding_without_wrap, masked_grid


def grids(multiplier, dimension):
    return lambda least: IntegerGrid.for_noise_multiplier(
        multiplier, dimension, least_noise_units=least
    )


def packed(grid, parties, units=1):
    encoding = encoding_without_wrap(grid.largest_entry * units, parties, grid.width)
    return encoding.packed_bytes(grid.width)


@given(
    st.floats(0.1, 10.0), st.integers(1, 10**7), st.integers(2, 5000), st.sampled_from([1, 50, 999])
)
def test_the_grid_is_the_usual_one_or_half_as_fine_for_fewer_bytes(z, dimension, parties, units):
    usual, chosen = (
        grids(z, dimension)(USUAL_NOISE_UNITS),
        masked_grid(grids(z, dimension), parties=parties, units=units),
    )
    assert chosen.noise_multiplier >= z
    half = grids(z, dimension)(USUAL_NOISE_UNITS // 2)
    if parties * units > 128:  # rounding to nearest would lose more than 0.8 % of the noise's scale
        assert chosen == usual
    if chosen != usual:
        assert chosen == half
        assert chosen.sensitivity_units <= 1.002 * chosen.clip_units
        assert 2 * chosen.noise_units == USUAL_NOISE_UNITS
        assert packed(chosen, parties, units) < packed(usual, parties, units)
    elif parties * units <= 128 and half.sensitivity_units <= 1.002 * half.clip_units:
        assert packed(half, parties, units) >= packed(usual, parties, units)


def test_a_hundred_vectors_of_a_million_take_a_ninth_less():
    usual = grids(1.0, 10**6)(USUAL_NOISE_UNITS)
    chosen = masked_grid(grids(1.0, 10**6), parties=100)
    assert packed(usual, 100) == 3_000_000
    assert packed(chosen, 100) == pytest.approx(3_000_000 * 8 / 9, rel=1e-4)


def test_sums_of_more_units_take_half_the_units_only_with_a_dither():
    def at_least(rounding):
        return lambda least: IntegerGrid.for_noise_multiplier(
            2.0, 10_000, rounding=rounding, least_noise_units=least
        )

    chosen = {kind: masked_grid(at_least(kind), parties=200) for kind in ("nearest", "dithered")}
    assert chosen["nearest"].noise_units == USUAL_NOISE_UNITS
    assert 2 * chosen["dithered"].noise_units == USUAL_NOISE_UNITS


def test_a_long_vector_keeps_the_units_that_rounding_needs():
    # On 2^13 units rounding lengthens a vector of 10^7 entries by 0.7 %.
    assert masked_grid(grids(1.0, 10**7), parties=100).noise_units == USUAL_NOISE_UNITS


@pytest.mark.parametrize("least", [0, 3, 6000])
def test_units_that_are_no_power_of_two_are_refused(least):
    with pytest.raises(ValueError, match="least_noise_units"):
        grids(1.0, 10)(least)
