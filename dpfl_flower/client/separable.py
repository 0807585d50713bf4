"""Is this model's loss a sum of one term per record? DP-SGD is private for no other.

Clipping one record's gradient bounds what the record does to the sum only if the record is in that
one gradient and nowhere else: not in a batch statistic, not in a buffer.

>>> require_trainable(nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)))
Traceback (most recent call last):
    ...
dpfl_flower.client.errors.ModelRefused: 1: BatchNorm1d normalises each record by the others...
"""

import contextlib
import itertools
import logging
import sys
from collections.abc import Iterator, Sequence
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from dpfl_flower.client.clip_style import ClipStyle
from dpfl_flower.client.dropout import same_masks, without_dropout
from dpfl_flower.client.errors import NODE_LOGGER, ModelRefused
from dpfl_flower.client.gradient_check import require_runs, require_true_gradients
from dpfl_flower.client.made_up_weights import made_up_weights
from dpfl_flower.client.per_example import (
    Batch,
    GradientEngine,
    LossFunction,
    per_example_losses,
)
from dpfl_flower.client.per_sample.layers import unsupported
from dpfl_flower.client.torch_seed import seed_torch

logger = logging.getLogger(NODE_LOGGER)

_FIX: Final = (
    "opacus.validators.ModuleValidator.fix(model) replaces it "
    "(BatchNorm becomes GroupNorm); use the fixed model on the server too"
)
_TAKEN_BY: Final = {
    nn.RNN: "DPRNN",
    nn.LSTM: "DPLSTM",
    nn.GRU: "DPGRU",
    nn.MultiheadAttention: "DPMultiheadAttention",
}
"""What multiplies by weights inside of torch, where no hook sees it, and what to use instead."""

_DRAWS: Final = 4
_PROBES: Final = 3
_TOLERANCE: Final = 1e-3


def require_trainable(model: nn.Module, *, engine: GradientEngine = GradientEngine.AUTO) -> None:
    """Raise unless DP-SGD can train ``model`` at all.

    Parameters
    ----------
    engine : GradientEngine
        The one asked for. ``FUNCTORCH`` sees into torch's MultiheadAttention, and needs nothing of
        Opacus.

    Raises
    ------
    ModelRefused
        For a model without trainable parameters, one that Opacus wraps already, and for layers that
        couple the records of a batch or keep statistics of them (BatchNorm, also a frozen one or
        one without weights; InstanceNorm with running statistics; embeddings with ``max_norm`` or
        ``scale_grad_by_freq``) or whose per-example gradients no hook sees (torch's RNN, LSTM, GRU
        and MultiheadAttention, where they are trained). The message names the layer and the fix.
    """
    if _wrapped_by_opacus(model):
        raise ModelRefused("the model is wrapped by Opacus; hand over the model itself")
    if not any(p.requires_grad for p in model.parameters()):
        raise ModelRefused("the model has no trainable parameter")
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, _BatchNorm):
            raise ModelRefused(f"{name}: {kind} normalises each record by the others; {_FIX}")
        if isinstance(module, _InstanceNorm) and module.track_running_stats:
            raise ModelRefused(f"{name}: {kind} keeps running statistics of records; {_FIX}")
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            if module.max_norm is not None:
                raise ModelRefused(f"{name}: max_norm writes to the rows that records name")
            if module.scale_grad_by_freq:
                raise ModelRefused(f"{name}: scale_grad_by_freq counts over the records of a batch")
        instead = next((dp for torchs, dp in _TAKEN_BY.items() if isinstance(module, torchs)), None)
        if instead is not None and any(p.requires_grad for p in module.parameters()):
            seen_into = isinstance(module, nn.MultiheadAttention)
            if seen_into and engine is GradientEngine.FUNCTORCH:
                continue
            raise ModelRefused(
                f"{name}: {kind} hides its inner layers, so that nobody can tell the records' "
                f"gradients apart; put opacus.layers.{instead} in its place (with the same "
                "arguments, and batch_first=True), on the server too"
                + (", or train with engine 'functorch', which is slower" if seen_into else "")
            )
    by_hooks = engine is not GradientEngine.FUNCTORCH and unsupported(model) is not None
    if by_hooks and (errors := _opacus_errors(model)):
        raise ModelRefused(f"{'; '.join(errors)}; {_FIX}")


def _wrapped_by_opacus(model: nn.Module) -> bool:
    opacus = sys.modules.get("opacus.grad_sample")  # where nobody imported it, nobody wraps
    return opacus is not None and isinstance(model, opacus.AbstractGradSampleModule)


def _opacus_errors(model: nn.Module) -> list[str]:
    """Return what Opacus has against a model that only its hooks could train."""
    # It takes seconds to import, and most models do without.
    from dpfl_flower.client._opacus import ModuleValidator  # noqa: PLC0415

    was_training = model.training
    try:
        return [str(error) for error in ModuleValidator.validate(model.train(), strict=False)]
    finally:
        model.train(was_training)


@contextlib.contextmanager
def unchanged_buffers(model: nn.Module) -> Iterator[None]:
    """Refuse a model whose buffers change inside the block.

    A buffer that training writes holds what records left in it, without noise. It gets its old
    values back.

    Raises
    ------
    ModelRefused
        When the block ends with a changed buffer.
    """
    before = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        after = dict(model.named_buffers())
        changed = [n for n, b in before.items() if n not in after or not _same(b, after[n])]
        with torch.no_grad():
            for name in changed:
                if name in after and after[name].shape == before[name].shape:
                    after[name].copy_(before[name])
    changed += sorted(after.keys() - before.keys())
    if changed:
        raise ModelRefused(
            f"buffers that change in training are not private: {', '.join(changed)}; {_FIX}"
        )


def buffer_places(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return each buffer's module and name in it, those that are None included."""
    return [(module, name) for module in model.modules() for name in module._buffers]


@contextlib.contextmanager
def restored_buffers(places: Sequence[tuple[nn.Module, str]]) -> Iterator[None]:
    """Give a model its buffers back after the block, whatever records left there.

    What one record leaves in a buffer would reach the gradients of the next ones. Whether one did
    is not told: only a model that nobody could check gets here.

    >>> model = nn.BatchNorm1d(1)
    >>> with restored_buffers(buffer_places(model)):
    ...     _ = model(torch.ones(4, 1))
    >>> int(model.num_batches_tracked), model.running_mean.tolist()
    (0, [0.0])
    """
    before = []
    for module, name in places:
        buffer: Tensor | None = getattr(module, name)
        value = None if buffer is None else buffer.detach().clone()
        before.append((module, name, buffer, value))
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in before:
                if buffer is not None and value is not None and buffer.shape == value.shape:
                    buffer.copy_(value)
                setattr(module, name, buffer)  # where a forward pass put another in its place


def require_separable(
    model: nn.Module,
    loss_fn: LossFunction,
    example: Batch,
    *,
    engine: GradientEngine,
    style: ClipStyle = ClipStyle.FLAT,
    autocast: bool = False,
) -> bool:
    """Raise unless the engine's gradients of single records are those of autograd, and only theirs.

    Runs on made-up records of the shapes and dtypes of ``example`` and with made-up weights, so
    that the verdict depends on no record's values and on no weights that a server sent. A model
    that does not run on them, or shows no gradient, cannot be checked.

    Returns
    -------
    bool
        Whether the model was checked.

    Parameters
    ----------
    example : Batch
        Inputs and target of one record, each with a first dimension of 1. Only shapes and dtypes
        are used.
    engine, style, autocast
        How its gradients will be bounded and clipped, and whether it runs in mixed precision.

    Raises
    ------
    ModelRefused
        If one record's loss depends on another record, if a buffer changes, or if the engine's
        clipped sum is not the sum of autograd's clipped gradients (a parameter used outside the
        forward of its module, an option that the engine does not know), or is none at all with
        this ``style`` and ``autocast``. Also if a model cannot be checked whose norms the engine
        would only compute.
    ValueError
        If ``loss_fn`` does not return one loss per record.
    """
    batch = _made_up(example, avoid={m.padding_idx for m in _embeddings(model)})
    model.train()
    # The check draws from torch (dropout) on a state of its own.
    with (
        unchanged_buffers(model),
        same_masks(example[0].device),
        made_up_weights(model),
    ):
        try:
            with torch.no_grad():
                model(*batch[:-1])
        except Exception as error:
            if engine is GradientEngine.GHOST:
                raise ModelRefused(
                    "the model does not run on made-up records, so its ghost norms cannot be "
                    "checked; use engine 'hooks'"
                ) from error
            logger.info("The model does not run on made-up records: not checked", exc_info=error)
            return False
        _require_no_coupling(model, loss_fn, batch)
        shown = require_true_gradients(model, loss_fn, batch, engine)
        # Hooks and vmap hold each record's gradient, and clip what they hold; the others compute
        # norms.
        checked = shown or engine in (GradientEngine.HOOKS, GradientEngine.FUNCTORCH)
        if checked and (autocast or style is not ClipStyle.FLAT):
            require_runs(model, loss_fn, batch, engine, style=style, autocast=autocast)
    return checked


def _require_no_coupling(model: nn.Module, loss_fn: LossFunction, batch: Batch) -> None:
    # By derivative, in training mode: record 0's loss may not move with another record's input.
    inputs = [t.clone().requires_grad_() if t.is_floating_point() else t for t in batch[:-1]]
    losses = per_example_losses(model(*inputs), batch[-1], loss_fn)
    floating = [t for t in inputs if t.requires_grad]
    if floating and losses.requires_grad:
        slopes = torch.autograd.grad(losses[0], floating, allow_unused=True)
        if any(bool((slope[1:] != 0).any()) for slope in slopes if slope is not None):
            raise ModelRefused("the loss of one record depends on another record's input")
    # By value, without dropout: catches integers and statistics taken without gradients.
    with torch.no_grad():
        model.eval()
        try:
            _require_same_alone(model, loss_fn, batch)
        finally:
            model.train()
        with without_dropout(model):
            if _close(*(_drawn(model, loss_fn, batch, seed=seed) for seed in (0, 1))):
                _require_same_alone(model, loss_fn, batch)
            _require_same_beside_others(model, loss_fn, batch)


def _require_same_alone(model: nn.Module, loss_fn: LossFunction, batch: Batch) -> None:
    together = per_example_losses(model(*batch[:-1]), batch[-1], loss_fn)
    alone = torch.cat(
        [
            per_example_losses(model(*(t[i : i + 1] for t in batch[:-1])), y, loss_fn)
            for i, y in enumerate(torch.split(batch[-1], 1))
        ]
    )
    if not _close(together, alone):
        raise ModelRefused("the loss of a record is not the same alone and in a batch")


def _require_same_beside_others(model: nn.Module, loss_fn: LossFunction, batch: Batch) -> None:
    # For a model that draws in its forward pass: a batch of the same shape gets the same draws.
    # One draw may drop just what would show, and one change of the others may not matter, as to a
    # maximum that is record 0's: hence several of both.
    for seed, scale in itertools.product(range(_DRAWS), (2.0, 50.0, -50.0)):
        others = [
            torch.cat([t[:1], scale * t[1:] + 1]) if t.is_floating_point() else t
            for t in batch[:-1]
        ]
        before = _drawn(model, loss_fn, batch, seed=seed)
        after = _drawn(model, loss_fn, [*others, batch[-1]], seed=seed)
        if not _close(before[0], after[0]):
            raise ModelRefused("the loss of one record depends on another record's input")


def _drawn(model: nn.Module, loss_fn: LossFunction, batch: Batch, *, seed: int) -> Tensor:
    seed_torch(seed, batch[-1].device)  # of a fork of torch's state: see require_separable
    return per_example_losses(model(*batch[:-1]), batch[-1], loss_fn)


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE, equal_nan=True)


def _made_up(example: Batch, *, avoid: set[int | None]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    index = min({0, 1, 2} - avoid) if len(avoid) < 3 else 0

    def like(tensor: Tensor, *, target: bool) -> Tensor:
        shape = (_PROBES, *tensor.shape[1:])
        if not tensor.is_floating_point():  # class 0, or an id that is not padding
            return torch.full(shape, 0 if target else index, dtype=tensor.dtype).to(tensor.device)
        draw = torch.rand if target else torch.randn  # in [0, 1): a target of BCE too
        return draw(shape, generator=generator).to(dtype=tensor.dtype, device=tensor.device)

    return [*(like(t, target=False) for t in example[:-1]), like(example[-1], target=True)]


def _embeddings(model: nn.Module) -> Iterator[nn.Embedding | nn.EmbeddingBag]:
    return (m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag))


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all())  # noqa: PLR0124 - nan equals nan here
