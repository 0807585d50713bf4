"""Dither and integer noise drawn on a device by torch's own generator: NOT cryptographic.

The law is the host's: the same table of 127-bit probabilities, inverted with 127 bits of the
generator a draw. Only the bits differ, see `NoiseSource.DEVICE_PHILOX`.

>>> from dpfl_flower.rng import secure
>>> dither, noise = draw_on_device(16, 5, torch.device("cpu"), secure())
>>> dither.shape, noise.dtype, bool((noise == noise.round()).all())
(torch.Size([5]), torch.float64, True)
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, takewhile
from typing import Final

import numpy as np
import torch
from torch import Tensor

from dpfl_flower.noise.rounded_gaussian import probabilities
from dpfl_flower.noise.table import PROBABILITY_BITS
from dpfl_flower.rng import RandomSource

__all__ = ["draw_on_device"]

_FULL_RANGE: Final = -(2**63)
_POSITIVE: Final = 2**63 - 1
_LOW_WORD: Final = 2**32 - 1
_DITHER_STEP: Final = 2.0**-32
_AT_ONCE: Final = 1 << 24
_TIES: Final = 16
"""How many draws may tie with a threshold in their first 63 bits and still be settled exactly.

A draw ties with a probability of at most (26 s + 1) 2^-63, below 2^-40 at the widest s = 2^18, so
17 of 2^24 do with one below 2^-272 / 17!: nothing beside the 2^-100 that `SumGrid` charges.
"""


def draw_on_device(
    scale: int, n: int, device: torch.device, rng: RandomSource
) -> tuple[Tensor, Tensor]:
    """Return dither and rounded-Gaussian noise for ``n`` entries, float64, on ``device``.

    The generator is seeded anew, by 64 bits of ``rng``, and forgotten. On CUDA it is Philox; on a
    CPU, for tests of the law only, Mersenne's twister. The host waits for nothing.

    Parameters
    ----------
    scale : int
        Standard deviation of the noise in grid units; see `RoundedGaussian`.
    n : int
    device : torch.device
    rng : RandomSource
        Where the seed comes from.

    Returns
    -------
    dither : Tensor
        Odd multiples of 2^-33 in (0, 1).
    noise : Tensor
        Integers.
    """
    generator = torch.Generator(device)
    generator.manual_seed(int.from_bytes(rng.random_bytes(8), "little"))
    dither = (_words(n, device, generator) & _LOW_WORD).double().add_(0.5).mul_(_DITHER_STEP)
    parts = [
        _noise(scale, min(_AT_ONCE, n - start), device, generator)
        for start in range(0, n, _AT_ONCE)
    ]
    return dither, torch.cat(parts).double() if parts else torch.zeros_like(dither)


def _words(n: int, device: torch.device, generator: torch.Generator) -> Tensor:
    # 64 bits each.
    words = torch.empty(n, dtype=torch.int64, device=device)
    return words.random_(_FULL_RANGE, None, generator=generator)


def _noise(scale: int, n: int, device: torch.device, generator: torch.Generator) -> Tensor:
    table = _table(scale, device)
    first, second = table.first, table.second
    words = _words(n + 1, device, generator) & _POSITIVE  # the last is where no tie points to
    passed = torch.searchsorted(first, words, right=True)
    tied = first[(passed - 1).clamp_(min=0)] == words
    tied[n] = False
    # By all 127 bits, for as many places whether there are ties or not: no size is asked for.
    places = torch.nonzero_static(tied, size=_TIES, fill_value=n).squeeze(1)
    word = words[places].unsqueeze(1)
    rest = _words(_TIES, device, generator).unsqueeze(1)
    below = (first < word) | ((first == word) & (second <= rest))
    passed[places] = below.sum(1)
    return passed[:n] + table.lowest


@dataclass(frozen=True)
class _Table:
    """Cumulative probabilities, as 63 bits and signed 64 bits; ``lowest`` is the least value."""

    first: Tensor
    second: Tensor
    lowest: int


@lru_cache(maxsize=4)
def _table(scale: int, device: torch.device) -> _Table:
    half = probabilities(scale)
    sums = accumulate(half[:0:-1] + half)
    reachable = list(takewhile(lambda total: total < 1 << PROBABILITY_BITS, sums))
    first = np.array([total >> 64 for total in reachable], dtype=np.int64)
    second = np.array([total & (2**64 - 1) for total in reachable], dtype=np.uint64)
    shifted = (second ^ np.uint64(2**63)).view(np.int64)  # in the order of the unsigned
    return _Table(
        torch.from_numpy(first).to(device), torch.from_numpy(shifted).to(device), 1 - len(half)
    )
