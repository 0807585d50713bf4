"""How one user trains from the global model: the recipe, its steps and its order of records.

>>> loss_fn = torch.nn.CrossEntropyLoss(reduction="none")
>>> recipe = LocalTraining(lr=0.1, batch_size=2, loss_fn=loss_fn)
>>> [batch.tolist() for batch in recipe.batches(5, server_round=1, user="bob")]
[[4, 2], [3, 1], [0]]
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from dpfl_flower import checks
from dpfl_flower.client.per_example import LossFunction
from dpfl_flower.client.users.request import UserId

__all__ = ["LocalOptimizer", "LocalTraining"]


class LocalOptimizer(StrEnum):
    """The rule of a local step; its state starts anew for every user."""

    SGD = "sgd"
    ADAM = "adam"


@dataclass(frozen=True, kw_only=True)
class LocalTraining:
    """What every user does with its records, the same for all.

    Attributes
    ----------
    lr : float
        Step size.
    batch_size : int
        Records in a step; a user's last step of an epoch takes what is left.
    loss_fn : callable
        ``loss_fn(outputs, targets)``: one loss per record (``reduction="none"``), as for DP-SGD.
        A step follows the gradient of their mean.
    epochs : int
        How often a user sees each of its records.
    optimizer : LocalOptimizer
        ``"sgd"`` or ``"adam"`` (betas 0.9 and 0.999, epsilon 1e-8: Kingma and Ba, arXiv
        1412.6980, Algorithm 1).
    momentum : float
        In [0, 1), for SGD: ``v <- momentum v + g; p <- p - lr v``.
    shuffle : bool
        Whether a user's records are put in another order in every epoch.
    seed : int
        Of that order and of dropout, per user and round. It protects nobody, so it may be known;
        coins and noise never come from it.

    Raises
    ------
    ValueError
        Naming the argument, its value and its bound.
    """

    lr: float
    batch_size: int
    loss_fn: LossFunction
    epochs: int = 1
    optimizer: LocalOptimizer = LocalOptimizer.SGD
    momentum: float = 0.0
    shuffle: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "optimizer", LocalOptimizer(self.optimizer))
        checks.positive(lr=self.lr)
        checks.positive_int(batch_size=self.batch_size, epochs=self.epochs)
        checks.non_negative_int(seed=self.seed)
        checks.non_negative(momentum=self.momentum)
        if self.momentum >= 1 or (self.momentum and self.optimizer is not LocalOptimizer.SGD):
            raise ValueError(f"momentum={self.momentum!r} must be < 1, and 0 but for sgd")

    def steps_per_epoch(self, records: int) -> int:
        """Return how many steps ``records`` take, once through."""
        return -(-records // self.batch_size)

    def steps(self, records: int) -> int:
        """Return how many steps a user of so many records takes in all."""
        return self.epochs * self.steps_per_epoch(records)

    def seed_for(self, *, server_round: int, user: UserId, epoch: int = 0) -> int:
        """Return a seed of one user's own: what others do or how many there are cannot move it."""
        text = f"{self.seed} {server_round} {epoch} {type(user).__name__} {user}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1

    def order(self, records: int, *, server_round: int, user: UserId, epoch: int = 0) -> Tensor:
        """Return the order of a user's records in one epoch."""
        if not self.shuffle:
            return torch.arange(records)
        generator = torch.Generator().manual_seed(
            self.seed_for(server_round=server_round, user=user, epoch=epoch)
        )
        return torch.randperm(records, generator=generator)

    def batches(self, records: int, *, server_round: int, user: UserId) -> Iterator[Tensor | slice]:
        """Yield what picks the records of each step: indices, or a slice of records in order."""
        for epoch in range(self.epochs):
            order = None
            if self.shuffle:
                order = self.order(records, server_round=server_round, user=user, epoch=epoch)
            for start in range(0, records, self.batch_size):
                picks = slice(start, min(start + self.batch_size, records))
                yield picks if order is None else order[picks]

    @property
    def optimizer_states(self) -> int:
        """How many vectors of the model's length the optimizer keeps."""
        if self.optimizer is LocalOptimizer.ADAM:
            return 2
        return 1 if self.momentum else 0

    def rule(self, parameters: Sequence[Tensor]) -> "StepRule":
        """Return a fresh rule for ``parameters``, of one user or of a stack of users."""
        if self.optimizer is LocalOptimizer.ADAM:
            return _Adam(parameters, self.lr)
        return _Sgd(parameters, self.lr, self.momentum)


class StepRule:
    """Moves parameters in place, entry by entry, so that stacked users do not mix."""

    def __init__(self, parameters: Sequence[Tensor], lr: float) -> None:
        self._parameters = list(parameters)
        self._lr = lr

    def step(self, gradients: Sequence[Tensor | None]) -> None:
        """Take one step along ``gradients``, one for each parameter; None is a zero."""
        raise NotImplementedError

    def _dense(self, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        return [
            torch.zeros_like(parameter) if gradient is None else gradient
            for parameter, gradient in zip(self._parameters, gradients, strict=True)
        ]

    def _zeros(self) -> list[Tensor]:
        return [torch.zeros_like(parameter) for parameter in self._parameters]


class _Sgd(StepRule):
    def __init__(self, parameters: Sequence[Tensor], lr: float, momentum: float) -> None:
        super().__init__(parameters, lr)
        self._momentum = momentum
        self._velocity = self._zeros() if momentum else []

    def step(self, gradients: Sequence[Tensor | None]) -> None:
        parameters, steps = self._parameters, list(gradients)
        if self._momentum:
            torch._foreach_mul_(self._velocity, self._momentum)
            torch._foreach_add_(self._velocity, self._dense(gradients))
            steps = [*self._velocity]
        moving = [(p, s) for p, s in zip(parameters, steps, strict=True) if s is not None]
        torch._foreach_add_([p for p, _ in moving], [s for _, s in moving], alpha=-self._lr)


class _Adam(StepRule):
    _BETAS = (0.9, 0.999)
    _EPSILON = 1e-8

    def __init__(self, parameters: Sequence[Tensor], lr: float) -> None:
        super().__init__(parameters, lr)
        self._first, self._second = self._zeros(), self._zeros()
        self._steps = 0

    def step(self, gradients: Sequence[Tensor | None]) -> None:
        dense = self._dense(gradients)
        beta1, beta2 = self._BETAS
        self._steps += 1
        torch._foreach_lerp_(self._first, dense, 1 - beta1)
        torch._foreach_mul_(self._second, beta2)
        torch._foreach_addcmul_(self._second, dense, dense, 1 - beta2)
        denominators = torch._foreach_sqrt(self._second)
        torch._foreach_div_(denominators, (1 - beta2**self._steps) ** 0.5)
        torch._foreach_add_(denominators, self._EPSILON)
        torch._foreach_addcdiv_(
            self._parameters, self._first, denominators, -self._lr / (1 - beta1**self._steps)
        )
