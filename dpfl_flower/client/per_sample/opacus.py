"""Opacus' two ways to a clipped sum: every layer it knows, and custom ones by functorch.

Neither hooks nor anything else that Opacus hangs on a model outlives the ``with`` block, also after
an exception.

>>> model = nn.Linear(2, 1)
>>> clip = Clip(1.0)
>>> with HooksClipper(model, nn.MSELoss(reduction="none"), clip=clip) as clipper:
...     weight, bias = clipper.clipped_sum((torch.ones(5, 2), torch.ones(5, 1)))
>>> weight.shape, bias.shape
(torch.Size([1, 2]), torch.Size([1]))
"""

import contextlib
import warnings
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn

from dpfl_flower.client._opacus import GradSampleModule, GradSampleModuleFastGradientClipping
from dpfl_flower.client.errors import ModelRefused
from dpfl_flower.client.per_sample.clip import Clip
from dpfl_flower.client.per_sample.clipper import Batch, LossFunction, PerExampleClipper, wide
from dpfl_flower.client.per_sample.full_precision import full_precision
from dpfl_flower.client.per_sample.ghost_limits import require_ghost_bound

_LEFT_ON_MODULES: Final = ("activations", "max_batch_len", "ft_compute_sample_grad")
_LEFT_ON_PARAMETERS: Final = (
    "grad_sample",
    "_forward_counter",
    "_current_grad_sample",
    "_norm_sample",
)

__all__ = ["Clip", "GhostClipper", "HooksClipper"]


class _OpacusClipper(PerExampleClipper):
    """What both ways hang on a model and take off again."""

    _hooked: Any = None

    @abstractmethod
    def _wrap(self) -> Any:
        """Return the model wrapped by Opacus."""

    def _hook(self) -> None:
        self._hooked = self._wrap()

    def _forget(self) -> None:
        for p in self.parameters:
            p.grad = None
            # What GradSampleModule sets, at its values before a forward pass.
            p.__dict__.update(grad_sample=None, _norm_sample=None, _forward_counter=0)
            p.__dict__.pop("_current_grad_sample", None)
        for module in self.model.modules():
            module.__dict__.pop("activations", None)
            module.__dict__.pop("max_batch_len", None)

    def _unhook(self) -> None:
        if self._hooked is not None:
            self._hooked.cleanup()
            self._hooked = None
        # What Opacus' own cleanup leaves behind when a forward or backward pass was cut short.
        for handle in self.model.__dict__.pop("autograd_grad_sample_hooks", ()):
            handle.remove()
        for module in self.model.modules():
            for name in _LEFT_ON_MODULES:
                module.__dict__.pop(name, None)
        for p in self.model.parameters():
            p.grad = None
            for name in _LEFT_ON_PARAMETERS:
                p.__dict__.pop(name, None)


class HooksClipper(_OpacusClipper):
    """Holds each record's gradient, clips it and sums."""

    def _wrap(self) -> Any:
        return GradSampleModule(self.model, loss_reduction="sum")

    def _clipped_sum(self, batch: Batch) -> list[Tensor]:
        _backward(self._losses(self._hooked, batch).sum())
        return self._sum_held(
            [self._of_each_record(p, len(batch[-1])).to(wide(p)) for p in self.parameters]
        )

    @staticmethod
    def _of_each_record(p: nn.Parameter, records: int) -> Tensor:
        gradient: Tensor | None = p.__dict__["grad_sample"]
        if gradient is None:
            _require_unused(p)
            return p.new_zeros((records, *p.shape))
        _require_one_each(len(gradient), records)
        return gradient


class GhostClipper(_OpacusClipper):
    """Computes each record's gradient norm only, then the clipped sum in a second backward pass.

    Both passes are in full float32, so that what the second one sums is what the first one saw but
    for rounding in float32, which is in no bound.

    Raises
    ------
    ModelRefused
        For what it cannot bound: see `require_ghost_bound`.
    """

    def __init__(
        self, model: nn.Module, loss_fn: LossFunction, *, clip: Clip, autocast: bool = False
    ) -> None:
        super().__init__(model, loss_fn, clip=clip, autocast=autocast)
        require_ghost_bound(self.parameters, clip.style, autocast=autocast)

    def _wrap(self) -> Any:
        duplicates = list(self.model.named_parameters(remove_duplicate=False))
        if len(duplicates) != len(list(self.model.parameters())):
            raise ModelRefused("ghost clipping cannot share a parameter; use engine 'hooks'")
        return _Float64Norms(self.model, loss_reduction="sum")

    def _clipped_sum(self, batch: Batch) -> list[Tensor]:
        # The clip may be replaced and the model converted after the clipper was built.
        require_ghost_bound(self.parameters, self.clip.style, autocast=self._autocast)
        while True:
            losses = self._losses(self._hooked, batch)
            with full_precision(losses, products_only=False):
                _backward(losses.sum(), retain_graph=True)
            squares = [self._squares(p, len(losses)) for p in self.parameters]
            scaling = self._scaling(list(zip(self.parameters, squares, strict=True)))
            self._forget()
            if scaling.dropped is None or not bool(scaling.dropped.any()):
                break
            # A weight of 0 would not do (0 * nan is nan): the record leaves the batch.
            batch = [tensor[~scaling.dropped] for tensor in batch]
            if len(batch[-1]) == 0:
                return self.zeros()
        self._hooked.disable_hooks()
        try:
            with full_precision(losses, products_only=False):
                _backward((scaling.factors[0].to(losses.dtype) * losses).sum())
        finally:
            self._hooked.enable_hooks()
        return [
            torch.zeros_like(p, dtype=wide(p)) if p.grad is None else _dense(p.grad).to(wide(p))
            for p in self.parameters
        ]

    @staticmethod
    def _squares(p: nn.Parameter, records: int) -> Tensor:
        norms: Tensor | None = p.__dict__.get("_norm_sample")
        if norms is None:
            _require_unused(p)
            return p.new_zeros(records, dtype=torch.float64)
        _require_one_each(len(norms), records)
        return norms.double().square()


class _Float64Norms(GradSampleModuleFastGradientClipping):  # type: ignore[misc]  # untyped
    """Ghost norms in float64.

    For sequences ghost clipping adds large products of both signs; in float32 a record with
    features of 1e5 could lose its whole norm in the rounding and pass unclipped.
    """

    def rearrange_grad_samples(self, *, module: nn.Module, **settings: Any) -> Any:
        activations, backprops = super().rearrange_grad_samples(module=module, **settings)
        if type(module) in self.NORM_SAMPLERS:
            backprops = backprops.double()
            activations = [a.double() if a.is_floating_point() else a for a in activations]
        return activations, backprops


def _backward(loss: Tensor, *, retain_graph: bool = False) -> None:
    with _no_hook_warning():
        torch.autograd.backward(loss, retain_graph=retain_graph)


@contextlib.contextmanager
def _no_hook_warning() -> Iterator[None]:
    # Opacus hooks the first layer too, whose input needs no gradient: torch mentions it each time.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
        yield


def _require_one_each(gradients: int, records: int) -> None:
    if gradients != records:
        raise ModelRefused(
            f"Opacus sees {gradients} gradients for {records} records: the first dimension of what "
            "a layer gets must count the records (batch_first=True)"
        )


def _require_unused(p: nn.Parameter) -> None:
    if p.grad is not None:
        raise ModelRefused(
            f"a parameter of shape {tuple(p.shape)} is used outside the forward of its own module, "
            "where Opacus cannot see it"
        )


def _dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient
