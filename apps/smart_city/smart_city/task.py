"""What everybody agreed on in public: the model, one unit's training, and what it may cost."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn, optim
from torch.func import functional_call

from dpfl_flower import checks

from .data import ROWS, SensorFortnight
from .features import FEATURES, Rows

STEP: Final = 0.3
"""One unit of the model's output: how far it moves the naive forecast of the logarithm."""

_BEND: Final = 1 / 3
_BUSY: Final = 0.6
_BUSY_CENTRE: Final = 5.0

Arrays = Mapping[str, NDArray[np.float32]]
T = TypeVar("T", int, float, str)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The app's run configuration, parsed; every value is public and the same everywhere.

    Attributes
    ----------
    num_nodes
        Nodes to wait for.
    num_units
        A public count of the units on all nodes together: sensors times fortnights.
    expected_cohort
        How many of them take part in a round, on average: what sums are divided by.
    num_rounds
        Rounds.
    local_learning_rate, local_epochs
        Of a unit's own plain gradient steps, each over all its rows.
    clip_norm
        Bounds one unit's update in L2.
    server_learning_rate, server_beta2, server_tau
        Of the server optimizer, which is `FedAdam` (with ``beta1`` 0.9).
    target_epsilon, target_delta
        What all rounds may cost a unit.
    init_seed
        Of the model that training starts from.
    dataset
        Whose budget it is: the name of the units' data in the ledger.
    figure_sensor, figure_day
        The sensor to draw at the end, none if empty, and the first day of the week.
    run_dir
        Where ledger, model, result and figure go.
    """

    num_nodes: int
    num_units: int
    expected_cohort: float
    num_rounds: int
    local_learning_rate: float
    local_epochs: int
    clip_norm: float
    server_learning_rate: float
    server_beta2: float
    server_tau: float
    target_epsilon: float
    target_delta: float
    init_seed: int
    dataset: str
    figure_sensor: str
    figure_day: date
    run_dir: Path

    def __post_init__(self) -> None:
        checks.positive_int(
            num_nodes=self.num_nodes,
            num_units=self.num_units,
            num_rounds=self.num_rounds,
            local_epochs=self.local_epochs,
        )
        checks.positive(
            expected_cohort=self.expected_cohort,
            local_learning_rate=self.local_learning_rate,
            clip_norm=self.clip_norm,
            server_learning_rate=self.server_learning_rate,
            server_tau=self.server_tau,
            target_epsilon=self.target_epsilon,
        )
        checks.at_most(self.num_units, expected_cohort=self.expected_cohort)
        checks.probability(server_beta2=self.server_beta2, target_delta=self.target_delta)
        checks.non_negative_int(init_seed=self.init_seed)

    @classmethod
    def parse(cls, run_config: Mapping[str, bool | float | int | str]) -> "Settings":
        """Read Flower's ``run_config``; raise a ValueError that names a missing or wrong key."""

        def read(key: str, kind: type[T]) -> T:
            value = run_config.get(key)
            accepted = (int, float) if kind is float else kind
            if isinstance(value, bool) or not isinstance(value, accepted):
                raise ValueError(f"run config {key}={value!r} must be of type {kind.__name__}")
            return kind(value)

        return cls(
            num_nodes=read("num-nodes", int),
            num_units=read("num-units", int),
            expected_cohort=read("expected-cohort", float),
            num_rounds=read("num-server-rounds", int),
            local_learning_rate=read("local-learning-rate", float),
            local_epochs=read("local-epochs", int),
            clip_norm=read("clip-norm", float),
            server_learning_rate=read("server-learning-rate", float),
            server_beta2=read("server-beta2", float),
            server_tau=read("server-tau", float),
            target_epsilon=read("target-epsilon", float),
            target_delta=read("target-delta", float),
            init_seed=read("init-seed", int),
            dataset=read("dataset", str),
            figure_sensor=read("figure-sensor", str),
            figure_day=_day("figure-day", read("figure-day", str)),
            run_dir=Path(read("run-dir", str)),
        )

    @property
    def training(self) -> "LocalTraining":
        """How one unit trains."""
        return LocalTraining(learning_rate=self.local_learning_rate, epochs=self.local_epochs)


@dataclass(frozen=True, kw_only=True)
class LocalTraining:
    """How one unit trains: plain gradient descent, so that the order of rows plays no part.

    Attributes
    ----------
    learning_rate
        Of `torch.optim.SGD`.
    epochs
        Steps: a batch holds all of a unit's rows.
    """

    learning_rate: float
    epochs: int
    batch_size: int = ROWS

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> optim.SGD:
        """Return a fresh optimizer."""
        return optim.SGD(parameters, lr=self.learning_rate)


def new_model(*, seed: int = 0) -> nn.Sequential:
    """Return an MLP 64-32 that starts near the naive forecast; the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        last = nn.Linear(32, 1)
        model = nn.Sequential(
            nn.Linear(len(FEATURES), 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), last
        )
    with torch.no_grad():
        last.weight.mul_(0.1)
        last.bias.zero_()
    return model


def tensors(rows: Rows) -> tuple[Tensor, Tensor]:
    """Return inputs, shape ``(n, 22)``, and targets, shape ``(n, 2)``.

    A target is what the model should put out, and a weight: pedestrians are to be forecast, not
    logarithms, so that busy hours count more. The weight is made of the naive forecast, which is
    known before the hour.
    """
    wanted = (np.log1p(rows.counts) - rows.naive) / STEP
    weight = np.exp(_BUSY * (rows.naive - _BUSY_CENTRE))
    targets = np.column_stack([wanted, weight]).astype(np.float32)
    return torch.from_numpy(rows.features), torch.from_numpy(targets)


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return each row's loss, shape ``(n,)``: absolute, weighted, smooth about 0."""
    error = nn.functional.smooth_l1_loss(
        outputs[..., 0], targets[..., 0], beta=_BEND, reduction="none"
    )
    return targets[..., 1] * error


def local_update(
    arrays: Arrays, unit: SensorFortnight, *, training: LocalTraining
) -> dict[str, NDArray[np.float32]]:
    """Return how one unit would move the model: trained from ``arrays``, minus ``arrays``.

    Not yet clipped. It depends on the unit's rows, ``arrays`` and public constants alone; a unit
    without rows moves nothing.
    """
    if not len(unit.rows):
        return {name: np.zeros_like(array) for name, array in arrays.items()}
    inputs, targets = tensors(unit.rows)
    start = _parameters(arrays)
    now = start
    for _ in range(training.epochs):
        now = {name: value.requires_grad_() for name, value in now.items()}
        mean = loss(functional_call(_shape_of_model(), now, (inputs,)), targets).mean()
        slopes = torch.autograd.grad(mean, list(now.values()))
        now = {
            name: (value - training.learning_rate * slope).detach()
            for (name, value), slope in zip(now.items(), slopes, strict=True)
        }
    return {name: (now[name] - start[name].detach()).numpy() for name in arrays}


@dataclass(frozen=True)
class AbsoluteErrors:
    """How far off held-out hours were forecast. NOT PRIVATE: they are counted exactly."""

    total: float = 0.0
    count: int = 0

    def __add__(self, other: "AbsoluteErrors") -> "AbsoluteErrors":
        return AbsoluteErrors(self.total + other.total, self.count + other.count)

    @classmethod
    def of(cls, rows: Rows, forecast: NDArray[np.float64]) -> "AbsoluteErrors":
        """Measure a forecast, in people an hour."""
        return cls(float(np.abs(rows.counts - forecast).sum()), len(rows))

    @property
    def mae(self) -> float | None:
        """The mean, in people an hour; None of no hours."""
        return self.total / self.count if self.count else None


def forecast(arrays: Arrays, rows: Rows) -> NDArray[np.float64]:
    """Return the people expected in each hour, shape ``(n,)``."""
    with torch.no_grad():
        inputs = (torch.from_numpy(rows.features),)
        outputs = functional_call(_shape_of_model(), _parameters(arrays), inputs)
    expected: NDArray[np.float64] = np.expm1(rows.naive + STEP * outputs[:, 0].double().numpy())
    return np.maximum(expected, 0.0)


def evaluate(arrays: Arrays, parts: Iterable[Rows]) -> AbsoluteErrors:
    """Measure on held-out hours. NOT PRIVATE."""
    return sum(
        (AbsoluteErrors.of(rows, forecast(arrays, rows)) for rows in parts), AbsoluteErrors()
    )


def _day(key: str, text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise ValueError(f"run config {key}={text!r} must be a day like 2024-03-04") from None


@cache
def _shape_of_model() -> nn.Sequential:
    """Return a model whose own parameters are never used."""
    return new_model()


def _parameters(arrays: Arrays) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
