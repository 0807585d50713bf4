"""Does what others do move a user's update? Asked of an engine before it sees anybody's records.

The bound on one user's influence holds only if a user changes nothing but its own contribution. An
engine that carries something from one user to the next (a model with state in plain attributes), or
whose last bits depend on who shares a stack, breaks that silently. So each engine first trains
made-up users, in different company, and has to give the same bits.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from dpfl_flower.client.errors import ModelRefused
from dpfl_flower.client.made_up_weights import made_up_arrays
from dpfl_flower.client.users.engine import UserEngine
from dpfl_flower.client.users.registry import Member
from dpfl_flower.layout import Array, as_numpy

__all__ = ["require_isolated"]

_LEAST_USERS = 3


def require_isolated(
    engine: UserEngine,
    example: Sequence[Tensor],
    global_arrays: Mapping[str, Array],
    *,
    batch_size: int,
    exact: bool,
) -> None:
    """Raise unless made-up users get the same updates in two different orders and companies.

    Parameters
    ----------
    engine : UserEngine
    example : sequence of Tensor
        Inputs and target of one record; only shapes and dtypes are used, so that the verdict
        depends on no record.
    global_arrays : mapping of name to array
        What the users start from; only names, shapes and dtypes are used.
    batch_size : int
        The recipe's, for users of less than a batch and of more.
    exact : bool
        Whether bits have to agree, or, on a device whose sums have no fixed order, numbers.

    Raises
    ------
    ModelRefused
        When an update depends on other users, or when no made-up user could be trained at all.
    """
    global_arrays = made_up_arrays(global_arrays)  # zeros would hide what a model couples
    for integer in (0, 1):  # an id or a class; 1 where it is a length
        members = _made_up_members(engine, example, batch_size, integer)
        company = _updates(engine, members, global_arrays)
        if company:
            break
    else:
        raise ModelRefused("the model does not train on made-up records; the node's log says why")
    apart = _updates(engine, [*reversed(members[1::2]), members[0]], global_arrays)
    if apart.keys() - company.keys():
        raise ModelRefused("whether a user can be trained depends on who else is trained")
    for user, update in apart.items():
        other = company[user]
        same = torch.equal(_bits(update), _bits(other))
        if not (same or (not exact and torch.allclose(update, other, rtol=1e-3, equal_nan=True))):
            raise ModelRefused(
                "a user's update depends on who else is trained: the model keeps state outside its "
                "parameters and buffers, or a stack is not exact on this machine"
            )


def _updates(
    engine: UserEngine, members: Sequence[Member], global_arrays: Mapping[str, Array]
) -> dict[int | str, Tensor]:
    found = {}
    for update in engine.updates(members, global_arrays, server_round=1):
        parts = [torch.from_numpy(as_numpy(part).reshape(-1).copy()) for part in update.values]
        found[update.user] = torch.cat(parts)
    return found


def _made_up_members(
    engine: UserEngine, example: Sequence[Tensor], batch_size: int, integer: int
) -> list[Member]:
    generator = torch.Generator().manual_seed(0)
    members = []
    for user in range(max(_LEAST_USERS, engine.chunk.users)):
        records = 1 + (user * 7) % (batch_size + 2)
        data = [_made_up(part, records, integer, generator) for part in example]
        members.append(Member(user, partial(_identity, data)))
    return members


def _identity(data: list[Tensor]) -> list[Tensor]:
    return data


def _made_up(part: Tensor, records: int, integer: int, generator: torch.Generator) -> Tensor:
    shape = (records, *part.shape)
    if not part.is_floating_point():
        return torch.full(shape, integer, dtype=part.dtype)
    return torch.rand(shape, generator=generator, dtype=torch.float32).to(part.dtype)


def _bits(update: Tensor) -> Tensor:
    return update.view(torch.uint8)
