import numpy as np
import pytest
from scipy import stats

from dpfl_flower.clipping import Norm
from dpfl_flower.mechanisms import GaussianMechanism, LaplaceMechanism
from dpfl_flower.noise import RoundedGaussian, RoundedLaplace
from dpfl_flower.quantize import IntegerGrid
from tests.support.contracts.mechanism import MechanismContract
from tests.support.contracts.release import ReleaseContract


class TestRoundedGaussian(MechanismContract):
    def grid(self, noise_multiplier, dimension, rounding):
        return IntegerGrid.for_noise_multiplier(
            noise_multiplier, dimension, rounding=rounding, max_inflation=1.5
        )

    def noise(self, grid):
        return RoundedGaussian(grid.noise_units)

    def law(self, grid, scale, x):
        return stats.norm.cdf(x / (scale * grid.noise_units))


class TestRoundedGaussianWithIndicator(TestRoundedGaussian):
    def grid(self, noise_multiplier, dimension, rounding):
        return IntegerGrid.for_noise_multiplier(
            noise_multiplier,
            dimension,
            rounding=rounding,
            indicator_noise=max(1.0, noise_multiplier),
            max_inflation=1.5,
        )


class TestRoundedLaplace(MechanismContract):
    def grid(self, noise_multiplier, dimension, rounding):
        return IntegerGrid.for_noise_multiplier(
            noise_multiplier, dimension, norm=Norm.L1, rounding=rounding, max_inflation=50.0
        )

    def noise(self, grid):
        return RoundedLaplace(grid.noise_units)

    def law(self, grid, scale, x):
        return stats.laplace.cdf(np.asarray(x) / (scale * grid.noise_units))


class TestGaussianMechanism(ReleaseContract):
    noise = RoundedGaussian

    def mechanism(self, relation):
        return GaussianMechanism(
            epsilon=2.0, delta=1e-6, clip_norm=self.clip_norm, relation=relation
        )

    def cdf(self, x):
        return stats.norm.cdf(x)


class TestLaplaceMechanism(ReleaseContract):
    noise = RoundedLaplace

    def mechanism(self, relation):
        return LaplaceMechanism(
            epsilon=1.0, clip_norm=self.clip_norm, relation=relation, max_inflation=1.01
        )

    def cdf(self, x):
        return stats.laplace.cdf(x)


def test_the_contract_sees_a_planted_fault():
    class TooSmall(TestRoundedGaussian):
        def noise(self, grid):
            return RoundedGaussian(round(0.97 * grid.noise_units))

    with pytest.raises(AssertionError):
        TooSmall().test_the_noise_has_its_stated_law_and_3_percent_off_is_rejected()
