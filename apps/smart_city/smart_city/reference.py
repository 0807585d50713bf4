"""What can be had without privacy, and without any training. NOT PRIVATE, for comparison only."""

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import optim

from .counts import HourlyCounts
from .data import TEST, Period, held_out_rows, units_of
from .features import HISTORY
from .task import AbsoluteErrors, evaluate, loss, new_model, tensors

_EPOCHS: Final = 5
_BATCH: Final = 512
_LEARNING_RATE: Final = 2e-3


@dataclass(frozen=True)
class Reference:
    """Mean absolute errors over the hours of a period, in people an hour. NOT PRIVATE.

    Attributes
    ----------
    last_hour
        The count of the hour before.
    last_week
        The count of the same hour a week before.
    naive
        The naive forecast that the model starts from; it takes no training.
    pooled
        The app's model trained on all units' rows in one place, without clipping and noise.
    """

    last_hour: float
    last_week: float
    naive: float
    pooled: float

    @classmethod
    def of(cls, counts: HourlyCounts, *, period: Period = TEST, seed: int = 0) -> "Reference":
        """Measure all four; raise ValueError if the period has no hour to measure with."""
        start = period.start - HISTORY
        series = counts.between(start, period.end)
        last_hour = last_week = naive = AbsoluteErrors()
        parts = []
        for column, sensor in enumerate(counts.sensors):
            rows = held_out_rows(counts, sensor, period=period)
            before = rows.hours - start
            last_hour += AbsoluteErrors.of(rows, series[before - 1, column])
            last_week += AbsoluteErrors.of(rows, series[before - 168, column])
            naive += AbsoluteErrors.of(rows, np.expm1(rows.naive))
            parts.append(rows)
        pooled = evaluate(pooled_model(counts, seed=seed), parts)
        return cls(
            last_hour=_mae(last_hour),
            last_week=_mae(last_week),
            naive=_mae(naive),
            pooled=_mae(pooled),
        )


def pooled_model(counts: HourlyCounts, *, seed: int) -> dict[str, NDArray[np.float32]]:
    """Train the app's model with Adam on everybody's rows in one place. NOT PRIVATE."""
    pairs = [tensors(unit.rows) for unit in units_of(counts)]
    inputs = torch.cat([pair[0] for pair in pairs])
    targets = torch.cat([pair[1] for pair in pairs])
    model = new_model(seed=seed)
    order = torch.Generator().manual_seed(seed)
    optimizer = optim.Adam(model.parameters(), lr=_LEARNING_RATE)
    for _ in range(_EPOCHS):
        for batch in torch.split(torch.randperm(len(inputs), generator=order), _BATCH):
            optimizer.zero_grad()
            loss(model(inputs[batch]), targets[batch]).mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return {name: value.numpy().copy() for name, value in model.state_dict().items()}


def _mae(errors: AbsoluteErrors) -> float:
    if errors.mae is None:
        raise ValueError("no hour can be forecast: there is nothing to measure with")
    return errors.mae
