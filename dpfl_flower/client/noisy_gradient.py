"""What a step of DP-SGD releases: the clipped sum with noise, rounded to a public grid.

>>> release = NoisyGradient(stddev=0.0, divisor=4.0, rng=secure())
>>> release([torch.ones(2), torch.zeros(1, 1)])
[tensor([0.2500, 0.2500]), tensor([[0.]])]
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from dpfl_flower.rng import RandomSource, secure

__all__ = ["NoisyGradient", "secure"]

_GRID: Final = 2.0**-14  # of the noise's standard deviation


@dataclass(frozen=True)
class NoisyGradient:
    """Adds noise to a sum and divides it.

    The noise is drawn in floating point and added in float64; the noisy sum is then rounded to a
    grid of 2^-14 standard deviations, before anything is done with it.

    The noise of a step is drawn at once. It comes from the host; on an accelerator, whose kernels
    are queued, that happens while the device still computes the sum.

    Attributes
    ----------
    stddev : float
        Of the noise, at least 0.
    divisor : float
        A public constant, > 0.
    rng : RandomSource
        Where the noise comes from.
    """

    stddev: float
    divisor: float
    rng: RandomSource

    def __call__(self, total: Sequence[Tensor]) -> list[Tensor]:
        """Return the noisy mean, in the shapes and the dtype of ``total``."""
        if self.stddev == 0:
            return [tensor / self.divisor for tensor in total]
        sizes = [tensor.numel() for tensor in total]
        noise = torch.from_numpy(self.rng.gaussian(sum(sizes)))
        if (device := total[0].device).type == "cuda":
            noise = noise.pin_memory().to(device, non_blocking=True)
        grid = self.stddev * _GRID
        flat = torch.cat([tensor.flatten() for tensor in total])
        cells = noise.mul_(1 / _GRID).add_(flat, alpha=1 / grid).round_()
        noisy = cells.mul_(grid / self.divisor).to(flat.dtype)
        return [
            part.view(tensor.shape)
            for part, tensor in zip(torch.split(noisy, sizes), total, strict=True)
        ]
