"""What ghost clipping cannot bound: its sum comes from a second pass, which rounds anew.

>>> layer = nn.Linear(2, 1)
>>> require_ghost_bound(layer.parameters(), ClipStyle.FLAT, autocast=False)
>>> require_ghost_bound(layer.bfloat16().parameters(), ClipStyle.FLAT, autocast=False)
Traceback (most recent call last):
    ...
dpfl_flower.client.errors.ModelRefused: engine='ghost' must be another one with parameters of \
bfloat16: its second backward pass would round past the bound; use engine 'bookkeeping' or 'hooks'
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dpfl_flower.client.clip_style import ClipStyle
from dpfl_flower.client.errors import ModelRefused

__all__ = ["ClipStyle", "nn", "require_ghost_bound", "torch"]


def require_ghost_bound(parameters: Iterable[Tensor], style: ClipStyle, *, autocast: bool) -> None:
    """Raise unless ghost clipping bounds a record of a model with these trained parameters.

    The norms are of the first backward pass, the sum is of the second, of losses that were scaled:
    in bfloat16 a record was seen to add 1.004 C.

    Raises
    ------
    ModelRefused
        With mixed precision, parameters below float32, or clipping per layer: the second pass has
        one factor per record.
    """
    rounds = "its second backward pass would round past the bound"
    half = {
        str(p.dtype).removeprefix("torch.")
        for p in parameters
        if torch.promote_types(p.dtype, torch.float32) != p.dtype
    }
    if autocast:
        with_what, reason = "mixed precision", rounds
    elif half:
        with_what, reason = f"parameters of {', '.join(sorted(half))}", rounds
    elif style is ClipStyle.PER_LAYER:
        with_what = f"clip_style={style.value!r}"
        reason = "its second backward pass has one factor per record, not one per layer"
    else:
        return
    raise ModelRefused(
        f"engine='ghost' must be another one with {with_what}: {reason}; "
        "use engine 'bookkeeping' or 'hooks'"
    )
