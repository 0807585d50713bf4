"""Weights for checks on a model: made up, so that no weight that a server sent decides a verdict.

A head of zeros, from initialisation or from a server, would hide that a model couples its records.

>>> import torch
>>> model = torch.nn.Linear(2, 1)
>>> _ = torch.nn.init.zeros_(model.weight)
>>> with made_up_weights(model):
...     bool((model.weight == 0).any())
False
>>> bool((model.weight == 0).all())
True
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from dpfl_flower.layout import Array, as_numpy, is_floating

__all__ = ["made_up_arrays", "made_up_weights"]


@contextmanager
def made_up_weights(model: nn.Module) -> Iterator[None]:
    """Give every parameter of ``model`` made-up values inside the block, and its own back after."""
    own = [(parameter, parameter.detach().clone()) for parameter in model.parameters()]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for parameter, _ in own:
                if parameter.is_floating_point():
                    parameter.copy_(_made_up(tuple(parameter.shape), generator))
        yield
    finally:
        with torch.no_grad():
            for parameter, before in own:
                parameter.copy_(before)


def made_up_arrays(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Return arrays like ``arrays`` with made-up values where they are floating."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Array] = {}
    for name, array in arrays.items():
        found[name] = array
        if is_floating(array):
            like = as_numpy(array)
            made = _made_up(tuple(array.shape), generator).numpy()
            found[name] = np.asarray(made, like.dtype).reshape(like.shape)
    return found


def _made_up(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return matrices that keep the size of what they multiply, and vectors around 1."""
    if len(shape) < 2:
        return torch.rand(shape, generator=generator) + 0.5
    inputs = max(1, math.prod(shape[1:]))
    return torch.randn(shape, generator=generator) / math.sqrt(inputs)
