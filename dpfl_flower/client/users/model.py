"""One model that stays in the process and forgets everything between users.

>>> model = ResidentModel(lambda: nn.Linear(2, 1), device="cpu")
>>> model.load({"weight": np.ones((1, 2), np.float32), "bias": np.zeros(1, np.float32)})
>>> model.reset()
>>> [tensor.tolist() for tensor in model.released()]
[[[1.0, 1.0]], [0.0]]
"""

from collections.abc import Callable, Mapping
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dpfl_flower.layout import Array, ArrayLayout

__all__ = ["ModelFn", "ResidentModel"]

ModelFn = Callable[[], nn.Module]
"""Builds the model; its ``state_dict`` names and shapes are those of the global arrays."""


@final
class ResidentModel:
    """A model and the global values that every user starts from.

    Between users all parameters and buffers get their global values back, also buffers that are
    not in the ``state_dict`` (those as the model function built them) and buffers that the model
    replaced by other tensors. State that a model keeps elsewhere, in plain attributes, is out of
    reach: :mod:`dpfl_flower.client.users.isolation` finds out.

    Parameters
    ----------
    model_fn : callable
    device : str or torch.device
    channels_last : bool
        Keep images and convolutions in ``torch.channels_last`` where that is faster: on a CPU, for
        a model with convolutions.

    Attributes
    ----------
    model : nn.Module
        In training mode.
    parameters : dict of name to Tensor
        What training changes, each once, also where a model uses it under two names.
    fixed : dict of name to Tensor
        Frozen parameters and all buffers.
    """

    def __init__(
        self, model_fn: ModelFn, *, device: str | torch.device, channels_last: bool = False
    ) -> None:
        self.device = torch.device(device)
        model = model_fn().to(self.device)
        self.channels_last = channels_last and self.device.type == "cpu" and _convolves(model)
        if self.channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model = model.train()
        named = dict(model.named_parameters())
        buffers = dict(model.named_buffers())
        self.parameters = {name: p for name, p in named.items() if p.requires_grad}
        frozen = {name: p for name, p in named.items() if not p.requires_grad}
        self.fixed: dict[str, Tensor] = {**frozen, **buffers}
        tensors: list[Tensor] = [*named.values(), *buffers.values()]
        # Same strides, so that going back is one sweep; detached, so that autograd keeps out.
        self._live = [tensor.detach() for tensor in tensors]
        self._base = [tensor.clone() for tensor in self._live]
        self._index = _positions(model, tensors)
        self._homes = {
            position: (module._buffers, key)
            for module in model.modules()
            for key, buffer in module._buffers.items()
            for position, tensor in enumerate(tensors)
            if buffer is tensor
        }
        self._buffers = {position: tensors[position] for position in self._homes}
        self._layout = ArrayLayout.of(model.state_dict())
        self._released = [self._index[name] for name in self._layout.released_names]

    @property
    def dimension(self) -> int:
        """Length of the released vector."""
        return self._layout.dimension

    def load(self, global_arrays: Mapping[str, Array]) -> None:
        """Take the values that every user of the round starts from.

        The released arrays are those of ``global_arrays``, in its order.

        Raises
        ------
        ValueError
            When names, shapes or kinds of dtype are not the model's.
        """
        self._layout.check(global_arrays)
        for name, array in global_arrays.items():
            self._base[self._index[name]].copy_(_as_tensor(array))
        self._released = [
            self._index[name] for name in ArrayLayout.of(global_arrays).released_names
        ]
        self.reset()

    def reset(self) -> None:
        """Give every parameter and buffer its global value."""
        for position, (buffers, key) in self._homes.items():
            buffers[key] = self._buffers[position]
        torch._foreach_copy_(self._live, self._base)

    def released(self) -> list[Tensor]:
        """Return the floating arrays as they are now, in the global arrays' order."""
        return [self._now(position) for position in self._released]

    def reference(self) -> list[Tensor]:
        """Return the floating arrays' global values, in the same order."""
        return [self._base[position] for position in self._released]

    def base(self, name: str) -> Tensor:
        """Return the global value of the parameter or buffer that the model calls ``name``."""
        return self._base[self._index[name]]

    def released_parameters(self) -> list[str | None]:
        """Return, for each released array, its name in ``parameters``; None: not trained."""
        names = {self._index[name]: name for name in self.parameters}
        return [names.get(position) for position in self._released]

    def take(self, rows: Tensor, picks: Tensor | slice) -> Tensor:
        """Return some rows on the model's device and in its memory format.

        Always in memory of its own: what a matrix product gives, to the last bit, may depend on
        where its operands begin, and that must not be up to the records of others.
        """
        batch = rows[picks]
        last = self.channels_last and batch.dim() == 4
        memory_format = torch.channels_last if last else torch.contiguous_format
        return batch.to(self.device, memory_format=memory_format, copy=isinstance(picks, slice))

    def _now(self, position: int) -> Tensor:
        if position not in self._homes:
            return self._live[position]
        buffers, key = self._homes[position]
        buffer = buffers[key]
        assert buffer is not None
        return buffer.detach()


def _convolves(model: nn.Module) -> bool:
    return any(isinstance(m, nn.Conv2d | nn.ConvTranspose2d) for m in model.modules())


def _positions(model: nn.Module, tensors: list[Tensor]) -> dict[str, int]:
    """Return where each name's tensor is in ``tensors``; two names may share one."""
    of_tensor = {id(tensor): position for position, tensor in enumerate(tensors)}
    names = {
        **dict(model.named_buffers(remove_duplicate=False)),
        **dict(model.named_parameters(remove_duplicate=False)),
    }
    missing = sorted(model.state_dict().keys() - names.keys())
    if missing:
        raise ValueError(f"state_dict holds {missing}, which are neither parameters nor buffers")
    return {name: of_tensor[id(tensor)] for name, tensor in names.items()}


def _as_tensor(array: Array) -> Tensor:
    if isinstance(array, Tensor):
        return array
    values: NDArray[Any] = np.asarray(array)
    if not values.flags.writeable:  # torch would warn, although nothing here writes
        values = values.copy()
    return torch.from_numpy(values)
