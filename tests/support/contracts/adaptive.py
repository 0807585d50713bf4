"""Adaptive clipping through a whole strategy: where the clip norm goes, and what noise it takes.

Andrew, Thakkar, McMahan, Ramaswamy, "Differentially private learning with adaptive clipping",
arXiv 1905.03871.
"""

import itertools
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from numpy.typing import NDArray

from dpfl_flower.accounting import EveryoneSampling, PoissonSampling
from dpfl_flower.clipping import AdaptiveClipping
from dpfl_strategies import PrivateStrategy
from tests.support.contracts import statistics
from tests.support.contracts.freshness import NODES as NODES_WITHOUT_UPDATES
from tests.support.contracts.freshness import FreshNoise
from tests.support.contracts.strategy import StrategySubject, quiet
from tests.support.recording_grid import RecordingGrid, adding, record

NODES = 50
DIMENSION = 20


class AdaptiveClippingContract(StrategySubject):
    """Subclass it beside `StrategyContract` where the clip norm follows the updates."""

    def strategy_with(self, clipping: AdaptiveClipping, **settings: Any) -> PrivateStrategy:
        """Return the strategy with this clipping."""
        raise NotImplementedError

    def update_noise_multiplier(self, noise_multiplier: float, expected_cohort: float) -> float:
        """Theorem 1, written out for the default s_b: the indicator takes its share."""
        indicator_noise = max(expected_cohort / 20, noise_multiplier)
        return float((noise_multiplier**-2 - (2 * indicator_noise) ** -2) ** -0.5)

    @pytest.mark.parametrize("start", [0.1, 10.0])
    @pytest.mark.parametrize(
        "sampling", [EveryoneSampling(NODES), PoissonSampling(30, NODES)], ids=["everyone", "coins"]
    )
    def test_with_all_norms_one_the_clip_norm_converges_towards_one(self, start, sampling):
        clipping = AdaptiveClipping(initial=start)
        norms = self._clip_norms(clipping, _unit_updates(), rounds=50, sampling=sampling)
        distance = np.abs(np.log(norms))
        assert (np.diff(distance[:16]) < 0).mean() > 0.9, "it does not move towards 1"
        assert distance[-20:].max() < 0.5
        assert abs(np.log(norms[-20:]).mean()) < 0.2

    def test_the_noise_on_the_clip_norm_is_there_and_full_sized(self):
        # Nobody answers in time: what moves the clip norm is the indicator's noise alone.
        rounds, nodes, step = 7_500, 2, 1e-3
        clipping = AdaptiveClipping(initial=1.0, learning_rate=step)
        grid = RecordingGrid(lambda _: None, nodes)
        norms = self._clip_norms(
            clipping, grid, rounds=rounds, sampling=EveryoneSampling(nodes), give_up_after=None
        )
        noise_on_count = -np.diff(np.log(norms)) / step * nodes
        # s_b = max(m / 20, z) = 1; so many rounds miss 10 % once in 7e8, the next test sees less.
        statistics.require_scale(noise_on_count, 1.0, allowance=0.01, off=1.1, shape=False)

    @pytest.mark.parametrize("noise_multiplier", [0.5, 1.0, 3.0])
    def test_one_unit_of_noise_moves_the_clip_norm_as_far_as_stated(self, noise_multiplier):
        nodes = 10
        clipping = AdaptiveClipping(initial=1.0)
        norms = {}
        for one in (0, 1):
            with self.noise_replaced(lambda n, one=one: np.full(n, one)) as seen:
                norms[one] = self._clip_norms(
                    clipping,
                    RecordingGrid(lambda _: None, nodes),
                    rounds=1,
                    sampling=EveryoneSampling(nodes),
                    noise_multiplier=noise_multiplier,
                    give_up_after=None,
                )[-1]
        moved = np.log(norms[0] / norms[1]) / clipping.learning_rate * nodes * seen["stddev"]
        stated = max(nodes / 20, noise_multiplier)
        assert stated * (1 - 1e-6) <= moved <= stated * 1.001

    def test_the_noise_uses_the_clip_norm_that_clipped_and_not_the_next(self):
        assert isinstance(self, FreshNoise)
        rounds, dimension = 6, 80_000
        # Nobody moves, so that all fit and log C moves by -1 and noise of 1: by 4 % or less it
        # moves in one round of 52, and in five of six once in 6e7.
        far = AdaptiveClipping(initial=1.0, learning_rate=2.0)
        noise, norms = self.noise_of(
            self.strategy_with(far, **self.everyone(noise_multiplier=1.0)), rounds, dimension
        )
        stated = self.update_noise_multiplier(1.0, NODES_WITHOUT_UPDATES)
        noise *= NODES_WITHOUT_UPDATES
        # All rounds together see a scale 3 % off; a round alone misses it once in 1e9.
        used = noise / norms[:-1, None]
        statistics.require_scale(used.ravel(), stated, allowance=0.01, shape=False)
        told_apart = 0
        for of_one_round, (norm, following) in zip(used, itertools.pairwise(norms), strict=True):
            assert statistics.scale_fits(of_one_round, stated, highest=stated * 1.01)
            if abs(np.log(following / norm)) > np.log(statistics.OFF * 1.01):
                told_apart += 1
                by_the_next = of_one_round * norm / following
                assert not statistics.scale_fits(by_the_next, stated, highest=stated * 1.01)
        assert told_apart >= 2, "the clip norm hardly moves"

    def _clip_norms(
        self, clipping: AdaptiveClipping, grid: RecordingGrid, *, rounds: int, **settings: Any
    ) -> NDArray[np.float64]:
        common = {"noise_multiplier": 1.0, "wait_seconds": 0.0}
        strategy = self.strategy_with(clipping, **(common | settings))
        norms: list[float] = []
        with quiet():
            strategy.start(
                grid,
                record(np.zeros(DIMENSION)),
                rounds,
                evaluate_fn=lambda *_: norms.append(strategy.clip_norm),
            )
        return np.array(norms)


def _unit_updates() -> RecordingGrid:
    """Return a Grid whose nodes move the model by exactly 1, each its own way."""
    rng = np.random.default_rng(0)

    def update(_: Message) -> NDArray[np.float64]:
        step = rng.normal(size=DIMENSION)
        return step / np.linalg.norm(step)

    return RecordingGrid(adding(update), NODES)
