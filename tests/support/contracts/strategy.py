"""How the contracts get at a strategy that releases noisy sums."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord
from flwr.serverapp import Grid
from numpy.typing import NDArray

from dpfl_flower.accounting import Composed, Gaussian, PrivacyBudget, Relation, epsilon
from dpfl_flower.noise import RoundedGaussian
from dpfl_flower.wire import read_array
from dpfl_strategies import PrivateStrategy

Noise = Callable[[int], NDArray[np.int64]]

DELTA = 1e-5


class StrategySubject(ABC):
    """How a contract gets at the strategy under test.

    Attributes
    ----------
    clip_norm : float
        The clip norm of the strategy's first round.
    """

    clip_norm = 0.5

    @abstractmethod
    def strategy(self, **settings: Any) -> PrivateStrategy:
        """Return the strategy with the clip norm of the class.

        It adds the noisy mean to the model as it is. ``settings`` are keyword arguments of
        `PrivateStrategy`, among them always ``sampling`` and ``noise_multiplier``.
        """

    def update_noise_multiplier(self, noise_multiplier: float, expected_cohort: float) -> float:
        """Return the noise on the update alone, in clip norms, when the release has this much."""
        del expected_cohort
        return noise_multiplier

    def planned_rounds(self, rounds: int) -> int:
        """Return how many rounds a run is planned for that first stops after so many."""
        return rounds

    def budget_for(self, releases: int, *, nodes: int, dimension: int) -> PrivacyBudget:
        """Return what so many releases cost at noise multiplier 1, and a hair more."""
        del nodes, dimension
        events = [Composed(Gaussian(1.0), releases)]
        spent = epsilon(events, delta=DELTA, relation=Relation.ADD_OR_REMOVE_ONE)
        return PrivacyBudget(epsilon=spent * 1.0001, delta=DELTA)

    def released_state(self, strategy: PrivateStrategy, arrays: ArrayRecord) -> NDArray[np.float64]:
        """Return all that a round released, each entry linear in one noisy integer or constant."""
        # Adaptive clipping: log C moves by the noisy fraction times a constant.
        return np.append(flat(arrays), np.log(strategy.clip_norm))

    @contextmanager
    def noise_replaced(self, noise: Noise) -> Iterator[dict[str, float]]:
        """Let the strategy draw ``noise(n)``; yields the standard deviation that it would have."""
        seen: dict[str, float] = {}

        def sample(distribution: RoundedGaussian, n: int, rng: object) -> NDArray[np.int64]:
            del rng
            seen["stddev"] = distribution.scale
            return noise(n)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RoundedGaussian, "sample", sample)
            yield seen


def flat(arrays: ArrayRecord) -> NDArray[np.float64]:
    """Return all floating entries of a record as one float64 vector."""
    found = (read_array(array) for array in arrays.values())
    return np.concatenate([a.ravel().astype(np.float64) for a in found if a.dtype.kind == "f"])


class Enough(Exception):
    """Ends a run after the rounds that a contract wants of it, as a crash would."""


def run_until(
    strategy: PrivateStrategy, grid: Grid, arrays: ArrayRecord, *, rounds: int, planned: int, **more
) -> None:
    """Run a strategy that is planned for ``planned`` rounds, and let it crash after ``rounds``."""
    look = more.pop("evaluate_fn", None)

    def stop(server_round: int, released: ArrayRecord) -> None:
        if look is not None:
            look(server_round, released)
        if rounds < planned and server_round >= rounds:
            raise Enough

    with suppress(Enough):
        strategy.start(grid, arrays, num_rounds=planned, evaluate_fn=stop, **more)


@contextmanager
def quiet() -> Iterator[None]:
    """Log nothing inside: thousands of rounds say the same."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
