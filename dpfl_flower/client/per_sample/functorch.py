"""The clipped sum by ``vmap`` over ``grad``: any model that torch can trace record by record.

>>> model = nn.Linear(2, 1)
>>> with FunctorchClipper(model, nn.MSELoss(reduction="none"), clip=Clip(1.0)) as clipper:
...     weight, bias = clipper.clipped_sum((torch.ones(5, 2), torch.ones(5, 1)))
>>> weight.shape, bias.shape
(torch.Size([1, 2]), torch.Size([1]))
"""

import contextlib
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from dpfl_flower.client.per_sample.clip import Clip
from dpfl_flower.client.per_sample.clipper import Batch, PerExampleClipper, wide

__all__ = ["Clip", "FunctorchClipper", "nn", "torch"]


class FunctorchClipper(PerExampleClipper):
    """Holds each record's gradient, as `HooksClipper` does, computed on records of their own.

    Every record passes through the model alone, so a layer sees a batch of one: what couples the
    records of a batch cannot show, and the bound is true whatever the layers do. Slow; also for
    parameters used outside their module's forward, which no hook sees.
    """

    def _hook(self) -> None:
        self._names = [name for name, p in self.model.named_parameters() if p.requires_grad]

    def _unhook(self) -> None:
        self._names = []

    def _clipped_sum(self, batch: Batch) -> list[Tensor]:
        trained = dict(zip(self._names, (p.detach() for p in self.parameters), strict=True))

        def loss(parameters: dict[str, Tensor], *record: Tensor) -> Tensor:
            def model(*inputs: Tensor) -> object:
                return functional_call(self.model, parameters, inputs)

            return self._losses(model, [part.unsqueeze(0) for part in record]).squeeze(0)

        of_each = vmap(grad(loss), in_dims=(None, *(0 for _ in batch)), randomness="different")
        with _no_speed_warning():
            gradients = of_each(trained, *batch)
        return self._sum_held(
            [
                gradients[name].to(wide(p))
                for name, p in zip(self._names, self.parameters, strict=True)
            ]
        )


@contextlib.contextmanager
def _no_speed_warning() -> Iterator[None]:
    # Where torch has no batched rule for an operation, it takes the records one after the other.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        yield
