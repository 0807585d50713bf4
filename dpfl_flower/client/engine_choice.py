"""Which engine trains a model, decided before the first charge.

>>> model, loss_fn = nn.Linear(2, 1), nn.MSELoss(reduction="none")
>>> example = (torch.zeros(1, 2), torch.zeros(1, 1))
>>> choose_engine(model, loss_fn, GradientEngine.AUTO, example, public=True).__name__
'BookKeepingClipper'
"""

import functools
import logging
from collections.abc import Callable
from typing import Final

import torch
from torch import nn

from dpfl_flower.client.clip_style import ClipStyle
from dpfl_flower.client.errors import NODE_LOGGER, ModelRefused
from dpfl_flower.client.gradient_check import EngineRefused
from dpfl_flower.client.per_example import Batch, GradientEngine, LossFunction, clipper_class
from dpfl_flower.client.per_sample.clipper import PerExampleClipper
from dpfl_flower.client.per_sample.layers import unsupported
from dpfl_flower.client.per_sample.single import SingleClipper
from dpfl_flower.client.separable import require_separable

logger = logging.getLogger(NODE_LOGGER)

__all__ = ["choose_engine", "nn", "torch"]

_IN_ORDER: Final = {
    GradientEngine.BOOKKEEPING: "Book-keeping bounds",
    GradientEngine.HOOKS: "Opacus' hooks bound",
    GradientEngine.FUNCTORCH: "Functorch bounds",
}
"""What ``AUTO`` tries, and what the node's log says of it."""


def choose_engine(
    model: nn.Module,
    loss_fn: LossFunction,
    engine: GradientEngine,
    example: Batch | None,
    *,
    public: bool,
    style: ClipStyle = ClipStyle.FLAT,
    autocast: bool = False,
) -> type[PerExampleClipper]:
    """Return the clipper for ``model``: the one asked for, if it was seen to be right.

    A model that cannot be checked is trained one record at a time, which bounds every model.

    Parameters
    ----------
    engine : GradientEngine
        The one asked for. ``AUTO``: book-keeping where it is right, else hooks, else functorch.
    example : sequence of Tensor, optional
        Inputs and target of one record, with a first dimension of 1; only shapes and dtypes are
        used.
    public : bool
        Whether ``example`` is a public constant. Where it was taken from a record, no verdict on
        the model may leave the node, since the record's shape could have made it: a model that
        does not pass is trained one record at a time, and the answer looks the same.
    style, autocast
        How gradients will be clipped, and whether the model will run in mixed precision: what
        raises only then is refused too.

    Raises
    ------
    ModelRefused
        Only if ``public``, for a model that no engine but that one gets right. Whatever an engine
        raises on a model is such a refusal.
    """
    if example is None:
        logger.info("Training one record at a time: there is no record to take shapes from")
        return SingleClipper
    check = functools.partial(
        _checked, model, loss_fn, example=example, style=style, autocast=autocast
    )
    try:
        return _first_right(model, check) if engine is GradientEngine.AUTO else check(engine)
    except Exception as error:
        if public:
            raise
        logger.warning(
            "Training one record at a time: the model was refused on records of the shapes of the "
            "node's first one; give the client a public example to have it refused instead",
            exc_info=error,
        )
        return SingleClipper


def _first_right(
    model: nn.Module, check: Callable[[GradientEngine], type[PerExampleClipper]]
) -> type[PerExampleClipper]:
    refused: dict[GradientEngine, str] = {}
    if (layer := unsupported(model)) is not None:
        refused[GradientEngine.BOOKKEEPING] = f"book-keeping has no rule for {layer}"
    for engine, name in _IN_ORDER.items():
        if engine in refused:
            continue
        try:
            found = check(engine)
        except EngineRefused as error:
            refused[engine] = str(error)
            continue
        if refused:
            logger.info("%s the gradients: %s", name, "; ".join(refused.values()))
        return found
    reasons = list(dict.fromkeys(refused.values()))
    raise ModelRefused("; ".join([*reasons, *_instead_of_cells(model)]))


def _instead_of_cells(model: nn.Module) -> list[str]:
    return [
        f"put opacus.layers.dp_rnn.DP{kind} in the place of {name} (with the same arguments, and "
        "bias=True), on the server too"
        for name, module in model.named_modules()
        if (kind := type(module).__name__) in ("RNNCell", "LSTMCell", "GRUCell")
    ]


def _checked(
    model: nn.Module,
    loss_fn: LossFunction,
    engine: GradientEngine,
    *,
    example: Batch,
    style: ClipStyle,
    autocast: bool,
) -> type[PerExampleClipper]:
    if require_separable(model, loss_fn, example, engine=engine, style=style, autocast=autocast):
        return clipper_class(engine)
    logger.warning("Training one record at a time: the model does not run on made-up records")
    return SingleClipper
