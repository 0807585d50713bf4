"""Copies from the host to a device, for which the host does not wait.

>>> on_device(torch.ones(2), torch.device("cpu"))
tensor([1., 1.])
"""

from typing import Final

import torch
from torch import Tensor

__all__ = ["on_device", "torch"]

_QUEUES: Final = frozenset({"cuda"})
"""Kinds of device whose copies may be queued behind what they still compute."""


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return ``tensor`` on ``device``.

    From the host to a CUDA device it is queued: from pageable memory, or without being told, the
    host would wait for all that was queued before. The page-locked memory that it goes through
    comes from torch's allocator, which gives it to nobody else before the copy is done.
    """
    if tensor.device == device:
        return tensor
    if device.type not in _QUEUES or tensor.device.type != "cpu":
        return tensor.to(device)
    return _page_locked(tensor).to(device, non_blocking=True)


def _page_locked(tensor: Tensor) -> Tensor:
    return tensor.pin_memory()
