"""Are an engine's clipped sums those of autograd? Found out on made-up records, before a charge.

>>> model, loss_fn = nn.Linear(2, 1), nn.MSELoss(reduction="none")
>>> batch = [torch.randn(3, 2), torch.zeros(3, 1)]
>>> require_true_gradients(model, loss_fn, batch, GradientEngine.BOOKKEEPING)
True
"""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor, nn

from dpfl_flower.client.clip_style import ClipStyle
from dpfl_flower.client.dropout import same_masks, without_dropout
from dpfl_flower.client.errors import ModelRefused
from dpfl_flower.client.per_example import (
    Batch,
    GradientEngine,
    LossFunction,
    per_example_clipper,
    per_example_losses,
)

__all__ = [
    "EngineRefused",
    "GradientEngine",
    "nn",
    "require_runs",
    "require_true_gradients",
    "torch",
]

_TOLERANCE: Final = 3e-3
_GHOST_TOLERANCE: Final = 1e-4
"""What the second pass of ghost clipping rounds is in no bound: float32 adds less than 1e-5, and
half precision or TF32 anywhere in a model more than 5e-4."""


class EngineRefused(ModelRefused):
    """One engine does not get the model right: another may."""


def require_true_gradients(
    model: nn.Module, loss_fn: LossFunction, batch: Batch, engine: GradientEngine
) -> bool:
    """Raise unless the engine's clipped sum is the sum of autograd's clipped gradients.

    Returns
    -------
    bool
        Whether there were gradients to compare.

    Raises
    ------
    EngineRefused
        If the sums differ, or the engine fails.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device
    # vmap draws the masks inside of attention in another order: without them, sums can be compared.
    with without_dropout(model):
        with same_masks(device):
            losses = per_example_losses(model(*batch[:-1]), batch[-1], loss_fn)
        if not losses.requires_grad:
            return False
        gradients = _of_each_record(losses, parameters)
        norms = [float(_norm(g)) for g in gradients]
        if not all(0 < norm < float("inf") for norm in norms):
            return False  # a flat or overflowing loss on made-up records shows nothing
        clip_norm = min(norms) / 2  # everything is clipped, so every norm is put to the test
        with same_masks(device):
            actual = _clipped_sum(model, loss_fn, batch, clip_norm=clip_norm, engine=engine)
    expected = [
        sum(
            (g * (clip_norm / n) for g, n in zip(of_parameter, norms, strict=True)), torch.tensor(0)
        )
        for of_parameter in zip(*gradients, strict=True)
    ]
    off = _norm([a.double() - e for a, e in zip(actual, expected, strict=True)])
    tolerance = _GHOST_TOLERANCE if engine is GradientEngine.GHOST else _TOLERANCE
    if not float(off) <= tolerance * clip_norm:
        raise EngineRefused(
            f"the per-example gradients of engine {engine.value!r} are not autograd's: a parameter "
            "is used outside the forward of its module, or a layer has an option it does not know"
            + _other_than(engine)
        )
    return True


def require_runs(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: Batch,
    engine: GradientEngine,
    *,
    style: ClipStyle,
    autocast: bool,
) -> None:
    """Raise EngineRefused unless the engine sums ``batch`` when it is clipped and run like this.

    What raises under mixed precision only would raise for every record of a charged round.
    """
    with same_masks(batch[-1].device):
        _clipped_sum(
            model, loss_fn, batch, clip_norm=1.0, engine=engine, style=style, autocast=autocast
        )


def _clipped_sum(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: Batch,
    *,
    clip_norm: float,
    engine: GradientEngine,
    style: ClipStyle = ClipStyle.FLAT,
    autocast: bool = False,
) -> list[Tensor]:
    try:
        with per_example_clipper(
            model, loss_fn, clip_norm=clip_norm, engine=engine, style=style, autocast=autocast
        ) as clipper:
            return clipper.clipped_sum(batch)
    except ModelRefused as error:
        raise EngineRefused(str(error)) from error
    except Exception as error:  # of Opacus' or torch's own kind, where a layer is none of theirs
        how = " with mixed precision" if autocast else ""
        raise EngineRefused(
            f"engine {engine.value!r} fails on a batch of {len(batch[-1])} records{how}: "
            f"{type(error).__name__}: {error}{_other_than(engine)}"
        ) from error


def _other_than(engine: GradientEngine) -> str:
    if engine is GradientEngine.FUNCTORCH:
        return ""
    return "; engine 'functorch' passes each record through the model alone"


def _of_each_record(losses: Tensor, parameters: Sequence[Tensor]) -> list[list[Tensor]]:
    return [
        [
            torch.zeros_like(p, dtype=torch.float64) if g is None else g.to_dense().double()
            for p, g in zip(parameters, of_one, strict=True)
        ]
        for of_one in (
            torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            for loss in losses
        )
    ]


def _norm(gradients: Sequence[Tensor]) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients]))
    return norm
