"""What a step of DP-SGD releases: the clipped sum on an integer grid, with integer noise.

>>> release = NoisyGradient(noise_multiplier=0.0, clip_norm=1.0, divisor=4.0, rng=secure())
>>> release([torch.ones(2), torch.zeros(1, 1)])
[tensor([0.2500, 0.2500]), tensor([[0.]])]
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
import torch
from torch import Tensor

from dpfl_flower.client.sum_grid import SumGrid
from dpfl_flower.rng import RandomSource, secure

__all__ = ["NoisyGradient", "secure"]

_DITHER_STEP: Final = 2.0**-32


@dataclass(frozen=True)
class NoisyGradient:
    """Rounds a sum to integers, adds noise to them and divides.

    The sum is rounded with a fresh dither, noise from a table is added to the integers, and one
    conversion to float comes last: the low bits of the sum leave with no answer, and the noise is
    the one that is charged but for `SumGrid.total_variation`.

    Dither and noise of a step are drawn at once. They come from the host; on an accelerator, whose
    kernels are queued, that happens while the device still computes the sum.

    Attributes
    ----------
    noise_multiplier : float
        Standard deviation of the noise in clip norms; 0 for none.
    clip_norm : float
        How far one example moves the sum, at most.
    divisor : float
        A public constant, > 0.
    rng : RandomSource
        Where dither and noise come from.
    """

    noise_multiplier: float
    clip_norm: float
    divisor: float
    rng: RandomSource

    def __call__(self, total: Sequence[Tensor]) -> list[Tensor]:
        """Return the noisy mean, in the shapes and the dtype of ``total``."""
        if self.noise_multiplier == 0:
            return [tensor / self.divisor for tensor in total]
        sizes = [tensor.numel() for tensor in total]
        grid = sum_grid(self.noise_multiplier, sum(sizes))
        flat = torch.cat([tensor.flatten() for tensor in total])
        dither, noise = self._draw(grid, flat.device)
        unit = self.clip_norm / grid.clip_units
        cells = dither.add_(flat, alpha=1 / unit).floor_().add_(noise)
        noisy = cells.mul_(unit / self.divisor).to(flat.dtype)
        return [
            part.view(tensor.shape)
            for part, tensor in zip(torch.split(noisy, sizes), total, strict=True)
        ]

    def _draw(self, grid: SumGrid, device: torch.device) -> tuple[Tensor, Tensor]:
        n = grid.dimension
        # Multiples of 2^-32 in [0, 1), odd ones of 2^-33 in fact: symmetric about 1/2.
        words = np.frombuffer(self.rng.random_bytes(4 * n), np.uint32)
        dither = torch.from_numpy((words.astype(np.float64) + 0.5) * _DITHER_STEP)
        noise = torch.from_numpy(grid.noise.sample(n, self.rng))
        if device.type == "cuda":
            dither = dither.pin_memory().to(device, non_blocking=True)
            noise = noise.pin_memory().to(device, non_blocking=True)
        return dither, noise


@lru_cache(maxsize=64)
def sum_grid(noise_multiplier: float, dimension: int) -> SumGrid:
    """Return the grid of a model with ``dimension`` trained parameters; see `SumGrid`."""
    return SumGrid.for_noise_multiplier(noise_multiplier, dimension)
