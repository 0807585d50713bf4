"""Server optimizers: what the server does with a released (noisy) mean update.

Everything here is post-processing of a released value and costs no privacy. The mean update plays
the part of a negative gradient (Reddi et al., "Adaptive Federated Optimization", arXiv 2003.00295).

>>> import numpy as np
>>> optimizer = FedAvgM(lr=1.0, momentum=0.5)
>>> model, state = optimizer.step(np.zeros(2), np.array([1.0, -1.0]), {})
>>> model, state = optimizer.step(model, np.array([1.0, -1.0]), state)
>>> model
array([ 2.5, -2.5])
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from dpfl_flower import checks

Vector = NDArray[np.float64]
State = Mapping[str, Vector]


class ServerOptimizer(ABC):
    """Turns a model and a released mean update into the next model.

    ``step`` is a pure function: whatever must survive a round travels in ``state``, a mapping of
    names to float64 vectors (empty before the first round), so that a checkpoint holds all of it.
    """

    @abstractmethod
    def step(self, model: Vector, mean_update: Vector, state: State) -> tuple[Vector, State]:
        """Return the next model and the next state; all vectors have shape ``(d,)``."""


@final
@dataclass(frozen=True)
class FedAvg(ServerOptimizer):
    """Plain averaging: the model moves by ``lr`` times the mean update (1.0: FedAvg itself)."""

    lr: float = 1.0

    def __post_init__(self) -> None:
        checks.positive(lr=self.lr)

    def step(self, model: Vector, mean_update: Vector, state: State) -> tuple[Vector, State]:
        """Return ``model + lr * mean_update``."""
        return model + self.lr * mean_update, state


@final
@dataclass(frozen=True)
class FedAvgM(ServerOptimizer):
    """Averaging with server momentum (Hsu, Qi and Brown, arXiv 1909.06335)."""

    lr: float = 1.0
    momentum: float = 0.9

    def __post_init__(self) -> None:
        checks.positive(lr=self.lr)
        checks.non_negative(momentum=self.momentum)
        if self.momentum >= 1:
            raise ValueError(f"momentum={self.momentum!r} must be in [0, 1)")

    def step(self, model: Vector, mean_update: Vector, state: State) -> tuple[Vector, State]:
        """Return ``model + lr * v`` with ``v = momentum * v + mean_update``."""
        velocity = mean_update
        if "velocity" in state:
            velocity = self.momentum * state["velocity"] + mean_update
        return model + self.lr * velocity, {"velocity": velocity}


@dataclass(frozen=True)
class _Adaptive(ServerOptimizer, ABC):
    """What FedAdagrad, FedAdam and FedYogi share (arXiv 2003.00295, Algorithm 2)."""

    lr: float = 0.01
    beta1: float = 0.9
    tau: float = 1e-3

    def __post_init__(self) -> None:
        checks.positive(lr=self.lr, tau=self.tau)
        checks.non_negative(beta1=self.beta1)
        if self.beta1 >= 1:
            raise ValueError(f"beta1={self.beta1!r} must be in [0, 1)")

    @abstractmethod
    def _second_moment(self, previous: Vector, squared: Vector) -> Vector: ...

    def step(self, model: Vector, mean_update: Vector, state: State) -> tuple[Vector, State]:
        """Return ``model + lr * m / (sqrt(v) + tau)``; v starts at tau squared."""
        first = state.get("first_moment", np.zeros_like(model))
        second = state.get("second_moment", np.full_like(model, self.tau**2))
        first = self.beta1 * first + (1 - self.beta1) * mean_update
        second = self._second_moment(second, np.square(mean_update))
        return (
            model + self.lr * first / (np.sqrt(second) + self.tau),
            {"first_moment": first, "second_moment": second},
        )


@final
@dataclass(frozen=True)
class FedAdagrad(_Adaptive):
    """FedAdagrad: ``v += mean_update ** 2``; the paper takes ``beta1 = 0``."""

    beta1: float = 0.0

    def _second_moment(self, previous: Vector, squared: Vector) -> Vector:
        return previous + squared


@final
@dataclass(frozen=True)
class FedAdam(_Adaptive):
    """FedAdam: ``v = beta2 * v + (1 - beta2) * mean_update ** 2``."""

    beta2: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.probability(beta2=self.beta2)

    def _second_moment(self, previous: Vector, squared: Vector) -> Vector:
        return self.beta2 * previous + (1 - self.beta2) * squared


@final
@dataclass(frozen=True)
class FedYogi(_Adaptive):
    """FedYogi: ``v -= (1 - beta2) * mean_update ** 2 * sign(v - mean_update ** 2)``."""

    beta2: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.probability(beta2=self.beta2)

    def _second_moment(self, previous: Vector, squared: Vector) -> Vector:
        return previous - (1 - self.beta2) * squared * np.sign(previous - squared)
