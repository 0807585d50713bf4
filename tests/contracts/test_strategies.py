import numpy as np

from dpfl_flower.clipping import AdaptiveClipping, FixedClipping
from dpfl_strategies import DPFedAvg, NoisedMetrics
from tests.support.contracts.adaptive import AdaptiveClippingContract
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


class TestDPFedAvgAdaptive(AdaptiveClippingContract, StrategyContract):
    def strategy(self, **settings):
        return self.strategy_with(AdaptiveClipping(initial=self.clip_norm), **settings)

    def strategy_with(self, clipping, **settings):
        return DPFedAvg(clipping=clipping, **settings)


class TestDPFedAvgNoisedMetrics(
    AdaptiveClippingContract, Isolation, FreshNoise, NothingUnnoisedLeaves
):
    """Metrics ride behind update and indicator, where an answer's loss is at an end of its range.

    Their ranges are narrow, so that what moves them is next to nothing beside the clip norm.
    """

    metrics = NoisedMetrics({"loss": (-1e-9, 1e-9), "error": (0.0, 1e-9)}, share=0.05)

    def strategy(self, **settings):
        return self.strategy_with(AdaptiveClipping(initial=self.clip_norm), **settings)

    def strategy_with(self, clipping, **settings):
        if settings.get("metrics", "none") == "none":
            settings["metrics"] = self.metrics
        return DPFedAvg(clipping=clipping, **settings)

    def update_noise_multiplier(self, noise_multiplier, expected_cohort):
        alone = super().update_noise_multiplier(noise_multiplier, expected_cohort)
        return alone * (1 + self.metrics.share)

    def released_state(self, strategy, arrays):
        released = list(strategy._rounds.report.metrics.values())
        means = list(released[-1].values()) if released else [0.0] * len(self.metrics.bounds)
        return np.insert(super().released_state(strategy, arrays), -1, means)
