from dpfl_flower.clipping import AdaptiveClipping, FixedClipping
from dpfl_strategies import DPFedAvg
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
