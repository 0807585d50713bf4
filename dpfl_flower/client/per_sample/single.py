"""The clipped sum one record at a time, by autograd: true for every model, and slow.

>>> model = nn.Linear(2, 1)
>>> with SingleClipper(model, nn.MSELoss(reduction="none"), clip=Clip(1.0)) as clipper:
...     weight, bias = clipper.clipped_sum((torch.ones(5, 2), torch.ones(5, 1)))
>>> weight.shape, bias.shape
(torch.Size([1, 2]), torch.Size([1]))
"""

import copy

import torch
from torch import Tensor, nn

from dpfl_flower.client.per_sample.clip import Clip, Scaling
from dpfl_flower.client.per_sample.clipper import Batch, PerExampleClipper, wide

__all__ = ["Clip", "SingleClipper", "nn", "torch"]


class SingleClipper(PerExampleClipper):
    """Passes each record through the model alone and clips its gradient.

    A record meets no other, not even in what a model remembers: each has a copy of the model to
    itself. So the bound holds for a model that nothing is known about, as long as it keeps nothing
    outside of itself.
    """

    def _hook(self) -> None:
        pass

    def _unhook(self) -> None:
        pass

    def _clipped_sum(self, batch: Batch) -> list[Tensor]:
        total, norms = self.zeros(), []
        for record in zip(*(torch.split(tensor, 1) for tensor in batch), strict=True):
            own = copy.deepcopy(self.model)
            parameters = [p for p in own.parameters() if p.requires_grad]
            loss = self._losses(own, record).sum()
            found = (
                torch.autograd.grad(loss, parameters, allow_unused=True)
                if loss.requires_grad
                else [None] * len(parameters)
            )
            gradients = [
                torch.zeros_like(p, dtype=wide(p))
                if g is None
                else (g.to_dense() if g.is_sparse else g).to(wide(p))
                for p, g in zip(self.parameters, found, strict=True)
            ]
            clipped = self._sum_held([g.unsqueeze(0) for g in gradients])
            torch._foreach_add_(total, clipped)
            assert self.norms is not None
            norms.append(self.norms)
        whole = torch.cat(norms)
        self._last = Scaling((), whole.isnan(), whole)
        return total
