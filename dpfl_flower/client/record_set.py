"""A node's records: drawn by one secret coin each, gathered as tensors on a device.

>>> records = RecordSet(TensorDataset(torch.arange(6.0), torch.zeros(6)), torch.device("cpu"))
>>> records.gather([1, 4])
[tensor([1., 4.]), tensor([0., 0.])]
>>> list(records.sample(1.0, secure(), at_most=4))
[[0, 1, 2, 3], [4, 5]]
"""

import contextlib
from collections.abc import Iterator, Sequence, Sized
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset, default_collate

from dpfl_flower.client.device_copy import on_device
from dpfl_flower.rng import RandomSource, secure

__all__ = ["RecordSet", "TensorDataset", "secure", "torch"]


class RecordSet:
    """The records of one data set.

    Parameters
    ----------
    dataset : Dataset
        Map-style. An item is ``(*inputs, target)``; a `TensorDataset` is indexed as a whole.
    device : torch.device
        Where records are gathered.
    """

    def __init__(self, dataset: Dataset[Any], device: torch.device) -> None:
        self._dataset, self._device = dataset, device

    def __len__(self) -> int:
        """Return how many records there are: private."""
        return len(cast(Sized, self._dataset))

    def sample(self, rate: float, rng: RandomSource, *, at_most: int) -> Iterator[list[int]]:
        """Yield the indices of a sample, ``at_most`` at a time; see `chosen`."""
        indices = self.chosen(rate, rng)
        for start in range(0, len(indices), at_most):
            yield indices[start : start + at_most]

    def chosen(self, rate: float, rng: RandomSource) -> list[int]:
        """Return the indices of a sample: each record's own coin decides."""
        found: list[int] = np.flatnonzero(rng.coins(rate, len(self))).tolist()
        return found

    def gather(self, indices: Sequence[int]) -> list[Tensor]:
        """Return inputs and targets of these records on the device, without waiting for it.

        What reading a record raises is let through.
        """
        return [on_device(tensor, self._device) for tensor in self.read(indices)]

    def read(self, indices: Sequence[int]) -> Sequence[Tensor]:
        """Return what `gather` does where the data set keeps it: on the host, or on a device."""
        if isinstance(self._dataset, TensorDataset):
            rows = torch.tensor(indices, dtype=torch.long)
            return [tensor[on_device(rows, tensor.device)] for tensor in self._dataset.tensors]
        items: Sequence[Tensor] = default_collate([self._dataset[i] for i in indices])
        return items

    def first(self) -> list[Tensor] | None:
        """Return the first record that can be read, None if there is none."""
        for index in range(len(self)):
            with contextlib.suppress(Exception):  # logged when it is trained on
                return self.gather([index])
        return None
