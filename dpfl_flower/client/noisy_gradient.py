"""What a step of DP-SGD releases: the clipped sum on an integer grid, with integer noise.

>>> release = NoisyGradient(noise_multiplier=0.0, divisor=4.0, rng=secure())
>>> release([torch.ones(2), torch.zeros(1, 1)], clip_norm=1.0)
[tensor([0.2500, 0.2500]), tensor([[0.]])]
"""

import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from dpfl_flower import checks
from dpfl_flower.client.device_copy import on_device
from dpfl_flower.client.device_noise import draw_on_device
from dpfl_flower.client.noise_source import NoiseSource, require_noise_source
from dpfl_flower.client.sum_grid import SumGrid
from dpfl_flower.rng import RandomSource, secure

__all__ = ["NoisyGradient", "secure"]

_DITHER_STEP: Final = 2.0**-32
_AT_ONCE: Final = 1 << 16
"""Draws that cost little more than a few: small models draw the noise of several steps.

Dither and noise take 16 bytes an entry, so what is held ahead is at most 1 MiB, or one step's.
"""


class NoisyGradient:
    """Rounds sums to integers, adds noise to them and divides.

    A sum is rounded with a fresh dither, noise from a table is added to the integers, and one
    conversion to float comes last: the low bits of the sum leave with no answer, and the noise is
    the one that is charged but for `SumGrid.total_variation`.

    Dither and noise come from the host; on an accelerator, whose kernels are queued, they are drawn
    while the device still computes the sum. Each draw is used once, and in the process that drew
    it: a forked child draws its own.

    Parameters
    ----------
    noise_multiplier : float
        Standard deviation of the noise in clip norms; 0 for none.
    divisor : float
        A public constant, > 0.
    rng : RandomSource
        Where dither and noise come from.
    steps : int
        How many sums there will be: of so many the noise may be drawn at once.
    source : NoiseSource
        ``DEVICE_PHILOX`` draws both on the sums' CUDA device, not cryptographically.
    """

    def __init__(
        self,
        noise_multiplier: float,
        divisor: float,
        rng: RandomSource,
        *,
        steps: int = 1,
        source: NoiseSource = NoiseSource.HOST,
    ) -> None:
        checks.non_negative(noise_multiplier=noise_multiplier)
        checks.positive(divisor=divisor)
        checks.positive_int(steps=steps)
        self.noise_multiplier = noise_multiplier
        self._divisor = divisor
        self._rng = rng
        self._steps = steps
        self._source = NoiseSource(source)
        self._drawn: list[tuple[Tensor, Tensor]] = []
        self._process = os.getpid()

    def __call__(self, total: Sequence[Tensor], *, clip_norm: float) -> list[Tensor]:
        """Return the noisy mean, in the shapes and the dtype of ``total``.

        Parameters
        ----------
        total : sequence of Tensor
            A sum that one example moves by at most ``clip_norm``; as many entries each time.
        clip_norm : float
            In the units of the sum.
        """
        if self.noise_multiplier == 0:
            return [tensor / self._divisor for tensor in total]
        flat: Tensor = _flatten_dense_tensors(list(total))  # type: ignore[no-untyped-call]
        noisy = self._noisy(flat, flat.numel(), clip_norm)
        return list(_unflatten_dense_tensors(noisy, total))  # type: ignore[no-untyped-call]

    def rows(self, totals: Tensor, *, clip_norm: float) -> Tensor:
        """Return the noisy means of several sums, each with noise of its own.

        Parameters
        ----------
        totals : Tensor
            Of shape ``(sums, entries)``: one example moves one row, by at most ``clip_norm``. As
            many each time.
        clip_norm : float
            In the units of the sums.
        """
        if self.noise_multiplier == 0:
            return totals / self._divisor
        return self._noisy(totals.flatten(), totals.shape[1], clip_norm).view_as(totals)

    def _noisy(self, flat: Tensor, dimension: int, clip_norm: float) -> Tensor:
        # One sum with ``dimension`` entries after the other: each entry has draws of its own.
        grid = sum_grid(self.noise_multiplier, dimension)
        dither, noise = self._next(grid, flat.numel(), flat.device)
        unit = clip_norm / grid.clip_units
        cells = dither.add_(flat, alpha=1 / unit).floor_().add_(noise)
        return cells.mul_(unit / self._divisor).to(flat.dtype)

    def _next(self, grid: SumGrid, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._source is NoiseSource.DEVICE_PHILOX:
            require_noise_source(self._source, device)
            return draw_on_device(grid.noise_units, n, device, self._rng)
        if self._process != os.getpid():
            self._process, self._drawn = os.getpid(), []
        if not self._drawn or self._drawn[-1][0].numel() != n:
            self._drawn = self._draw(grid, n, max(1, min(self._steps, _AT_ONCE // n)))
        dither, noise = self._drawn.pop()
        self._steps = max(1, self._steps - 1)
        return on_device(dither, device), on_device(noise, device)

    def _draw(self, grid: SumGrid, each: int, steps: int) -> list[tuple[Tensor, Tensor]]:
        n = steps * each
        # Odd multiples of 2^-33 in (0, 1): symmetric about 1/2. In place: what is new costs most.
        words = np.frombuffer(self._rng.random_bytes(4 * n), np.uint32)
        dither = np.multiply(words, _DITHER_STEP, dtype=np.float64)
        dither += _DITHER_STEP / 2
        # Integers below 2^53, so exact; adding up two dtypes would take twice as long.
        noise = torch.from_numpy(grid.noise.sample(n, self._rng)).double()
        drawn = (torch.from_numpy(dither), noise)
        return list(zip(*(part.view(steps, each).unbind() for part in drawn), strict=True))


@lru_cache(maxsize=64)
def sum_grid(noise_multiplier: float, dimension: int) -> SumGrid:
    """Return the grid of a model with ``dimension`` trained parameters; see `SumGrid`."""
    return SumGrid.for_noise_multiplier(noise_multiplier, dimension)
