"""The clipped sum from one forward and one backward pass ("book-keeping").

Autograd computes the gradients in the layers' outputs only. From them and the layers' inputs come
first the norms, then the sum: Bu et al., arXiv 2210.00038, Algorithm 1.

>>> model = nn.Linear(2, 1)
>>> loss_fn = nn.MSELoss(reduction="none")
>>> with BookKeepingClipper(model, loss_fn, clip=Clip(1.0)) as clipper:
...     weight, bias = clipper.clipped_sum((torch.ones(5, 2), torch.ones(5, 1)))
>>> weight.shape, bias.shape
(torch.Size([1, 2]), torch.Size([1]))
"""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dpfl_flower.client.errors import ModelRefused
from dpfl_flower.client.per_sample.capture import Capture
from dpfl_flower.client.per_sample.clip import Clip
from dpfl_flower.client.per_sample.clipper import Batch, PerExampleClipper, wide
from dpfl_flower.client.per_sample.contributions import Contribution, Held
from dpfl_flower.client.per_sample.layers import unsupported
from dpfl_flower.client.per_sample.outers import merged

__all__ = ["BookKeepingClipper", "Clip", "nn", "torch"]


class BookKeepingClipper(PerExampleClipper):
    """Bounds each record by norms of inputs and output gradients, in one backward pass.

    The factor that scales a record is below C over an upper bound of what the record adds to the
    computed sum, its own rounding errors included: see `Clip` and `Contribution.squares`. A
    parameter that several layers share, or a layer that is used several times, has each record's
    gradients held and added first.

    That a layer computes what its rule says, and that no parameter is used outside its own layer,
    shows only in a comparison with autograd: `require_separable` makes it before the first charge.

    Raises
    ------
    ModelRefused
        On entry, if there is no rule for a layer with trainable parameters.
    """

    _capture: Capture | None = None

    def _hook(self) -> None:
        if (layer := unsupported(self.model)) is not None:
            raise ModelRefused(f"no rule for per-example gradients of {layer}; use engine 'hooks'")
        self._capture = Capture(self.model)

    def _unhook(self) -> None:
        if self._capture is not None:
            self._capture.remove()
            self._capture = None

    def _clipped_sum(self, batch: Batch) -> list[Tensor]:
        assert self._capture is not None, "used outside its with block"
        found = _once_each(
            self._capture.backward(lambda: self._losses(self.model, batch), records=len(batch[-1]))
        )
        if not found:
            return self.zeros()
        if not self.clip.by_layer:
            found = merged(found)
        scaling = self._scaling([(part.parameters[0], part.squares()) for part in found])
        factors = scaling.factors
        if not self.clip.by_layer:  # rounded once for all layers, where the dtype is one
            factors = [factors[0].to(wide(self.parameters[0]))] * len(found)
        sums: dict[int, Tensor] = {}  # by id: a tensor's own hash takes longer
        for part, factor in zip(found, factors, strict=True):
            weighted = part.weighted_sums(factor, scaling.dropped)
            sums.update(zip(map(id, part.parameters), weighted, strict=True))
        return [
            sums[id(p)] if id(p) in sums else torch.zeros_like(p, dtype=wide(p))
            for p in self.parameters
        ]

    def _forget(self) -> None:
        pass  # autograd leaves no gradient behind when it is asked for tensors


def _once_each(found: Sequence[Contribution]) -> list[Contribution]:
    # Norms of several contributions to one parameter do not add up: their gradients do.
    used = [id(p) for part in found for p in part.parameters]
    if len(set(used)) == len(used):
        return list(found)
    counts = Counter(used)
    single: list[Contribution] = []
    several: list[Contribution] = []
    for part in found:
        shared = any(counts[id(p)] > 1 for p in part.parameters)
        (several if shared else single).append(part)
    gradients: dict[nn.Parameter, Tensor] = {}
    for part in several:
        for p, gradient in zip(part.parameters, part.held(), strict=True):
            gradients[p] = gradients[p] + gradient if p in gradients else gradient
    return [*single, *(Held((p,), [gradient]) for p, gradient in gradients.items())]
