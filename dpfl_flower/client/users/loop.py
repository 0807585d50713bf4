"""One user after the other, in one model that stays."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import final

import torch

from dpfl_flower.client.per_example import per_example_losses
from dpfl_flower.client.torch_seed import seed_torch
from dpfl_flower.client.users.engine import Chunk, Update, UserEngine, contributes_zeros
from dpfl_flower.client.users.model import ModelFn, ResidentModel
from dpfl_flower.client.users.registry import Member, as_records
from dpfl_flower.client.users.training import LocalTraining
from dpfl_flower.client.users.tuning import FactoredWeights, pool_before_relu
from dpfl_flower.layout import Array

__all__ = ["LoopEngine"]


@final
class LoopEngine(UserEngine):
    """Trains users one by one: any model, any sizes of records.

    Parameters
    ----------
    model_fn : callable
    training : LocalTraining
    device : str or torch.device
    """

    def __init__(
        self, model_fn: ModelFn, training: LocalTraining, *, device: str | torch.device
    ) -> None:
        self._training = training
        self._resident = ResidentModel(model_fn, device=device, channels_last=True)
        self._parameters = list(self._resident.parameters.values())
        self._detached = [parameter.detach() for parameter in self._parameters]
        self._factored: FactoredWeights | None = None
        if self._resident.device.type == "cpu":
            pool_before_relu(self._resident.model)
            if not training.optimizer_states:
                self._factored = FactoredWeights(self._resident.model)

    @property
    def chunk(self) -> Chunk:
        """One user: the model, its global values, a gradient and the optimizer's state."""
        copies = 3 + self._training.optimizer_states
        return Chunk(1, copies * sum(parameter.nbytes for parameter in self._parameters))

    def updates(
        self, members: Iterable[Member], global_arrays: Mapping[str, Array], *, server_round: int
    ) -> Iterator[Update]:
        """Yield each member's update; see `UserEngine.updates`."""
        resident = self._resident
        resident.load(global_arrays)
        reference = resident.reference()
        with _torch_seeds_put_back(resident.device):
            for member in members:
                resident.reset()
                if self._factored is not None:
                    self._factored.forget()
                try:
                    records = self._train(member, server_round)
                except Exception as error:
                    contributes_zeros(member, error)
                    continue
                if records:
                    yield Update(member.user, resident.released(), reference)

    def _train(self, member: Member, server_round: int) -> int:
        """Train the resident model on one user's records and return how many those are."""
        recipe, resident, user = self._training, self._resident, member.user
        data = as_records(member.load())
        records = len(data[0])
        seed = recipe.seed_for(server_round=server_round, user=user)
        seed_torch(seed, resident.device)  # dropout
        rule = recipe.rule(self._detached)
        for picks in recipe.batches(records, server_round=server_round, user=user):
            *inputs, targets = (resident.take(part, picks) for part in data)
            losses = per_example_losses(resident.model(*inputs), targets, recipe.loss_fn)
            gradients = torch.autograd.grad(losses.mean(), self._parameters, allow_unused=True)
            rule.step(gradients)
            if self._factored is not None:
                self._factored.step(recipe.lr)
        return records


@contextlib.contextmanager
def _torch_seeds_put_back(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
