"""The model that the hospitals train, and how a hospital trains it on its own."""

import functools
from collections.abc import Iterable
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import TensorDataset

from .features import FEATURES, design
from .patients import Patient

LOSS: Final = nn.BCEWithLogitsLoss(reduction="none")
"""One loss per patient: logistic regression."""


class GradientDescent:
    """Plain steps, with momentum (the sum of gradients, each step's memory fading).

    ``torch.optim`` imports a compiler first, which takes longer than training here.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, lr: float, momentum: float = 0.0
    ) -> None:
        self._parameters, self._lr, self._momentum = list(parameters), lr, momentum
        self._velocity = [torch.zeros_like(parameter) for parameter in self._parameters]

    def step(self) -> None:
        """Move each parameter by its gradient."""
        with torch.no_grad():
            for parameter, velocity in zip(self._parameters, self._velocity, strict=True):
                if parameter.grad is not None:
                    velocity.mul_(self._momentum).add_(parameter.grad)
                    parameter.sub_(velocity, alpha=self._lr)

    def zero_grad(self, *, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        del set_to_none
        for parameter in self._parameters:
            parameter.grad = None


def new_model() -> nn.Linear:
    """Return the model that training starts from: all zeros, so that nothing depends on a seed."""
    model = nn.Linear(len(FEATURES), 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


@functools.lru_cache(maxsize=16)  # a simulated hospital is asked in every round
def tensors(patients: tuple[Patient, ...]) -> TensorDataset:
    """Return features, shape ``(n, 15)``, and labels, shape ``(n, 1)``."""
    x, y = design(patients)
    return TensorDataset(torch.from_numpy(x), torch.from_numpy(y[:, None]))


def probabilities(model: nn.Module, data: TensorDataset) -> NDArray[np.float64]:
    """Return each patient's probability of disease, shape ``(n,)``."""
    with torch.no_grad():
        scores: NDArray[np.float64] = torch.sigmoid(model(data.tensors[0]).double())[:, 0].numpy()
    return scores
