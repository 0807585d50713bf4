"""Nodes that add all of the noise: as fresh as a server's, and nothing else leaves them.

Sensitivity and charges are the nodes' (tests/strategies/test_local_fedavg.py).
"""

import math

import pytest

from dpfl_flower.client import NODE_LOGGER
from dpfl_flower.clipping import FixedClipping
from dpfl_strategies import LocalDPFedAvg
from tests.support.contracts import sentinel
from tests.support.contracts.freshness import FreshNoise
from tests.support.contracts.leakage import (
    NODES,
    PLACES,
    ROUNDS,
    NothingUnnoisedLeaves,
    start_arrays,
)
from tests.support.contracts.local_nodes import OnLocalNoise, on_local_noise
from tests.support.scripted_grid import ScriptedGrid


class TestLocalDPFedAvg(FreshNoise, NothingUnnoisedLeaves):
    test_metrics_that_are_let_through_say_that_they_are_not_private = None  # there are none

    def strategy(self, **settings):
        clipping = FixedClipping(self.clip_norm)
        local = LocalDPFedAvg(clipping=clipping, **on_local_noise(settings))
        return OnLocalNoise(local, self.clip_norm)

    def update_noise_multiplier(self, noise_multiplier, expected_cohort):
        return noise_multiplier * math.sqrt(expected_cohort)  # one noise a node

    @pytest.mark.parametrize("place", [place for place in PLACES if place != "exception"])
    def test_a_sentinel_is_in_nothing_that_leaves_a_node(self, place, tmp_path, caplog):
        caplog.set_level(0)
        strategy = self._watched_strategy(tmp_path, give_up_after=None)
        strategy.start(ScriptedGrid(PLACES[place], NODES), start_arrays(), num_rounds=ROUNDS)
        [grid] = strategy.grids
        assert len(grid.answered) == NODES * ROUNDS
        sentinel.require_absent_from_messages(grid.answered, "an answer")
        sentinel.require_absent_from_logs(caplog, but_for=(NODE_LOGGER,))

    @staticmethod
    def _require_absent(grid, directory, caplog, capfd):
        # Here the nodes' own log, which may say anything, is the same process's.
        sentinel.require_absent_from_messages(grid.pushed, "a message")
        sentinel.require_absent_from_logs(caplog, but_for=(NODE_LOGGER,))
        sentinel.require_absent("".join(capfd.readouterr()), "what was printed")
        sentinel.require_absent_from_directory(directory)
