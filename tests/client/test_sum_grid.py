"""Rounding a sum as a whole moves a unit no further than what is charged."""

import math

import numpy as np
import pytest

from dpfl_flower.accounting import Gaussian, Ledger
from dpfl_flower.client.noisy_gradient import NoisyGradient
from dpfl_flower.client.sum_grid import SumGrid, most_total_variation
from dpfl_flower.rng import SeededRandom, secure


@pytest.mark.parametrize("dimension", [1, 3, 1000, 200_000])
@pytest.mark.parametrize("z", [0.3, 1.0, 20.0])
@pytest.mark.parametrize("spread", ["one entry", "evenly", "halves"])
def test_one_unit_moves_the_rounded_sum_by_no_more_than_the_noise_is_charged_for(
    dimension, z, spread
):
    """Its norm is the clip norm; fractions of 1/2 are where rounding adds most."""
    grid = SumGrid.for_noise_multiplier(z, dimension)
    rng = np.random.default_rng(1)
    unit = np.zeros(dimension)
    if spread == "one entry":
        unit[0] = 1.0
    elif spread == "evenly":
        unit[:] = 1.0
    else:
        share = grid.clip_units / math.sqrt(dimension)
        unit[:] = max(0.5, math.floor(share) - 0.5)
    unit *= grid.clip_units / np.linalg.norm(unit)
    most = 0.0
    for _ in range(40):
        others, dither = rng.normal(size=dimension) * 1e4, rng.random(dimension)
        moved = np.floor(others + unit + dither) - np.floor(others + dither)
        most = max(most, float(np.linalg.norm(moved)))
    assert most <= grid.noise_units / z
    # The bound is not idle: rounding does carry the unit over its own norm.
    assert dimension < 1000 or spread == "one entry" or most > grid.clip_units


def test_the_stated_bound_is_that_of_hoeffding_in_numbers_worked_out_apart():
    z, d, b = 1.0, 1_000_000, 2.0**-100
    grid = SumGrid.for_noise_multiplier(z, d)
    s = grid.clip_units
    spread = math.sqrt(math.log(2 / b) / 2)
    squared = s**2 + 2 * s * spread + d / 4 + math.sqrt(d) * spread
    assert squared <= grid.noise_units**2
    assert squared == pytest.approx(grid.noise_units**2, rel=1e-4)


@pytest.mark.parametrize("z", [1e-5, 0.1, 1.0, 30.0, 400.0])
@pytest.mark.parametrize("d", [1, 16, 10**4, 10**6])
def test_the_noise_is_enlarged_by_a_percent_at_most_where_a_grid_is_fine_enough(z, d):
    grid = SumGrid.for_noise_multiplier(z, d)
    inflation = grid.noise_units / z / grid.clip_units
    assert 1 < inflation < (1.01 if grid.noise_units < 2**18 else 2)
    assert grid.total_variation <= most_total_variation(d) < 1e-20


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((0.0, 5), "noise_multiplier=0.0"),
        ((math.nan, 5), "noise_multiplier=nan"),
        ((1e-7, 5), "noise_multiplier=1e-07 must be 0 or >="),
        ((1.0, 0), "dimension=0"),
        ((1e6, 5), "needs a finer grid"),
    ],
)
def test_what_no_grid_can_carry_is_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        SumGrid.for_noise_multiplier(*arguments)


def test_a_sum_is_rounded_without_bias_and_its_low_bits_do_not_leave():
    torch = pytest.importorskip("torch")
    d, divisor = 50_000, 8.0
    release = NoisyGradient(1.0, divisor, SeededRandom(3))
    grid = SumGrid.for_noise_multiplier(1.0, d)
    unit = 2.0 / grid.clip_units
    (noisy,) = release([torch.full((d,), 0.3 * unit, dtype=torch.float64)], clip_norm=2.0)
    integers = noisy * divisor / unit
    assert (integers - integers.round()).abs().max() < 1e-6
    # Mean 0.3 of a unit, but for noise of 2^14 units: 6 standard errors.
    assert abs(float(integers.mean()) - 0.3) < 6 * grid.noise_units / math.sqrt(d)


def test_what_noise_strays_is_charged_to_delta():
    """A ledger whose draws were 53-bit floats would have to say so: 4e-12 a draw."""
    with Ledger.in_memory(dataset="x", delta=1e-5) as exact:
        exact.plan("m", Gaussian(5.0), 10, total_variation=SumGrid(10, 2**14, 3e3).total_variation)
        exact.charge("m")
        with Ledger.in_memory(dataset="x", delta=1e-5) as floats:
            floats.plan("m", Gaussian(5.0), 10, total_variation=4.4e-12 * 545_000)
            floats.charge("m")
            assert floats.epsilon() > exact.epsilon() * 1.01


def test_noise_that_is_drawn_ahead_is_used_once_each_and_never_by_a_forked_child(monkeypatch):
    torch = pytest.importorskip("torch")
    release = NoisyGradient(1.0, 1.0, secure(), steps=10)
    seen = [release([torch.zeros(500)], clip_norm=1.0)[0].numpy() for _ in range(25)]
    assert len({one.tobytes() for one in seen}) == 25
    assert max(abs(np.corrcoef(seen)[np.triu_indices(25, 1)])) < 6.5 / math.sqrt(500)
    ahead = NoisyGradient(1.0, 1.0, secure(), steps=10)
    ahead([torch.zeros(500)], clip_norm=1.0)
    left = [noise.clone() for _, noise in ahead._drawn]
    assert len(left) == 9
    monkeypatch.setattr("os.getpid", lambda: -1)  # as a child would see it
    ahead([torch.zeros(500)], clip_norm=1.0)
    assert not any(torch.equal(a, b) for a, (_, b) in zip(left, ahead._drawn, strict=False))


def test_no_more_noise_is_drawn_than_there_are_steps():
    torch = pytest.importorskip("torch")
    release = NoisyGradient(1.0, 1.0, secure(), steps=3)
    for left in (2, 1, 0, 0):
        release([torch.zeros(5)], clip_norm=1.0)
        assert len(release._drawn) == left


@pytest.mark.parametrize("dimension", [1, 500, 4_130, 70_000])
def test_noise_is_held_ahead_for_one_step_or_within_a_mebibyte(dimension):
    torch = pytest.importorskip("torch")
    release = NoisyGradient(1.0, 1.0, secure(), steps=1_000_000)
    release([torch.zeros(dimension)], clip_norm=1.0)
    held = sum(t.numel() * t.element_size() for pair in release._drawn for t in pair)
    assert held <= 1 << 20
    assert (held > 0) == (2 * dimension <= 1 << 16)
