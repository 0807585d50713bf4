"""The clipped sum of a batch's per-example gradients, by Opacus.

Opacus computes one gradient per record, or its norm; here they are clipped and summed, without
noise. Neither hooks nor anything else that Opacus hangs on a model outlives the ``with`` block,
also after an exception.

>>> model = nn.Linear(2, 1)
>>> loss_fn = nn.MSELoss(reduction="none")
>>> with per_example_clipper(model, loss_fn, clip_norm=1.0) as clipper:
...     weight, bias = clipper.clipped_sum((torch.ones(5, 2), torch.ones(5, 1)))
>>> weight.shape, bias.shape
(torch.Size([1, 2]), torch.Size([1]))
"""

import contextlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from types import TracebackType
from typing import Any, Final, Self

import torch
from torch import Tensor, nn

from dpfl_flower import checks
from dpfl_flower.client._opacus import GradSampleModule, GradSampleModuleFastGradientClipping
from dpfl_flower.client.errors import ModelRefused

LossFunction = Callable[[Any, Tensor], Tensor]
"""``loss_fn(outputs, targets)``: one loss per record, what torch calls ``reduction="none"``."""

Batch = Sequence[Tensor]
"""The model's inputs, then the targets: tensors whose first dimension counts the records."""

_LEFT_ON_MODULES: Final = ("activations", "max_batch_len", "ft_compute_sample_grad")
_LEFT_ON_PARAMETERS: Final = (
    "grad_sample",
    "_forward_counter",
    "_current_grad_sample",
    "_norm_sample",
)


class GradSampleMode(StrEnum):
    """How Opacus bounds each record's gradient.

    ``HOOKS`` holds every record's gradient and clips what it holds: the bound is true whatever the
    layers do. ``GHOST`` computes only norms and runs a second backward pass: far less memory, the
    bound as good as the norms. They are computed in float64 here, and `require_separable` compares
    them with autograd before the first charge.
    """

    HOOKS = "hooks"
    GHOST = "ghost"


def per_example_losses(outputs: Any, targets: Tensor, loss_fn: LossFunction) -> Tensor:
    """Return one loss per record, of shape ``(records,)``.

    Raises
    ------
    ValueError
        If ``loss_fn`` returns anything but one number per record.
    """
    losses = loss_fn(outputs, targets)
    records = len(targets)
    if losses.dim() == 0 or len(losses) != records or losses.numel() != records:
        raise ValueError(
            f"loss_fn returned shape {tuple(losses.shape)} for {records} records; it must return "
            'one loss per record: build it with reduction="none"'
        )
    return losses.reshape(records)


class PerExampleClipper(ABC):
    """Sums per-example gradients, each clipped in L2 over all trainable parameters.

    Parameters
    ----------
    model : nn.Module
        The model, in training mode. Used as a context manager, the clipper hooks it on entry and
        leaves it as it was on exit.
    loss_fn : LossFunction
        One loss per record.
    clip_norm : float
        The bound C on the L2 norm of one record's gradient: what the sum moves by at most when one
        record comes or goes, up to the rounding of the model's floats.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFunction, *, clip_norm: float) -> None:
        checks.positive(clip_norm=clip_norm)
        self.model = model
        self.loss_fn = loss_fn
        self.clip_norm = clip_norm
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    def zeros(self) -> list[Tensor]:
        """Return the sum over no records: a tensor of at least float32 per parameter."""
        return [torch.zeros_like(p, dtype=_wide(p)) for p in self.parameters]

    def clipped_sum(self, batch: Batch) -> list[Tensor]:
        """Return the sum over ``batch`` of the clipped gradients, one tensor per parameter.

        A record whose gradient holds NaN or inf contributes zeros.
        """
        if len(batch[-1]) == 0:
            return self.zeros()
        try:
            return self._clipped_sum(batch)
        except NotImplementedError as error:
            raise _refused(error) from error
        finally:
            self._forget_gradients()

    def __enter__(self) -> Self:
        """Put hooks on the model."""
        try:
            self._hooked: Any = self._hook()
        except NotImplementedError as error:
            self._unhook()
            raise _refused(error) from error
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
        self._hooked.cleanup()
        self._unhook()

    @abstractmethod
    def _hook(self) -> Any:
        """Return the model wrapped by Opacus."""

    @abstractmethod
    def _clipped_sum(self, batch: Batch) -> list[Tensor]:
        """Do the work of `clipped_sum` for at least one record."""

    def _losses(self, batch: Batch) -> Tensor:
        *inputs, targets = batch
        return per_example_losses(self._hooked(*inputs), targets, self.loss_fn)

    def _forget_gradients(self) -> None:
        for p in self.parameters:
            p.grad = None
            # What GradSampleModule sets, at its values before a forward pass.
            p.__dict__.update(grad_sample=None, _norm_sample=None, _forward_counter=0)
            p.__dict__.pop("_current_grad_sample", None)
        for module in self.model.modules():
            module.__dict__.pop("activations", None)
            module.__dict__.pop("max_batch_len", None)

    def _unhook(self) -> None:
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


class HooksClipper(PerExampleClipper):
    """Holds each record's gradient, clips it and sums."""

    def _hook(self) -> Any:
        return GradSampleModule(self.model, loss_reduction="sum")

    def _clipped_sum(self, batch: Batch) -> list[Tensor]:
        _backward(self._losses(batch).sum())
        gradients = [self._of_each_record(p, len(batch[-1])) for p in self.parameters]
        norms = _joint_norm([_norms(g) for g in gradients])
        finite = torch.isfinite(norms)
        if not bool(finite.all()):  # not by a factor 0: 0 * nan is nan
            gradients = [g[finite] for g in gradients]
            norms = norms[finite]
        factors = _factors(norms, self.clip_norm)
        return [
            (factors.to(_wide(p)) @ g.flatten(1).to(_wide(p))).reshape(p.shape)
            for p, g in zip(self.parameters, gradients, strict=True)
        ]

    @staticmethod
    def _of_each_record(p: nn.Parameter, records: int) -> Tensor:
        gradient: Tensor | None = p.__dict__["grad_sample"]
        if gradient is None:
            _require_unused(p)
            return p.new_zeros((records, *p.shape))
        _require_one_each(len(gradient), records)
        return gradient


class GhostClipper(PerExampleClipper):
    """Computes each record's gradient norm only, then the clipped sum in a second backward pass."""

    def _hook(self) -> Any:
        duplicates = list(self.model.named_parameters(remove_duplicate=False))
        if len(duplicates) != len(list(self.model.parameters())):
            raise ModelRefused("ghost clipping cannot share a parameter; use mode 'hooks'")
        return _Float64Norms(self.model, loss_reduction="sum")

    def _clipped_sum(self, batch: Batch) -> list[Tensor]:
        while True:
            losses = self._losses(batch)
            _backward(losses.sum(), retain_graph=True)
            norms = _joint_norm(
                [self._norm_of_each_record(p, len(losses)) for p in self.parameters]
            )
            finite = torch.isfinite(norms)
            self._forget_gradients()
            if bool(finite.all()):
                break
            # A weight of 0 would not do (0 * nan is nan): the record leaves the batch.
            batch = [tensor[finite] for tensor in batch]
            if len(batch[-1]) == 0:
                return self.zeros()
        self._hooked.disable_hooks()
        try:
            _backward((_factors(norms, self.clip_norm).to(losses.dtype) * losses).sum())
        finally:
            self._hooked.enable_hooks()
        return [
            torch.zeros_like(p, dtype=_wide(p)) if p.grad is None else _dense(p.grad).to(_wide(p))
            for p in self.parameters
        ]

    @staticmethod
    def _norm_of_each_record(p: nn.Parameter, records: int) -> Tensor:
        norms: Tensor | None = p.__dict__.get("_norm_sample")
        if norms is None:
            _require_unused(p)
            return p.new_zeros(records, dtype=torch.float64)
        _require_one_each(len(norms), records)
        return norms.double()


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


def per_example_clipper(
    model: nn.Module,
    loss_fn: LossFunction,
    *,
    clip_norm: float,
    mode: GradSampleMode = GradSampleMode.HOOKS,
) -> PerExampleClipper:
    """Return the clipper of ``mode`` for ``model``, to be used in a ``with`` statement."""
    kind = {GradSampleMode.HOOKS: HooksClipper, GradSampleMode.GHOST: GhostClipper}
    return kind[GradSampleMode(mode)](model, loss_fn, clip_norm=clip_norm)


def _backward(loss: Tensor, *, retain_graph: bool = False) -> None:
    with _no_hook_warning():
        torch.autograd.backward(loss, retain_graph=retain_graph)


@contextlib.contextmanager
def _no_hook_warning() -> Iterator[None]:
    # Opacus hooks the first layer too, whose input needs no gradient: torch mentions it each time.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
        yield


def _refused(error: NotImplementedError) -> ModelRefused:
    return ModelRefused(f"Opacus cannot bound this model's gradients: {error}")


def _require_one_each(gradients: int, records: int) -> None:
    if gradients != records:
        raise ModelRefused(
            f"Opacus sees {gradients} gradients for {records} records: the first dimension of what "
            "a layer gets must count the records"
        )


def _require_unused(p: nn.Parameter) -> None:
    if p.grad is not None:
        raise ModelRefused(
            f"a parameter of shape {tuple(p.shape)} is used outside the forward of its own module, "
            "where Opacus cannot see it"
        )


def _wide(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)


def _dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient


def _norms(gradients: Tensor) -> Tensor:
    # float64: squares of 1e-23 do not vanish and squares of 1e30 do not overflow.
    norms: Tensor = torch.linalg.vector_norm(gradients.flatten(1), dim=1, dtype=torch.float64)
    return norms


def _joint_norm(norms: Sequence[Tensor]) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(torch.stack(list(norms)), dim=0)
    return norm


def _factors(norms: Tensor, clip_norm: float) -> Tensor:
    return clip_norm / norms.clamp(min=clip_norm)
