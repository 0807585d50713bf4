from dpfl_flower.clipping import AdaptiveClipping, FixedClipping
from dpfl_strategies import DPFedAvg
from tests.support.contracts.charging import ChargeBeforeRelease
from tests.support.contracts.cohorts import SamplingThatHappened
from tests.support.contracts.freshness import FreshNoise
from tests.support.contracts.isolation import Isolation
from tests.support.contracts.leakage import NothingUnnoisedLeaves


class StrategyContract(
    Isolation, ChargeBeforeRelease, FreshNoise, SamplingThatHappened, NothingUnnoisedLeaves
):
    """Everything that a strategy must obey."""


class TestDPFedAvg(StrategyContract):
    def strategy(self, **settings):
        return DPFedAvg(clipping=FixedClipping(self.clip_norm), **settings)


class TestDPFedAvgAdaptive(StrategyContract):
    def strategy(self, **settings):
        return DPFedAvg(clipping=AdaptiveClipping(initial=self.clip_norm), **settings)

    def update_noise_multiplier(self, noise_multiplier, expected_cohort):
        # arXiv 1905.03871, Theorem 1, written out: the indicator takes its share.
        indicator_noise = max(expected_cohort / 20, noise_multiplier)
        return (noise_multiplier**-2 - (2 * indicator_noise) ** -2) ** -0.5
