"""Which engine trains a model, decided before the first charge.

>>> model, loss_fn = nn.Linear(2, 1), nn.MSELoss(reduction="none")
>>> example = (torch.zeros(1, 2), torch.zeros(1, 1))
>>> choose_engine(model, loss_fn, GradientEngine.AUTO, example, public=True).__name__
'BookKeepingClipper'
"""

import logging

import torch
from torch import nn

from dpfl_flower.client.errors import NODE_LOGGER, ModelRefused
from dpfl_flower.client.per_example import (
    Batch,
    GradientEngine,
    LossFunction,
    clipper_class,
)
from dpfl_flower.client.per_sample.clipper import PerExampleClipper
from dpfl_flower.client.per_sample.layers import unsupported
from dpfl_flower.client.per_sample.single import SingleClipper
from dpfl_flower.client.separable import require_separable

logger = logging.getLogger(NODE_LOGGER)

__all__ = ["choose_engine", "nn", "torch"]


def choose_engine(
    model: nn.Module,
    loss_fn: LossFunction,
    engine: GradientEngine,
    example: Batch | None,
    *,
    public: bool,
) -> type[PerExampleClipper]:
    """Return the clipper for ``model``: the one asked for, if it was seen to be right.

    A model that cannot be checked is trained one record at a time, which bounds every model.

    Parameters
    ----------
    engine : GradientEngine
        The one asked for. ``AUTO``: book-keeping where it is right, else hooks.
    example : sequence of Tensor, optional
        Inputs and target of one record, with a first dimension of 1; only shapes and dtypes are
        used.
    public : bool
        Whether ``example`` is a public constant. Where it was taken from a record, no verdict on
        the model may leave the node, since the record's shape could have made it: a model that
        does not pass is trained one record at a time, and the answer looks the same.

    Raises
    ------
    ModelRefused
        Only if ``public``, for a model that no engine but that one gets right.
    """
    if example is None:
        logger.info("Training one record at a time: there is no record to take shapes from")
        return SingleClipper
    try:
        return _checked(model, loss_fn, engine, example)
    except Exception as error:
        if public:
            raise
        logger.warning(
            "Training one record at a time: the model was refused on records of the shapes of the "
            "node's first one; give the client a public example to have it refused instead",
            exc_info=error,
        )
        return SingleClipper


def _checked(
    model: nn.Module, loss_fn: LossFunction, engine: GradientEngine, example: Batch
) -> type[PerExampleClipper]:
    if engine is GradientEngine.AUTO:
        if (layer := unsupported(model)) is not None:
            logger.info("Opacus' hooks bound the gradients: book-keeping has no rule for %s", layer)
            return _checked(model, loss_fn, GradientEngine.HOOKS, example)
        try:
            return _checked(model, loss_fn, GradientEngine.BOOKKEEPING, example)
        except ModelRefused as error:
            logger.info("Trying Opacus' hooks: book-keeping is refused: %s", error)
            return _checked(model, loss_fn, GradientEngine.HOOKS, example)
    if require_separable(model, loss_fn, example, engine=engine):
        return clipper_class(engine)
    logger.warning("Training one record at a time: the model does not run on made-up records")
    return SingleClipper
