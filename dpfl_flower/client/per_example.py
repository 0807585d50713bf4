"""The clipped sum of a batch's per-example gradients, by the engine of one's choice.

>>> model = nn.Linear(2, 1)
>>> loss_fn = nn.MSELoss(reduction="none")
>>> with per_example_clipper(model, loss_fn, clip_norm=1.0) as clipper:
...     weight, bias = clipper.clipped_sum((torch.ones(5, 2), torch.ones(5, 1)))
>>> weight.shape, bias.shape
(torch.Size([1, 2]), torch.Size([1]))
"""

from enum import StrEnum

import torch
from torch import nn

from dpfl_flower import checks
from dpfl_flower.client.clip_style import ClipStyle
from dpfl_flower.client.per_sample.bookkeeping import BookKeepingClipper
from dpfl_flower.client.per_sample.clip import Clip
from dpfl_flower.client.per_sample.clipper import (
    Batch,
    LossFunction,
    PerExampleClipper,
    per_example_losses,
)
from dpfl_flower.client.per_sample.functorch import FunctorchClipper
from dpfl_flower.client.per_sample.layers import unsupported

__all__ = [
    "Batch",
    "Clip",
    "ClipStyle",
    "GradientEngine",
    "LossFunction",
    "PerExampleClipper",
    "clipper_class",
    "nn",
    "per_example_clipper",
    "per_example_losses",
    "torch",
]


class GradientEngine(StrEnum):
    """How per-example gradients are bounded. All give the same sum.

    ``AUTO``: book-keeping where it has a rule for every trainable layer, else hooks. Where the
    model can be tried (`choose_engine`), the first of book-keeping, hooks and functorch that is
    right.
    ``BOOKKEEPING``: one backward pass, little dearer than SGD's; see `BookKeepingClipper`.
    ``GHOST``: Opacus' norms, and a second backward pass. Both compute norms of what they do not
    hold, so `require_separable` compares them with autograd before the first charge.
    ``HOOKS``: Opacus holds every record's gradient; what is held is clipped, whatever layers do.
    ``FUNCTORCH``: the same by ``vmap``, also for parameters that are used outside their layer.
    """

    AUTO = "auto"
    BOOKKEEPING = "bookkeeping"
    GHOST = "ghost"
    HOOKS = "hooks"
    FUNCTORCH = "functorch"


def clipper_class(engine: GradientEngine) -> type[PerExampleClipper]:
    """Return the clipper of an engine; ``AUTO`` is none."""
    if engine is GradientEngine.BOOKKEEPING:
        return BookKeepingClipper
    if engine is GradientEngine.FUNCTORCH:
        return FunctorchClipper
    # Opacus takes seconds to import, which a node that does without it need not wait for.
    from dpfl_flower.client.per_sample.opacus import GhostClipper, HooksClipper  # noqa: PLC0415

    if engine is GradientEngine.GHOST:
        return GhostClipper
    if engine is GradientEngine.HOOKS:
        return HooksClipper
    raise ValueError(f"engine={engine!r} must be one that was chosen")


def per_example_clipper(
    model: nn.Module,
    loss_fn: LossFunction,
    *,
    clip_norm: float,
    engine: GradientEngine = GradientEngine.AUTO,
    style: ClipStyle = ClipStyle.FLAT,
    autocast: bool = False,
) -> PerExampleClipper:
    """Return the clipper of ``engine`` for ``model``, to be used in a ``with`` statement."""
    engine = checks.choice(GradientEngine, engine=engine)
    if engine is GradientEngine.AUTO:
        engine = GradientEngine.BOOKKEEPING if unsupported(model) is None else GradientEngine.HOOKS
    return clipper_class(engine)(model, loss_fn, clip=Clip(clip_norm, style), autocast=autocast)
