import pytest

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
    kills = 12  # what is written, and when, is the same with both kinds of clipping

    @pytest.mark.parametrize("kind", ["poisson"])  # cohorts are drawn by the same code
    def test_cohorts_are_as_stated_and_the_ledger_pays_for_what_was_recorded(self, kind):
        super().test_cohorts_are_as_stated_and_the_ledger_pays_for_what_was_recorded(kind)

    def strategy(self, **settings):
        return self.strategy_with(AdaptiveClipping(initial=self.clip_norm), **settings)

    def strategy_with(self, clipping, **settings):
        return DPFedAvg(clipping=clipping, **settings)
