"""Several small linear layers as one contribution: as many torch calls for all as for one.

In a small model the calls cost more than what they compute.

>>> ones = nn.Parameter(torch.zeros(1, 2))
>>> part = Outer((ones,), torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0]]))
>>> (both,) = merged([part, part])
>>> both.squares()
tensor([200.], dtype=torch.float64)
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Final, final

import torch
from torch import Tensor, nn

from dpfl_flower.client.per_sample.contributions import (
    LARGEST_INPUT,
    Contribution,
    Outer,
    without,
)
from dpfl_flower.client.per_sample.full_precision import full_precision

__all__ = ["Outer", "Outers", "merged", "nn", "torch"]

_MOST_NUMBERS: Final = 1 << 16
"""Inputs and gradients that are worth copying side by side: beyond, the arithmetic costs more."""


@final
class Outers(Contribution):
    """The contributions of several `Outer`, with their inputs and gradients side by side.

    Parameters
    ----------
    parts : sequence of Outer
        Of the same records, dtype and device.
    """

    def __init__(self, parts: Sequence[Outer]) -> None:
        super().__init__(tuple(p for part in parts for p in part.parameters))
        self._parts = parts
        self._widths = [part.gradients.shape[1] for part in parts]
        inputs = [part.inputs for part in parts]
        # (records, all inputs, then all gradients)
        self._joined = torch.cat([*inputs, *(part.gradients for part in parts)], 1)

    def squares(self) -> Tensor:
        """Return the sum over the layers of ``|b|^2 (|a|^2 + 1)``, the 1 where there is a bias."""
        belongs, ones = _layout(
            tuple([part.inputs.shape[1] for part in self._parts] + self._widths),
            tuple([len(part.parameters) > 1 for part in self._parts]),
            self._joined.device,
        )
        # Sums of squares in float64: a number that is not finite spoils its own record only.
        sums = torch.addmm(ones, self._joined.double().square(), belongs)
        inputs, gradients = sums.chunk(2, 1)
        inputs.masked_fill_(inputs > LARGEST_INPUT**2, math.inf)
        return inputs.mul_(gradients).sum(1)

    def weighted_sums(self, factors: Tensor, dropped: Tensor | None) -> list[Tensor]:
        """Return one matrix product per layer; the sums for all biases are taken at once."""
        joined = without(self._joined, dropped)
        gradients = joined[:, joined.shape[1] - sum(self._widths) :]
        scaled = gradients.t() * factors.to(joined.dtype)
        of_biases = scaled.sum(1).split_with_sizes(self._widths)
        sums = []
        with full_precision(scaled):
            for part, rows, bias in zip(
                self._parts, scaled.split_with_sizes(self._widths), of_biases, strict=True
            ):
                sums.append(rows @ without(part.inputs, dropped))
                if len(part.parameters) > 1:
                    sums.append(bias)
        return sums

    def held(self) -> list[Tensor]:
        """Return what the layers hold, one after the other."""
        return [gradient for part in self._parts for gradient in part.held()]


def merged(parts: Sequence[Contribution]) -> list[Contribution]:
    """Return ``parts`` with the small linear layers among them as one.

    Parameters
    ----------
    parts : sequence of Contribution
        Of the same records.
    """
    small = [part for part in parts if isinstance(part, Outer)]
    if len(small) < 2:
        return list(parts)
    first = small[0].gradients
    numbers = sum(part.inputs.numel() + part.gradients.numel() for part in small)
    alike = all(part.inputs.dtype is part.gradients.dtype is first.dtype for part in small)
    if numbers > _MOST_NUMBERS or not alike:
        return list(parts)
    return [*(part for part in parts if not isinstance(part, Outer)), Outers(small)]


@lru_cache(maxsize=64)
def _layout(
    widths: tuple[int, ...], biases: tuple[bool, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    # Which column belongs to which part, as a matrix of ones and zeros; and the biases' ones.
    owner = torch.repeat_interleave(torch.arange(len(widths)), torch.tensor(widths))
    belongs = nn.functional.one_hot(owner, len(widths)).double()
    ones = torch.tensor([*map(float, biases), *[0.0] * len(biases)], dtype=torch.float64)
    return belongs.to(device), ones.to(device)
