"""Which engine a model gets."""

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dpfl_flower.client.errors import NODE_LOGGER, ModelRefused
from dpfl_flower.client.users.engine import Engine, UserEngine
from dpfl_flower.client.users.isolation import require_isolated
from dpfl_flower.client.users.loop import LoopEngine
from dpfl_flower.client.users.model import ModelFn
from dpfl_flower.client.users.stacked import StackedEngine
from dpfl_flower.client.users.training import LocalTraining
from dpfl_flower.layout import Array

__all__ = ["select_engine"]

logger = logging.getLogger(NODE_LOGGER)

_BY_MATRIX_PRODUCTS = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.PReLU)
_WORTHWHILE_BYTES = 16 << 20
"""A stack on a CPU whose smallest chunk takes more waits for memory, and the loop is as fast."""


def select_engine(
    engine: Engine,
    model_fn: ModelFn,
    training: LocalTraining,
    *,
    device: torch.device,
    example: Sequence[Tensor],
    global_arrays: Mapping[str, Array],
) -> UserEngine:
    """Return the engine asked for, checked on made-up users; for AUTO the faster that passes.

    The choice depends on the model, the recipe, the device and the shape of a record, never on
    anybody's records or on how many users there are.

    Raises
    ------
    ModelRefused
        When the engine asked for, or the loop in the end, cannot train this model in isolation.
    """
    if engine is not Engine.LOOP and (engine is Engine.STACKED or _suits_a_stack(model_fn, device)):
        try:
            stacked = StackedEngine(model_fn, training, device=device, example=example)
            if engine is Engine.STACKED or _is_worthwhile(stacked, device):
                _check(stacked, training, device, example, global_arrays)
                return stacked
        except ModelRefused as refused:
            if engine is Engine.STACKED:
                raise
            logger.info("One user after the other: %s", refused)
    loop = LoopEngine(model_fn, training, device=device)
    _check(loop, training, device, example, global_arrays)
    return loop


def _check(
    engine: UserEngine,
    training: LocalTraining,
    device: torch.device,
    example: Sequence[Tensor],
    global_arrays: Mapping[str, Array],
) -> None:
    require_isolated(
        engine,
        example,
        global_arrays,
        batch_size=training.batch_size,
        exact=device.type == "cpu",
    )


def _suits_a_stack(model_fn: ModelFn, device: torch.device) -> bool:
    if device.type == "cuda":
        return True
    owners = [m for m in model_fn().modules() if m._parameters]
    return all(type(owner) in _BY_MATRIX_PRODUCTS for owner in owners)


def _is_worthwhile(stacked: StackedEngine, device: torch.device) -> bool:
    return device.type == "cuda" or stacked.chunk.bytes <= _WORTHWHILE_BYTES
