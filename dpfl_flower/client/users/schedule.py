"""Which records each slot of a stack trains on in each step, for users of unequal sizes.

>>> stack = Schedule([3, 2], batch_size=2, epochs=1, orders=None)
>>> stack.steps
(2, 1)
>>> for picks, weights in stack:
...     print(picks.tolist(), weights.tolist())
[0, 1, 3, 4] [[0.5, 0.5], [0.5, 0.5]]
[2, 2, 3, 4] [[1.0, 0.0], [0.5, 0.5]]
"""

from collections.abc import Iterator, Sequence
from typing import Final, final

import numpy as np
import torch
from torch import Tensor

__all__ = ["Schedule"]

_BLOCK: Final = 32


@final
class Schedule:
    """The steps of a stack of users, whose records lie one user after the other in one pool.

    A user's last batch of an epoch is filled up with the batch's first record at weight 0: a
    record of the same user, so that nothing of another one can come in. A user that is through
    goes round again, and nobody looks at its slot.

    Parameters
    ----------
    records : sequence of int
        Of each user, at least 1.
    batch_size, epochs : int
    orders : sequence of sequence of Tensor, or None
        For each user its order of records in each epoch; None: as they are.
    slots : int or None
        How many slots there are; those without a user repeat the first user's records.
    """

    def __init__(
        self,
        records: Sequence[int],
        *,
        batch_size: int,
        epochs: int,
        orders: Sequence[Sequence[Tensor]] | None,
        slots: int | None = None,
    ) -> None:
        users = len(records)
        spare = (slots or users) - users
        counts = np.asarray(records, np.int64)
        firsts = np.cumsum(counts) - counts
        self._counts = np.concatenate([counts, np.full(spare, counts[0])])
        self._firsts = np.concatenate([firsts, np.zeros(spare, np.int64)])
        self._per_epoch = -(-self._counts // batch_size)
        self._batch_size, self._epochs = batch_size, epochs
        self.steps: tuple[int, ...] = tuple((self._per_epoch[:users] * epochs).tolist())
        self._orders = None
        if orders is not None:
            self._orders = torch.cat([order for user in orders for order in user]).numpy()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield, for each step, which records of the pool to take and what each counts.

        The first is int64 of shape ``(slots * batch_size,)``; the second float64 of shape
        ``(slots, batch_size)``, the weights of a slot adding up to 1.
        """
        total = max(self.steps)
        for start in range(0, total, _BLOCK):
            picks, weights = self._block(np.arange(start, min(start + _BLOCK, total)))
            for one, weight in zip(picks, weights, strict=True):
                yield torch.from_numpy(one.reshape(-1)), torch.from_numpy(weight)

    def _block(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        times = times[:, None]
        begins = times % self._per_epoch * self._batch_size
        sizes = np.minimum(self._batch_size, self._counts - begins)[..., None]
        lanes = np.arange(self._batch_size)
        real = lanes < sizes
        picks = begins[..., None] + np.where(real, lanes, 0)
        if self._orders is not None:
            epochs = np.minimum(times // self._per_epoch, self._epochs - 1)
            starts = self._firsts * self._epochs + epochs * self._counts
            picks = self._orders[starts[..., None] + picks]
        weights = np.where(real, 1 / sizes, 0.0)
        return picks + self._firsts[:, None], weights
