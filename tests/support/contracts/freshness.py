"""Noise is there, full-sized and fresh: seen on nodes whose updates are zero.

Before every call that the strategy makes or receives, torch, numpy and random are put back to the
same place, so that noise which followed one of them would repeat.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord
from numpy.typing import NDArray
from scipy import stats

from dpfl_flower.accounting import EveryoneSampling
from dpfl_strategies import PrivateStrategy
from tests.support.contracts import statistics
from tests.support.contracts.seeds import reseed
from tests.support.contracts.strategy import StrategySubject, flat, quiet, run_until
from tests.support.forked import fork_and_wait, run_forked
from tests.support.recording_grid import RecordingGrid, adding, record

NODES = 2
WIDE = 40_000


class ReseedingGrid(RecordingGrid):
    """A Grid of nodes that return what they were sent; every call of it reseeds."""

    def __init__(self) -> None:
        super().__init__(adding(0.0), NODES)

    def __getattribute__(self, name: str):
        reseed()
        return super().__getattribute__(name)


class FreshNoise(StrategySubject):
    """Every released number carries noise of the stated scale that nothing else repeats."""

    @pytest.mark.parametrize("noise_multiplier", [0.7, 2.0])
    def test_the_noise_has_the_stated_scale_and_3_percent_off_is_rejected(self, noise_multiplier):
        rounds = 5
        noise, clip_norms = self.noise(
            noise_multiplier=noise_multiplier, rounds=rounds, dimension=WIDE
        )
        in_clip_norms = noise * NODES / clip_norms[:-1, None]
        stated = self.update_noise_multiplier(noise_multiplier, NODES)
        # Rounding may enlarge the noise, by 1 % at most; never the reverse.
        statistics.require_scale(in_clip_norms.ravel(), stated, allowance=0.01)
        for of_one_round in in_clip_norms:
            assert statistics.scale_fits(of_one_round, stated, highest=stated * 1.01)

    def test_no_coordinate_is_constant_or_a_copy_of_another(self):
        rounds = 40
        noise, clip_norms = self.noise(noise_multiplier=1.0, rounds=rounds, dimension=2_000)
        scaled = noise * NODES / clip_norms[:-1, None] / self.update_noise_multiplier(1.0, NODES)
        power = np.square(scaled).sum(axis=0)
        tail = statistics.FALSE_ALARM / scaled.shape[1]
        assert power.min() > stats.chi2.ppf(tail, rounds)
        assert power.max() < stats.chi2.isf(tail, rounds)
        assert np.unique(scaled, axis=1).shape == scaled.shape

    def test_rounds_and_runs_are_uncorrelated(self):
        samples = [
            of_one_round
            for _ in range(2)
            for of_one_round in self.noise(noise_multiplier=1.0, rounds=3, dimension=WIDE)[0]
        ]
        statistics.require_uncorrelated(samples)

    def test_forked_workers_and_restarts_are_uncorrelated(self, tmp_path):
        for process in range(2):
            run_forked(noise_of_forks, type(self), tmp_path / str(process))
        samples = [np.load(path) for path in sorted(tmp_path.rglob("*.npy"))]
        assert len(samples) == 8
        statistics.require_uncorrelated(samples)

    def test_two_runs_resumed_from_one_checkpoint_draw_their_own_noise(self, tmp_path):
        one = {"noise_multiplier": 1.0, "rounds": 1, "dimension": WIDE}
        self.noise(**one, planned=2, checkpoint_dir=tmp_path / "a")
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        resumed = [
            self.noise(noise_multiplier=1.0, rounds=2, dimension=WIDE, checkpoint_dir=tmp_path / d)
            for d in ("a", "b")
        ]
        assert all(len(noise) == 1 for noise, _ in resumed), "the resumed round alone"
        statistics.require_uncorrelated([noise[0] for noise, _ in resumed])

    # --- inside -------------------------------------------------------------------------------

    def noise(
        self,
        *,
        noise_multiplier: float,
        rounds: int,
        dimension: int,
        planned: int | None = None,
        **settings,
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return what each round added to the model, and all clip norms, one more."""
        settings = self.everyone(noise_multiplier=noise_multiplier, **settings)
        return self.noise_of(self.strategy(**settings), rounds, dimension, planned=planned)

    def everyone(self, **settings: Any) -> dict[str, Any]:
        """Return the settings of a strategy that asks every node, and these."""
        return {"sampling": EveryoneSampling(NODES), "wait_seconds": 0.0, **settings}

    def noise_of(
        self,
        strategy: PrivateStrategy,
        rounds: int,
        dimension: int,
        *,
        planned: int | None = None,
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return what each round of ``strategy`` added to the model, and all clip norms.

        Of ``planned`` rounds the first ``rounds`` are run, all by default.
        """
        models, clip_norms = [], []

        def look(_: int, arrays: ArrayRecord) -> None:
            reseed()
            models.append(flat(arrays))
            clip_norms.append(strategy.clip_norm)

        reseed()
        with quiet():
            run_until(
                strategy,
                ReseedingGrid(),
                start_arrays(dimension),
                rounds=rounds,
                planned=planned or rounds,
                evaluate_fn=look,
            )
        return np.diff(models, axis=0), np.array(clip_norms)


def start_arrays(dimension: int) -> ArrayRecord:
    """Return a model of ``dimension`` released entries with small and 0-d arrays among them."""
    return record(
        np.zeros(()),
        np.zeros((dimension - 4) // 2),
        np.zeros((1, 1)),
        np.array(7, np.int64),
        np.zeros(dimension - 4 - (dimension - 4) // 2),
        np.zeros(1),
        np.zeros(()),
    )


def noise_of_forks(subject: type[FreshNoise], directory: Path) -> None:
    """Save the noise of this process before and after it forked, and of two workers."""
    directory.mkdir()

    def save(name: str) -> None:
        noise, _ = subject().noise(noise_multiplier=1.0, rounds=1, dimension=WIDE)
        np.save(directory / name, noise[0])

    save("before")
    for worker in ("first", "second"):
        assert fork_and_wait(save, worker) == 0
    save("after")
