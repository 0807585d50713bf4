"""Finds where a host would wait for a device, without one: tensors on "meta" stand for a device's.

What torch lets a program do with a device's numbers on the host is here refused; so is a copy to
the device that is not queued, and a list of numbers that becomes a tensor there.
"""

from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")
aten = torch.ops.aten

# Their results, or the sizes of their results, are numbers that the host has to read.
READS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
    aten.repeat_interleave.Tensor,
}
MASKS = (torch.bool, torch.uint8)


class Waits(BaseException):
    """The host would wait for the device. What training makes of an ``Exception`` it survives."""


class _Calls(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        kinds = {t.device.type for t in tensors if t.dim() or t.device == META}
        copies = func in (aten._to_copy.default, aten.copy_.default)
        if func in READS and "meta" in kinds:
            raise Waits(f"{func} asks a device for numbers")
        if func is aten._to_copy.default and kwargs.get("device") is not None:
            self._copied(args[0].device, torch.device(kwargs["device"]), kwargs)
        if func is aten.copy_.default:
            named = {"non_blocking": args[2]} if len(args) > 2 else kwargs
            self._copied(args[1].device, args[0].device, named)
        places = args[1] if func.overloadpacket in (aten.index, aten.index_put_) else ()
        if "meta" in kinds and any(t is not None and t.dtype in MASKS for t in places):
            raise Waits(f"{func} counts a mask")
        if len(kinds) > 1 and not copies:
            raise Waits(f"{func} is given numbers of the host and of a device")
        return func(*args, **kwargs)

    @staticmethod
    def _copied(source, to, settings):
        if source == to:
            return
        if to != META:
            raise Waits(f"a copy from {source} to {to} is read by the host")
        if not settings.get("non_blocking"):
            raise Waits(f"a copy from {source} to {to} is not queued")


class _Builds(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (Tensor.__getitem__, Tensor.__setitem__) and args[0].device == META:
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(place, list | np.ndarray) for place in places):
                raise Waits("places become a tensor on a device")
        result = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, Tensor.new_tensor) and result.device == META:
            raise Waits("numbers of the host become a tensor on a device")
        return result


@contextmanager
def no_host_sync():
    """Raise `Waits` in the block where the host would wait for a tensor on "meta"."""
    with _Builds(), _Calls():
        yield
