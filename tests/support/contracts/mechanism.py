"""What an integer mechanism must obey: a grid, the bounded sum over it, and its noise."""

import itertools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dpfl_flower.clipping import Norm
from dpfl_flower.noise import NoiseDistribution
from dpfl_flower.quantize import BoundedSum, IntegerGrid, Rounding
from dpfl_flower.rng import secure
from tests.support.contracts import statistics
from tests.support.contracts.hostile import UNIT_KINDS, unit_arrays
from tests.support.contracts.seeds import reseed

CLAIMS = settings(
    max_examples=100,
    deadline=None,
    # A claim is inherited by several classes, which is the point of it.
    suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow],
)
DITHER_SEED = b"public"
DRAWS = 200_000


@dataclass(frozen=True)
class Unit:
    """One unit's data: what it answers and how much it counts."""

    kind: str
    seed: int
    weight: float
    dtype: str


units = st.builds(
    Unit,
    kind=st.sampled_from(UNIT_KINDS),
    seed=st.integers(0, 2**32 - 1),
    weight=st.one_of(st.sampled_from([0.0, 1e-300, 0.5, 1.0]), st.floats(0, 1)),
    dtype=st.sampled_from(["float16", "float32", "float64", "bfloat16"]),
)


@dataclass(frozen=True)
class Case:
    """A round: its public constants, a cohort, and the unit that is there or not."""

    noise_multiplier: float
    dimension: int
    rounding: Rounding
    clip_norm: float
    cohort: tuple[Unit, ...]
    unit: Unit
    other: Unit


cases = st.builds(
    Case,
    noise_multiplier=st.sampled_from([0.0, 0.02, 0.5, 1.0, 1.7, 8.0, 40.0]),
    dimension=st.one_of(st.integers(1, 40), st.sampled_from([4095, 4097, 70_000])),
    rounding=st.sampled_from(list(Rounding)),
    clip_norm=st.sampled_from([1e-6, 0.1, 1.0, 3.7, 1e5]),
    cohort=st.lists(units, max_size=3).map(tuple),
    unit=units,
    other=units,
)


class MechanismContract(ABC):
    """Subclass it, name the grid, the noise and the exact law, and inherit the claims."""

    @abstractmethod
    def grid(self, noise_multiplier: float, dimension: int, rounding: Rounding) -> IntegerGrid:
        """Return the grid of a release: every case above must have one, or nothing is shown."""

    @abstractmethod
    def noise(self, grid: IntegerGrid) -> NoiseDistribution:
        """Return the noise that is added to the sum on ``grid``, which is noisy."""

    @abstractmethod
    def law(self, grid: IntegerGrid, scale: float, x: NDArray) -> NDArray:
        """Return P(noise before rounding <= x) if its scale were ``scale`` times the stated one."""

    # --- isolation and sensitivity ------------------------------------------------------------

    @CLAIMS
    @given(case=cases)
    def test_one_unit_moves_the_integer_sum_by_at_most_the_bound(self, case):
        grid = self._grid(case)
        moved = self._sum(grid, case, [*case.cohort, case.unit]) - self._sum(
            grid, case, case.cohort
        )
        self._require_within(grid, moved, units=1)
        alone = self._sum(grid, case, [case.unit])
        np.testing.assert_array_equal(moved, alone, "what a unit adds depends on others")

    @CLAIMS
    @given(case=cases)
    def test_replacing_a_unit_moves_the_integer_sum_by_at_most_twice_the_bound(self, case):
        grid = self._grid(case)
        moved = self._sum(grid, case, [*case.cohort, case.unit]) - self._sum(
            grid, case, [*case.cohort, case.other]
        )
        self._require_within(grid, moved, units=2)

    @CLAIMS
    @given(case=cases)
    def test_the_bound_is_no_more_than_what_the_noise_is_accounted_for(self, case):
        grid = self._grid(case)
        assert grid.noise_multiplier >= case.noise_multiplier
        bound = Fraction(grid.sensitivity_units)
        stated = Fraction(case.noise_multiplier)
        if grid.norm is Norm.L2:
            total = bound**2 + Fraction(grid.indicator_units) ** 2
            assert total * stated**2 <= Fraction(grid.noise_units) ** 2
        else:
            assert not grid.indicator_units
            assert bound * stated <= Fraction(grid.noise_units)

    @CLAIMS
    @given(case=cases, order=st.randoms(use_true_random=False))
    def test_the_sum_is_exact_in_any_order(self, case, order):
        grid = self._grid(case)
        cohort = [*case.cohort, case.unit, case.other, case.unit]
        shuffled = list(cohort)
        order.shuffle(shuffled)
        total = self._sum(grid, case, cohort)
        np.testing.assert_array_equal(total, self._sum(grid, case, shuffled))
        np.testing.assert_array_equal(total, sum(self._sum(grid, case, [u]) for u in cohort))
        assert total.dtype == np.int64

    @pytest.mark.parametrize("noise_multiplier", [1.0, 8.0])
    @pytest.mark.parametrize("dimension", [3, 4097, 70_000])
    def test_a_unit_made_to_be_rounded_up_everywhere_stays_within_the_bound(
        self, dimension, noise_multiplier
    ):
        grid = self.grid(noise_multiplier, dimension, Rounding.NEAREST)
        bounded = BoundedSum(grid, clip_norm=grid.clip_units)  # a grid unit measures 1
        vector = _just_above_halves(grid)
        assert np.linalg.norm(np.rint(vector), 2 if grid.norm is Norm.L2 else 1) > grid.clip_units
        bounded.add([vector])
        self._require_within(grid, bounded.total, units=1)

    @pytest.mark.parametrize("weight", [-1e-9, 1.0 + 1e-9, float("nan"), float("inf"), "1", None])
    def test_a_weight_that_would_break_the_bound_is_refused(self, weight):
        bounded = BoundedSum(self.grid(1.0, 2, Rounding.NEAREST), clip_norm=1.0)
        with pytest.raises(ValueError, match="weight="):
            bounded.add([np.ones(2)], weight=weight)
        assert not bounded.total.any()

    # --- noise is there, full-sized, fresh ----------------------------------------------------

    def test_the_noise_has_its_stated_law_and_3_percent_off_is_rejected(self):
        grid = self.grid(1.0, 3, Rounding.NEAREST)
        draws = self._draws(grid)
        assert draws.dtype == np.int64
        assert statistics.cells_fit(draws, lambda x: self.law(grid, 1.0, x))
        statistics.require_scale_of_law(draws, lambda scale, x: self.law(grid, scale, x))

    def test_the_noise_follows_no_seed_but_its_own(self):
        grid = self.grid(1.0, 3, Rounding.NEAREST)
        draws = [self._draws(grid).astype(float) for _ in range(3)]
        statistics.require_uncorrelated(draws)
        assert all(np.mean(a == b) < 0.01 for a, b in itertools.pairwise(draws))

    def test_neighbouring_draws_are_uncorrelated(self):
        draws = self._draws(self.grid(1.0, 3, Rounding.NEAREST)).astype(float)
        statistics.require_uncorrelated([draws[:-2], draws[1:-1], draws[2:]])

    # --- inside -------------------------------------------------------------------------------

    def _draws(self, grid: IntegerGrid) -> NDArray[np.int64]:
        reseed()
        return self.noise(grid).sample(DRAWS, secure())

    def _grid(self, case: Case) -> IntegerGrid:
        return self.grid(case.noise_multiplier, case.dimension, case.rounding)

    @staticmethod
    def _sum(grid: IntegerGrid, case: Case, cohort) -> NDArray[np.int64]:
        seed = DITHER_SEED if grid.rounding is Rounding.DITHERED else None
        bounded = BoundedSum(grid, clip_norm=case.clip_norm, dither_seed=seed)
        for unit in cohort:
            values, reference = unit_arrays(
                unit.kind, unit.seed, unit.dtype, case.dimension, case.clip_norm
            )
            bounded.add(values, reference, weight=unit.weight)
        return bounded.total

    @staticmethod
    def _require_within(grid: IntegerGrid, moved: NDArray[np.int64], *, units: int) -> None:
        vector = [int(q) for q in moved[: grid.dimension]]
        rest = [int(q) for q in moved[grid.dimension :]]
        assert len(rest) == bool(grid.indicator_units)
        assert all(abs(q) <= units * grid.indicator_units for q in rest)
        if units == 1:
            assert all(abs(q) in {0, grid.indicator_units} for q in rest)
        bound = units * grid.sensitivity_units
        if grid.norm is Norm.L2:
            assert sum(q * q for q in vector) <= bound**2
        else:
            assert sum(map(abs, vector)) <= bound


def _just_above_halves(grid: IntegerGrid) -> NDArray[np.float64]:
    """Return a vector within the clip norm whose entries are all rounded up by a half, or zero."""
    power = 2 if grid.norm is Norm.L2 else 1
    most = (grid.clip_units * (1 - 1e-9)) ** power
    low = max(np.floor(grid.clip_units / grid.dimension ** (1 / power)) - 0.5, 0.5) + 1e-6
    vector = np.zeros(grid.dimension)
    vector[: int(most / low**power)] = low
    # As many entries one higher as the clip norm leaves room for.
    room = most - np.sum(vector**power)
    vector[: int(room / ((low + 1) ** power - low**power))] += 1
    return vector
