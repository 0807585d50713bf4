"""Products of float32 in float32, whatever torch was allowed to round their factors to.

With ``torch.set_float32_matmul_precision("high")``, ``allow_tf32`` or ``fp32_precision``, products
keep 10 bits of a factor, or 7, where the device has units for it; convolutions on CUDA devices do
by default. A record that is scaled to C would add up to 1.001 C, or 1.008 C.

>>> torch.set_float32_matmul_precision("medium")
>>> with full_precision(torch.zeros(1)):
...     torch.backends.mkldnn.matmul.fp32_precision
'ieee'
>>> torch.backends.mkldnn.matmul.fp32_precision
'bf16'
>>> torch.set_float32_matmul_precision("highest")
"""

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Final

import torch
from torch import Tensor

__all__ = ["full_precision", "torch"]

_OPERATIONS: Final = ("matmul", "conv", "rnn")
_ALL: Final = "all"
_FULL: Final = ("ieee", "none")

# What kernels read. torch's older names for the same raise where both were used, these never do.
_get = torch._C._get_fp32_precision_getter
_set = torch._C._set_fp32_precision_setter


class _Backend(AbstractContextManager[None]):
    """Holds one of torch's backends at full precision while any thread is inside."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._inside = 0
        self._before: list[tuple[str, str]] = []

    def needed(self, *, products_only: bool) -> bool:
        """Enter, where anything is to be held, and say whether it was."""
        with self._lock:
            if self._inside == 0:
                products = _get(self._name, "matmul") in _FULL  # a small model's step waits for it
                if products and (products_only or not self._reduced()):
                    return False
                self._hold()
            self._inside += 1
            return True

    def __enter__(self) -> None:
        """Do nothing: see `needed`."""

    def __exit__(self, *_: object) -> None:
        """Let torch round again, where this was the last thread inside."""
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                for operation, precision in reversed(self._before):
                    _set(self._name, operation, precision)

    def _reduced(self) -> list[str]:
        return [op for op in _OPERATIONS if _get(self._name, op) not in _FULL]

    def _hold(self) -> None:
        # An operation without a setting of its own follows its backend's, and must again after.
        whole = _get(self._name, _ALL)
        own = whole != _get("generic", _ALL)
        self._before = [(_ALL, whole if own else "none")]
        _set(self._name, _ALL, "ieee")
        for operation in self._reduced():
            self._before.append((operation, _get(self._name, operation)))
            _set(self._name, operation, "ieee")


_CPU: Final = _Backend("mkldnn")
_CUDA: Final = _Backend("cuda")
_NOTHING: Final = nullcontext()


def full_precision(like: Tensor, *, products_only: bool = True) -> AbstractContextManager[None]:
    """Compute in full float32 inside the block, on the device of ``like``.

    The setting is the process's: other threads compute in full precision too for as long.

    Parameters
    ----------
    like : Tensor
        On the device that computes: the CPU or CUDA.
    products_only : bool
        Whether the block multiplies matrices only. Where it does not, convolutions and recurrent
        layers are held too.
    """
    backend = _CUDA if like.is_cuda else _CPU
    return backend if backend.needed(products_only=products_only) else _NOTHING
