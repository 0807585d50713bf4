"""By what factor each record's gradient is scaled, and which records count as zeros.

>>> squares = torch.tensor([0.25, 4.0, math.nan], dtype=torch.float64)
>>> scaled = Clip(1.0).scaling([squares])
>>> [round(float(factor), 6) for factor in scaled.factors[0]], scaled.dropped
([1.0, 0.5, 0.0], tensor([False, False,  True]))
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from dpfl_flower import checks
from dpfl_flower.client.clip_style import ClipStyle

_MARGIN: Final = 1 - 2.0**-22
_LIMIT: Final = 2.0**100
_STABILITY: Final = 0.01  # gamma of arXiv 2206.07136, section 4


@dataclass(frozen=True)
class Scaling:
    """How the records of one batch are scaled.

    Attributes
    ----------
    factors : sequence of Tensor
        For each layer one factor per record, float64; 0 where the record is dropped.
    dropped : Tensor, optional
        Which records count as zeros: what is not finite cannot be scaled to zero by a factor. None
        where no record does; on an accelerator, for which the host would have to wait to know, that
        is not looked at.
    norms : Tensor
        Of the whole gradients, before clipping, float64.
    """

    factors: Sequence[Tensor]
    dropped: Tensor | None
    norms: Tensor


@dataclass(frozen=True)
class Clip:
    """The bound on one record's gradient.

    A factor is below the one of the formula by 2^-22: what rounding it to float32 (2^-24) and the
    product with a float32 gradient (2^-24) add cannot carry a record past C. Adding up the records
    rounds too, by at most n 2^-24 of the sum of the n norms, as in every sum of floats, n being
    the records of one physical batch; that part is no record's own, and is not charged.

    Parameters
    ----------
    norm : float
        C, finite and > 0.
    style : ClipStyle
        What it bounds.
    """

    norm: float
    style: ClipStyle = ClipStyle.FLAT

    def __post_init__(self) -> None:
        checks.positive(clip_norm=self.norm)
        if type(self.style) is not ClipStyle:
            object.__setattr__(self, "style", ClipStyle(self.style))

    @property
    def by_layer(self) -> bool:
        """Whether each layer has a factor of its own."""
        return self.style is ClipStyle.PER_LAYER

    def scaling(self, squares: Sequence[Tensor], *, layers: int = 1) -> Scaling:
        """Return the factors for layers whose gradients have these squared norms.

        A record whose norm is not finite, or above 2^100 C, where float32 factors lose their
        precision, is dropped.

        Parameters
        ----------
        squares : sequence of Tensor
            One per layer that was used: squared norms or upper bounds of them, float64, one per
            record.
        layers : int
            How many layers share C where each has its part.
        """
        total = squares[0] if len(squares) == 1 else torch.stack(list(squares)).sum(0)
        norms = total.sqrt()
        limit, dropped = min(self.norm * _LIMIT, sys.float_info.max), None
        # False for nan, which is the largest where there is one. A device would have to be awaited.
        known = norms.device.type == "cpu" and norms.shape[0] > 0
        if not (known and float(norms.max()) <= limit):
            dropped = ~(norms <= limit)
        if self.by_layer:
            bound = self.norm / math.sqrt(layers)
            factors = [self._factors(square.sqrt(), bound, dropped) for square in squares]
        else:
            factors = [self._factors(norms, self.norm, dropped)] * len(squares)
        return Scaling(factors, dropped, norms)

    def _factors(self, norms: Tensor, bound: float, dropped: Tensor | None) -> Tensor:
        if self.style is ClipStyle.AUTOMATIC:
            factors = (norms + _STABILITY).reciprocal_().mul_(bound * _MARGIN)
        else:
            factors = norms.reciprocal().mul_(bound * _MARGIN).clamp_(max=1.0)
        return factors if dropped is None else factors.masked_fill_(dropped, 0.0)
