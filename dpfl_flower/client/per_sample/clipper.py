"""The clipped sum of a batch's per-example gradients: what every engine must supply.

>>> per_example_losses(torch.zeros(3, 1), torch.zeros(3, 1), nn.MSELoss(reduction="none")).shape
torch.Size([3])
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from dpfl_flower.client.errors import ModelRefused
from dpfl_flower.client.per_sample.clip import Clip, Scaling
from dpfl_flower.client.per_sample.contributions import Held
from dpfl_flower.client.per_sample.layers import owners

LossFunction = Callable[[Any, Tensor], Tensor]
"""``loss_fn(outputs, targets)``: one loss per record, what torch calls ``reduction="none"``."""

Batch = Sequence[Tensor]
"""The model's inputs, then the targets: tensors whose first dimension counts the records."""


def per_example_losses(outputs: Any, targets: Tensor, loss_fn: LossFunction) -> Tensor:
    """Return one loss per record, of shape ``(records,)``.

    Raises
    ------
    ValueError
        If ``loss_fn`` returns anything but one number per record.
    """
    losses = loss_fn(outputs, targets)
    records, shape = targets.shape[0], losses.shape
    if not shape or shape[0] != records or shape.numel() != records:
        raise ValueError(
            f"loss_fn returned shape {tuple(losses.shape)} for {records} records; it must return "
            'one loss per record: build it with reduction="none"'
        )
    return losses if len(shape) == 1 else losses.reshape(records)


class PerExampleClipper(ABC):
    """Sums per-example gradients, each clipped in L2 over all trainable parameters.

    Parameters
    ----------
    model : nn.Module
        The model, in training mode. Used as a context manager, the clipper hooks it on entry and
        leaves it as it was on exit.
    loss_fn : LossFunction
        One loss per record.
    clip : Clip
        The bound on one record's gradient: what the sum moves by at most when one record comes or
        goes, up to the rounding of the model's floats. It may be replaced between two batches.
    autocast : bool
        Run the forward pass in bfloat16 where torch's autocast does; norms and sums stay float32.
    """

    def __init__(
        self, model: nn.Module, loss_fn: LossFunction, *, clip: Clip, autocast: bool = False
    ) -> None:
        self.model = model
        self.loss_fn = loss_fn
        self.clip = clip
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self._last: Scaling | None = None
        self._autocast = autocast
        self._layer_of = _layers(model)
        self._layers = 1 + max(self._layer_of.values(), default=0)

    @property
    def norms(self) -> Tensor | None:
        """The norms of the last batch's gradients, before clipping, nan where dropped: private.

        None where no gradient was seen.
        """
        if self._last is None or self._last.dropped is None:
            return None if self._last is None else self._last.norms
        return self._last.norms.masked_fill(self._last.dropped, torch.nan)

    def zeros(self) -> list[Tensor]:
        """Return the sum over no records: a tensor of at least float32 per parameter."""
        return [torch.zeros_like(p, dtype=wide(p)) for p in self.parameters]

    def clipped_sum(self, batch: Batch) -> list[Tensor]:
        """Return the sum over ``batch`` of the clipped gradients, one tensor per parameter.

        A record whose gradient holds NaN or inf contributes zeros.
        """
        self._last = None
        if batch[-1].shape[0] == 0:
            return self.zeros()
        try:
            return self._clipped_sum(batch)
        except NotImplementedError as error:
            raise refused(error) from error
        finally:
            self._forget()

    def __enter__(self) -> Self:
        """Put hooks on the model."""
        try:
            self._hook()
        except NotImplementedError as error:
            self._unhook()
            raise refused(error) from error
        except BaseException:
            self._unhook()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave the model as it was."""
        self._unhook()

    @abstractmethod
    def _hook(self) -> None:
        """Put on the model what the engine needs."""

    @abstractmethod
    def _unhook(self) -> None:
        """Take it off, also where putting it on or a pass was cut short."""

    @abstractmethod
    def _clipped_sum(self, batch: Batch) -> list[Tensor]:
        """Do the work of `clipped_sum` for at least one record."""

    def _forget(self) -> None:
        """Forget the last batch, also after an exception."""
        for p in self.parameters:
            p.grad = None

    def _losses(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        *inputs, targets = batch
        if not self._autocast:
            return per_example_losses(model(*inputs), targets, self.loss_fn)
        with torch.autocast(targets.device.type, dtype=torch.bfloat16):
            return per_example_losses(model(*inputs), targets, self.loss_fn)

    def _scaling(self, squares: Sequence[tuple[nn.Parameter, Tensor]]) -> Scaling:
        # One factor per record for each of squares, in order; a pair names any of its parameters.
        if not self.clip.by_layer:
            self._last = self.clip.scaling([square for _, square in squares])
            return self._last
        by_layer: dict[int, Tensor] = {}
        for parameter, square in squares:
            layer = self._layer_of[parameter]
            by_layer[layer] = by_layer[layer] + square if layer in by_layer else square
        # How many layers there are is public; which of them a batch used is not.
        scaling = self.clip.scaling(list(by_layer.values()), layers=self._layers)
        of_layer = dict(zip(by_layer, scaling.factors, strict=True))
        factors = [of_layer[self._layer_of[parameter]] for parameter, _ in squares]
        self._last = Scaling(factors, scaling.dropped, scaling.norms)
        return self._last

    def _sum_held(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        # From each record's gradient of each parameter.
        held = [Held((p,), [g]) for p, g in zip(self.parameters, gradients, strict=True)]
        scaling = self._scaling([(h.parameters[0], h.squares()) for h in held])
        return [
            h.weighted_sums(f, scaling.dropped)[0].to(wide(p))
            for h, f, p in zip(held, scaling.factors, self.parameters, strict=True)
        ]


def wide(p: Tensor) -> torch.dtype:
    """Return the dtype that sums of ``p``'s gradients have: at least float32."""
    return torch.promote_types(p.dtype, torch.float32)


def refused(error: NotImplementedError) -> ModelRefused:
    """Return what to raise where Opacus does not know a layer."""
    return ModelRefused(f"Opacus cannot bound this model's gradients: {error}")


def _layers(model: nn.Module) -> dict[nn.Parameter, int]:
    layer_of: dict[nn.Parameter, int] = {}
    for index, module in enumerate(owners(model).values()):
        for parameter in module.parameters(recurse=False):
            layer_of.setdefault(parameter, index)
    return layer_of
