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


@pytest.mark.parametrize("off", [0.97, 1.03])
@pytest.mark.parametrize("contract", [TestRoundedGaussian, TestRoundedLaplace])
def test_the_contract_sees_noise_3_percent_off(contract, off):
    class Wrong(contract):
        def noise(self, grid):
            right = super().noise(grid)
            return type(right)(round(off * right.scale))

    # 200,000 draws of a Laplace miss it once in 1e13.
    with pytest.raises(AssertionError):
        Wrong().test_the_noise_has_its_stated_law_and_3_percent_off_is_rejected()


@pytest.mark.parametrize("off", [0.97, 1.03])
@pytest.mark.parametrize("contract", [TestGaussianMechanism, TestLaplaceMechanism])
def test_the_contract_sees_a_release_3_percent_off(contract, off, monkeypatch):
    right = contract.noise.sample

    def sample(self, n, rng):
        return right(type(self)(round(off * self.scale)), n, rng)

    monkeypatch.setattr(contract.noise, "sample", sample)
    with pytest.raises(AssertionError):
        contract().test_the_noise_has_the_scale_that_is_accounted_for_and_3_percent_off_is_rejected(
            "replace-one"
        )
