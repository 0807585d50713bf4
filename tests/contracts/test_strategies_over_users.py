"""A strategy over the users inside nodes obeys what one over nodes does.

But for how a cohort is drawn: that is up to each node's own coins (tests/client/users).
"""

from dpfl_flower.clipping import AdaptiveClipping, FixedClipping
from dpfl_strategies import DPFedAvg
from tests.support.contracts.charging import ChargeBeforeRelease
from tests.support.contracts.freshness import FreshNoise
from tests.support.contracts.isolation import Isolation
from tests.support.contracts.leakage import NothingUnnoisedLeaves
from tests.support.contracts.users_in_nodes import OverUsers, over_users


class OverUsersContract(Isolation, ChargeBeforeRelease, FreshNoise, NothingUnnoisedLeaves):
    """Everything that does not depend on who draws."""


class TestDPFedAvgOverUsers(OverUsersContract):
    def strategy(self, **settings):
        return OverUsers(DPFedAvg(clipping=FixedClipping(self.clip_norm), **over_users(settings)))


class TestDPFedAvgAdaptiveOverUsers(Isolation, NothingUnnoisedLeaves):
    def strategy(self, **settings):
        clipping = AdaptiveClipping(initial=self.clip_norm)
        return OverUsers(DPFedAvg(clipping=clipping, **over_users(settings)))
