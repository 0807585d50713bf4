"""A node's users: drawn by secret coins, each bounded, answered for by one integer sum.

>>> from dpfl_flower.client.users.request import CohortRequest
>>> from dpfl_flower.quantize import IntegerGrid
>>> users = {"ann": 1.0, "bob": 3.0}
>>> cohort = UserCohort(users, local_update=lambda arrays, data: {"mean": arrays["mean"] + data})
>>> request = CohortRequest(
...     grid=IntegerGrid.for_noise_multiplier(1.0, 1), clip_norm=2.0, server_round=1,
...     sampling_rate=1.0,
... )
>>> total = cohort.answer(request, {"mean": np.zeros(1, np.float32)})
>>> total * request.grid.unit_size(2.0)  # 1, and 3 clipped to 2
array([2.99997234])
"""

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpfl_flower import checks
from dpfl_flower.client.errors import NODE_LOGGER, NodeError, NodeErrorCode
from dpfl_flower.client.local_request import LocalRequest
from dpfl_flower.client.users.closed_form import ClosedFormEngine, LocalUpdate
from dpfl_flower.client.users.engine import Chunk, Engine, UserEngine
from dpfl_flower.client.users.model import ModelFn
from dpfl_flower.client.users.registry import Member, UserRegistry, Users
from dpfl_flower.client.users.request import AnyRequest
from dpfl_flower.client.users.selection import select_engine
from dpfl_flower.client.users.training import LocalTraining
from dpfl_flower.layout import Array, ArrayLayout
from dpfl_flower.rng import RandomSource, secure

__all__ = ["UserCohort"]

logger = logging.getLogger(NODE_LOGGER)


@final
class UserCohort:
    """The users inside a node; the privacy unit is one of them.

    For each request a fresh cohort is drawn over the fixed registry, every user of it trains from
    the global model, and its clipped and rounded update is added to one exact integer sum. What
    leaves is that sum, with the sum of the clip indicators as its last entry where the grid has
    one; how many users took part stays here.

    What one user moves the sum by is that user's contribution and nothing else: it depends on the
    user's records, the recipe and the global arrays, not on other users, to the last bit; and its
    norm is held to the grid's bound in integers. A user whose records are missing is as good as
    absent: zeros, and 0 for the indicator. So is one whose training raises, or whose update holds
    NaN or infinity. Nobody but this node's log learns of it.

    Parameters
    ----------
    users : mapping or LazyUsers
        Each user's data by the user's own name: the model's inputs and the targets, tensors or
        numpy arrays with one row per record; for a closed form whatever that takes. Names seed
        shuffling, so a name must not depend on who else is registered: a list is refused, because
        whoever leaves it renames those behind.
    model_fn : callable, with ``training``
        Builds the model; its ``state_dict`` has the global arrays' names.
    training : LocalTraining, with ``model_fn``
        What each user does.
    local_update : callable, instead of the two
        The app's own training of one user: ``local_update(global_arrays, user_data) -> arrays``.
    engine : Engine
        How users are trained; by default whatever is faster for this model.
    example : sequence of Tensor or array, with ``model_fn``
        Inputs and target of one made-up record, of which only shapes and dtypes count. They are
        public constants and decide, with the model, how users are trained; taken from somebody's
        records, that user's would decide how everybody is. A user whose records look otherwise is
        trained alone or, where the model cannot take them, contributes zeros.
    device : str, torch.device or None
        None: ``"cuda"`` where there is one, else ``"cpu"``.
    obeys_lists : bool
        Whether this is a simulation, in which a request may name the users and coins may follow a
        seed. On a real node whoever names a single user reads that user's update.
    rng : RandomSource or None
        Of the coins; the operating system's by default. One that anybody could know protects
        nobody, so sampling would not amplify anything: refused but in a simulation.

    Raises
    ------
    ValueError
        Naming the argument.
    """

    def __init__(
        self,
        users: Users,
        *,
        model_fn: ModelFn | None = None,
        training: LocalTraining | None = None,
        local_update: LocalUpdate | None = None,
        engine: Engine | str = Engine.AUTO,
        example: Sequence[Tensor | NDArray[Any]] | None = None,
        device: str | torch.device | None = None,
        obeys_lists: bool = False,
        rng: RandomSource | None = None,
    ) -> None:
        if (model_fn is None) != (training is None) or (model_fn is None) == (local_update is None):
            raise ValueError(
                f"model_fn={model_fn!r} and training={training!r}, or local_update="
                f"{local_update!r}: one or the other must be given"
            )
        if model_fn is not None and example is None:
            raise ValueError(
                "example=None must be given with model_fn: inputs and target of one made-up "
                "record, since no user's records may decide how the others are trained"
            )
        if rng is not None and not rng.protects and not obeys_lists:
            raise ValueError(
                f"rng={rng!r} must protect: coins that follow a seed amplify nothing. Leave it "
                "out, or say obeys_lists=True for a simulation"
            )
        self._registry = UserRegistry(users)
        self._model_fn, self._training, self._local_update = model_fn, training, local_update
        self._kind = checks.choice(Engine, engine=engine)
        self._example = [_as_tensor(part) for part in example or ()]
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._obeys_lists = obeys_lists
        self._rng = secure() if rng is None else rng
        self._engine: UserEngine | None = None
        self._turn = threading.Lock()  # one model, one user of it at a time

    @property
    def population(self) -> int:
        """How many users are registered, a public bound; not how many take part."""
        return len(self._registry)

    @property
    def chunk(self) -> Chunk | None:
        """How many users are in memory at once and what they take; None before the first round."""
        return None if self._engine is None else self._engine.chunk

    def answer(self, request: AnyRequest, global_arrays: Mapping[str, Array]) -> NDArray[np.int64]:
        """Return the sum of the contributions of a freshly drawn cohort.

        Parameters
        ----------
        request : CohortRequest, DistributedRequest or LocalRequest
        global_arrays : mapping of name to array
            What every user starts from; ``request.grid.dimension`` floating entries in all.

        Returns
        -------
        int64 array, shape (grid.width,), or (grid.padded,) for distributed noise, no share added

        Raises
        ------
        ValueError
            When the arrays do not fit the grid or the model, or when the request names a user who
            is not registered.
        NodeError
            POLICY_REFUSED where the request names users and this node does not obey lists, or where
            local noise counts on coins that follow a seed;
            MODEL_REFUSED where the model cannot be trained for one user after the other in
            isolation.
        """
        dimension = ArrayLayout.of(global_arrays).dimension
        if dimension != request.grid.dimension:
            raise ValueError(f"dimension={request.grid.dimension} must be the model's, {dimension}")
        bounded = request.open_sum()
        with self._turn:
            members = self._draw(request)
            engine = self._engine or self._build(global_arrays)
            for update in engine.updates(members, global_arrays, server_round=request.server_round):
                bounded.add(update.values, update.reference)
        return bounded.total

    def _draw(self, request: AnyRequest) -> list[Member]:
        registry = self._registry
        if request.users is not None:
            if not self._obeys_lists:
                raise NodeError(
                    NodeErrorCode.POLICY_REFUSED,
                    "the request names users, but this node draws its own (obeys_lists=False)",
                )
            return [registry[registry.find(user)] for user in request.users]
        assert request.sampling_rate is not None
        if isinstance(request, LocalRequest) and not self._rng.protects:
            # Against the server these coins amplify, so that it must not be able to guess them.
            raise NodeError(
                NodeErrorCode.POLICY_REFUSED,
                f"rng={self._rng!r} must protect: the node's ledger counts on its coins",
            )
        coins = self._rng.coins(request.sampling_rate, len(registry))
        return [registry[position] for position in np.flatnonzero(coins).tolist()]

    def _build(self, global_arrays: Mapping[str, Array]) -> UserEngine:
        """Build the engine, from public constants alone."""
        if self._local_update is not None:
            self._engine = ClosedFormEngine(self._local_update)
            return self._engine
        assert self._model_fn is not None and self._training is not None
        self._engine = select_engine(
            self._kind,
            self._model_fn,
            self._training,
            device=self._device,
            example=self._example,
            global_arrays=global_arrays,
        )
        chunk = self._engine.chunk
        logger.info(
            "%s: %d users at a time, at most %.1f MiB",
            type(self._engine).__name__,
            chunk.users,
            chunk.bytes / 2**20,
        )
        return self._engine


def _as_tensor(part: Tensor | NDArray[Any]) -> Tensor:
    return part.detach() if isinstance(part, Tensor) else torch.tensor(part)
