"""One sample of each of many data sets, padded to one shape, whatever single records do.

>>> models = [nn.Sequential(nn.Linear(2, 1)) for _ in range(2)]
>>> data = TensorDataset(torch.ones(3, 2), torch.zeros(3, 1))
>>> records = [RecordSet(data, torch.device("cpu")) for _ in models]
>>> clipper = StackedClipper(models, nn.MSELoss(reduction="none"), clip=Clip(1e-3))
>>> sample = StackedSample(clipper, records, (torch.zeros(2), torch.zeros(1)), width=2)
>>> sample.sums([[0, 1, 2], []]).norm(dim=1).round(decimals=6).tolist()
[0.003, 0.0]
"""

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dpfl_flower.client.device_copy import on_device
from dpfl_flower.client.errors import NODE_LOGGER
from dpfl_flower.client.per_sample.stacked import Clip, StackedClipper
from dpfl_flower.client.record_set import RecordSet, TensorDataset

logger = logging.getLogger(NODE_LOGGER)

__all__ = [
    "Clip",
    "StackedClipper",
    "StackedSample",
    "TensorDataset",
    "nn",
    "padded_width",
    "torch",
]


def padded_width(expected_batch_size: float, *, at_most: int) -> int:
    """Return how many records of a model go into one pass: public, whatever a sample holds.

    Four standard deviations of a Poisson sample beyond the expected one, in eights; a larger sample
    takes further passes.

    >>> padded_width(32.0, at_most=64), padded_width(1000.0, at_most=64)
    (56, 64)
    """
    wanted = expected_batch_size + 4 * math.sqrt(expected_batch_size)
    return min(at_most, 8 * math.ceil(wanted / 8))


class StackedSample:
    """Sums clipped gradients of samples; see `StackedClipper`.

    A record that cannot be read, has another shape than ``example`` or cannot be trained on counts
    as zeros: an answer that failed would tell that the record is there. The node's log says why.
    Every pass has the same shape, so that no model's bits depend on another's records.

    Parameters
    ----------
    clipper : StackedClipper
    records : sequence of RecordSet
        One per model, on the models' device.
    example : sequence of Tensor
        Inputs and target of one record, without a dimension of records.
    width : int
        Records of a model in one pass.
    """

    def __init__(
        self,
        clipper: StackedClipper,
        records: Sequence[RecordSet],
        example: Sequence[Tensor],
        *,
        width: int,
    ) -> None:
        self._clipper, self._records, self._example = clipper, records, example
        self._width = width

    def sums(self, chosen: Sequence[Sequence[int]]) -> Tensor:
        """Return the sums, ``(models, dimension)``, float64.

        Parameters
        ----------
        chosen : sequence of sequence of int
            The sample of each data set, by index.
        """
        total = self._clipper.zeros()
        for start in range(0, max(map(len, chosen)), self._width):
            total += self._pass([indices[start : start + self._width] for indices in chosen])
        return total

    def pass_of_padding(self) -> None:
        """Run a pass without records; raise what the model or the loss raises on zeros."""
        self._run([None] * len(self._records))

    def _pass(self, chosen: Sequence[Sequence[int]]) -> Tensor:
        gathered = [
            self._gathered(records, indices)
            for records, indices in zip(self._records, chosen, strict=True)
        ]
        try:
            return self._run(gathered)
        except Exception as error:
            found = [index for index, one in enumerate(gathered) if one is not None]
            if sum(len(one[-1]) for one in gathered if one is not None) <= 1:
                logger.warning("A record counts as zeros: it cannot be trained on", exc_info=error)
                return self._clipper.zeros()
        # Whose record it was shows when each model, then each record, goes alone: to its own place,
        # so that the others' bits are the same as ever.
        total = self._clipper.zeros()
        for index in found:
            parts = [chosen[index]] if len(found) > 1 else [[i] for i in chosen[index]]
            for part in parts:
                total += self._pass([part if i == index else [] for i in range(len(chosen))])
        return total

    def _run(self, gathered: Sequence[Sequence[Tensor] | None]) -> Tensor:
        sizes = [0 if one is None else len(one[-1]) for one in gathered]
        batch = [
            self._padded([None if one is None else one[place] for one in gathered], like)
            for place, like in enumerate(self._example)
        ]
        counted = torch.arange(self._width) < torch.tensor(sizes).unsqueeze(1)
        return self._clipper.clipped_sums(batch, on_device(counted, batch[-1].device))

    def _padded(self, parts: Sequence[Tensor | None], like: Tensor) -> Tensor:
        # Records of the host are laid side by side there, and go to the device in one copy.
        lie = {part.device.type for part in parts if part is not None}
        where = torch.device("cpu") if lie == {"cpu"} else like.device
        padded = like.new_zeros((len(parts), self._width, *like.shape), device=where)
        for row, part in zip(padded, parts, strict=True):
            if part is not None:
                row[: len(part)] = on_device(part, where)
        return on_device(padded, like.device)

    def _gathered(self, records: RecordSet, indices: Sequence[int]) -> list[Tensor] | None:
        # The records that can be read and have the example's shape; None if there are none.
        if not indices:
            return None
        try:
            return self._fitting(records.read(indices))
        except Exception as error:
            if len(indices) == 1:
                logger.warning("A record counts as zeros: it cannot be read", exc_info=error)
                return None
        alone = [self._gathered(records, [index]) for index in indices]
        if not (kept := [one for one in alone if one is not None]):
            return None
        return [torch.cat(parts) for parts in zip(*kept, strict=True)]

    def _fitting(self, gathered: Sequence[Tensor]) -> list[Tensor]:
        for part, like in zip(gathered, self._example, strict=True):
            if part.shape[1:] != like.shape or (
                part.is_floating_point() != like.is_floating_point()
            ):
                raise ValueError(
                    f"a record has {part.dtype} of shape {tuple(part.shape[1:])} where the example "
                    f"has {like.dtype} of shape {tuple(like.shape)}"
                )
        return list(gathered)
