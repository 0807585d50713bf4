"""The clipped sum of a sample, whatever single records do.

>>> model, loss_fn = nn.Linear(2, 1), nn.MSELoss(reduction="none")
>>> data = [(torch.ones(1, 2), torch.ones(1, 1)), (torch.ones(1, 5), torch.ones(1, 1))]
>>> with per_example_clipper(model, loss_fn, clip_norm=1e-3) as clipper:
...     sample = SampleSum(clipper, lambda indices: data[indices[0]])
...     sample.add([0])
...     sample.add([1])  # five features where the model takes two: as if it were absent
>>> round(float(torch.cat([t.flatten() for t in sample.total]).norm()), 6), float(sample.fitting())
(0.001, -0.5)
"""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dpfl_flower.client.errors import NODE_LOGGER
from dpfl_flower.client.per_example import Batch, PerExampleClipper, per_example_clipper

logger = logging.getLogger(NODE_LOGGER)

__all__ = ["SampleSum", "nn", "per_example_clipper"]


class SampleSum:
    """Adds up the clipped gradients of one sample, physical batch by physical batch.

    A record that cannot be read or trained on counts as zeros: an answer that failed would tell
    that the record is there. The node's log says why.

    Parameters
    ----------
    clipper : PerExampleClipper
        Within its ``with`` block.
    gather : Callable[[Sequence[int]], Batch]
        Returns the records of these indices, on the model's device.
    """

    def __init__(
        self, clipper: PerExampleClipper, gather: Callable[[Sequence[int]], Batch]
    ) -> None:
        self._clipper, self._gather = clipper, gather
        self._total: list[Tensor] | None = None
        self._several = False
        self._norms: list[tuple[Tensor, float]] = []

    @property
    def total(self) -> list[Tensor]:
        """One sum per parameter: only the records of one physical batch add up below float64.

        One batch's sum stays in the parameter's dtype, which no result shows: rounding to it comes
        last in any case. Of a narrower one it does: what goes there by float32 is rounded twice.
        """
        if self._total is None:
            self._total = self._kept(self._clipper.zeros())
        return self._total

    def add(self, indices: Sequence[int]) -> None:
        """Add the records of ``indices``."""
        try:
            part = self._clipper.clipped_sum(self._gather(indices))
        except Exception as error:
            if len(indices) == 1:
                logger.warning("A record counts as zeros: it cannot be trained on", exc_info=error)
                return
            # One record that raises must not be seen from outside: it alone counts as zeros.
            for index in indices:
                self.add([index])
            return
        if self._total is None:
            self._total = self._kept(part)
        else:
            if not self._several:
                self._total, self._several = [t.double() for t in self._total], True
            torch._foreach_add_(self._total, part)
        if (norms := self._clipper.norms) is not None:
            self._norms.append((norms, self._clipper.clip.norm))

    def fitting(self) -> Tensor:
        """Return the sum over records of +1/2 for one whose gradient was within the clip norm.

        -1/2 for one that was not, 0 for one that counts as zeros; float64, on the norms' device.
        Only asked for where the clip norm follows it: it takes a small model's step a while.
        """
        total = torch.zeros((), dtype=torch.float64)  # on a host: a number to any device
        for norms, clip_norm in self._norms:
            fits = (norms <= clip_norm).double() - 0.5
            total = fits.masked_fill_(norms.isnan(), 0).sum() + total
        return total

    def _kept(self, part: Sequence[Tensor]) -> list[Tensor]:
        of = zip(part, self._clipper.parameters, strict=True)
        return [t if t.dtype is p.dtype else t.double() for t, p in of]
