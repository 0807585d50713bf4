"""A chunk of users at once, one slot of every operation for each."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final, final

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from dpfl_flower.client.errors import ModelRefused
from dpfl_flower.client.users.engine import Chunk, Update, UserEngine, contributes_zeros
from dpfl_flower.client.users.loop import LoopEngine
from dpfl_flower.client.users.model import ModelFn, ResidentModel
from dpfl_flower.client.users.registry import Member, as_records
from dpfl_flower.client.users.request import UserId
from dpfl_flower.client.users.schedule import Schedule
from dpfl_flower.client.users.step_graph import SLOT_MULTIPLE, StepGraph, aligned_empty
from dpfl_flower.client.users.training import LocalTraining
from dpfl_flower.layout import Array

__all__ = ["StackedEngine"]

_CPU_BYTES: Final = 6 << 20
"""A chunk that stays in a core's cache; beyond it every operation waits for memory."""
_CUDA_SHARE: Final = 8
"""A chunk takes at most this part of a GPU's memory."""
_MOST_SLOTS: Final = {"cpu": 128, "cuda": 1024}
_MOST_STEPS: Final = 1024
"""A user with more steps is trained alone: a stack waits for its slowest."""
_SORTED_CHUNKS: Final = 8


@dataclass(frozen=True)
class _Ready:
    """A member whose records have been read."""

    member: Member
    data: list[Tensor]
    records: int


@final
class StackedEngine(UserEngine):
    """Trains a chunk of users at once by ``torch.vmap``, traced once.

    Users of unequal sizes are padded and masked; sorted by size, they wait little for each other.
    A user whose records have another shape or dtype than the example's, or who has more than 1024
    steps to take, goes through a `LoopEngine`. Whether it does is up to its own records alone.

    Parameters
    ----------
    model_fn : callable
    training : LocalTraining
    device : str or torch.device
    example : sequence of Tensor
        Inputs and target of one record, without a dimension of records; only shapes and dtypes are
        used.

    Raises
    ------
    ModelRefused
        When the model normalises over a batch, which padding would change, or when vmap cannot
        handle it: it draws random numbers, changes a buffer, or branches on values.
    """

    def __init__(
        self,
        model_fn: ModelFn,
        training: LocalTraining,
        *,
        device: str | torch.device,
        example: Sequence[Tensor],
    ) -> None:
        self._training = training
        self._resident = resident = ResidentModel(model_fn, device=device)
        self._alone = LoopEngine(model_fn, training, device=device)
        self._example = [(part.shape, part.dtype) for part in example]
        if any(isinstance(module, _BatchNorm) for module in resident.model.modules()):
            raise ModelRefused("a stack pads batches, which batch normalisation would see")
        graph = self._trace(example, SLOT_MULTIPLE)
        multiple = _budget(resident.device) // self._bytes(graph)
        slots = SLOT_MULTIPLE * max(1, multiple)
        slots = min(slots, _MOST_SLOTS[resident.device.type])
        self._graph = graph if slots == SLOT_MULTIPLE else self._trace(example, slots)
        self._stacks = {
            name: aligned_empty(slots, parameter.detach())
            for name, parameter in resident.parameters.items()
        }

    @property
    def chunk(self) -> Chunk:
        """The slots of the stack, and the most that all values of a step take at once."""
        return Chunk(self._graph.slots, self._bytes(self._graph))

    def updates(
        self, members: Iterable[Member], global_arrays: Mapping[str, Array], *, server_round: int
    ) -> Iterator[Update]:
        """Yield each member's update; see `UserEngine.updates`."""
        self._resident.load(global_arrays)
        alone: list[Member] = []
        waiting = iter(members)
        with _one_thread(self._resident.device):
            while window := list(islice(waiting, _SORTED_CHUNKS * self._graph.slots)):
                ready = [one for one in map(self._read, window) if one is not None]
                alone += [one.member for one in ready if not self._fits(one)]
                ready = [one for one in ready if one.records and self._fits(one)]
                ready.sort(key=lambda one: one.records, reverse=True)
                for start in range(0, len(ready), self._graph.slots):
                    chunk = ready[start : start + self._graph.slots]
                    for user, row in self._train(chunk, server_round):
                        yield Update(user, [row], None)
        if alone:
            yield from self._alone.updates(alone, global_arrays, server_round=server_round)

    def _trace(self, example: Sequence[Tensor], slots: int) -> StepGraph:
        resident = self._resident
        try:
            return StepGraph(
                resident.model,
                self._training.loss_fn,
                parameters=resident.parameters,
                fixed=resident.fixed,
                example=example,
                slots=slots,
                batch_size=self._training.batch_size,
                device=resident.device,
            )
        except Exception as error:
            raise ModelRefused(f"torch.vmap cannot stack this model: {error}") from error

    def _bytes(self, graph: StepGraph) -> int:
        parameters = sum(p.nbytes for p in self._resident.parameters.values())
        # Beside the step itself: the optimizer's state, and the updates of those who are through.
        return graph.bytes + (self._training.optimizer_states + 2) * graph.slots * parameters

    def _read(self, member: Member) -> _Ready | None:
        try:
            data = as_records(member.load())
        except Exception as error:
            contributes_zeros(member, error)
            return None
        return _Ready(member, data, len(data[0]))

    def _fits(self, one: _Ready) -> bool:
        shapes = [(part.shape[1:], part.dtype) for part in one.data]
        return shapes == self._example and self._training.steps(one.records) <= _MOST_STEPS

    def _train(self, chunk: Sequence[_Ready], server_round: int) -> list[tuple[UserId, Tensor]]:
        """Return each user's update, one row; a user whose data makes torch raise is left out."""
        try:
            return self._run(chunk, server_round)
        except Exception as error:
            if len(chunk) == 1:
                contributes_zeros(chunk[0].member, error)
                return []
        # Whose it was shows when halves are trained: nobody's bits depend on the company.
        half = len(chunk) // 2
        return self._train(chunk[:half], server_round) + self._train(chunk[half:], server_round)

    def _run(self, chunk: Sequence[_Ready], server_round: int) -> list[tuple[UserId, Tensor]]:
        recipe, device = self._training, self._resident.device
        stacks = list(self._stacks.values())
        for name, stack in self._stacks.items():
            stack.copy_(self._resident.base(name))
        rule = recipe.rule(stacks)
        pool = [torch.cat(parts).to(device) for parts in zip(*(c.data for c in chunk), strict=True)]
        schedule = self._schedule(chunk, server_round)
        slots, batch_size = self._graph.slots, recipe.batch_size
        through: list[tuple[UserId, Tensor]] = []
        for step, (picks, weights) in enumerate(schedule, start=1):
            at = picks.to(device)
            batch = [part[at].view(slots, batch_size, *part.shape[1:]) for part in pool]
            rule.step(self._graph.gradients(stacks, batch, weights.to(device)))
            done = [slot for slot, steps in enumerate(schedule.steps) if steps == step]
            if done:  # neighbours, since the chunk is sorted
                rows = self._rows(slice(done[0], done[-1] + 1))
                users = [chunk[slot].member.user for slot in done]
                through += zip(users, rows, strict=True)
        return through

    def _schedule(self, chunk: Sequence[_Ready], server_round: int) -> Schedule:
        recipe = self._training
        orders = None
        if recipe.shuffle:
            orders = [
                [
                    recipe.order(
                        one.records, server_round=server_round, user=one.member.user, epoch=epoch
                    )
                    for epoch in range(recipe.epochs)
                ]
                for one in chunk
            ]
        return Schedule(
            [one.records for one in chunk],
            batch_size=recipe.batch_size,
            epochs=recipe.epochs,
            orders=orders,
            slots=self._graph.slots,
        )

    def _rows(self, slots: slice) -> Tensor:
        """Return the updates of some slots, one row each, in the order of the global arrays."""
        resident = self._resident
        count = slots.stop - slots.start
        parts = []
        for name, reference in zip(
            resident.released_parameters(), resident.reference(), strict=True
        ):
            if name is None:  # stays as it is
                parts.append(reference.new_zeros((count, reference.numel())))
            else:
                parts.append((self._stacks[name][slots] - reference).reshape(count, -1))
        return torch.cat(parts, dim=1).cpu()


def _budget(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory) // _CUDA_SHARE
    return _CPU_BYTES


@contextlib.contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """Hold torch to one thread, so that none of its loops ends inside a slot."""
    if device.type != "cpu":
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
