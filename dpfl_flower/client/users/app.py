"""A ClientApp for a node of many users."""

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod
from numpy.typing import NDArray

from dpfl_flower import records
from dpfl_flower.client.awaiting import request_awaiting_noise
from dpfl_flower.client.errors import NodeError, NodeErrorCode, guard_mod
from dpfl_flower.client.policy import NodePolicy
from dpfl_flower.client.users.request import AnyRequest, CohortRequest
from dpfl_flower.wire import array_record, config_record, read_array

if TYPE_CHECKING:
    from dpfl_flower.client.users.cohort import UserCohort

__all__ = ["CohortFn", "user_cohort_app"]

CohortFn = Callable[[Context], "UserCohort"]
"""Builds a node's cohort, once for a process and a run."""

_Key = tuple[int, int, str, str]

_cohorts: Final[dict[_Key, "UserCohort"]] = {}
_lock: Final = threading.Lock()


def user_cohort_app(cohort_fn: CohortFn, *, mods: Sequence[Mod] | None = None) -> ClientApp:
    """Return a ClientApp that answers each training message with one integer sum.

    The message holds the global arrays in the ArrayRecord ``arrays`` and a `CohortRequest` in the
    ConfigRecord ``cohort``. The reply holds one int64 array in the ArrayRecord ``integer-sum`` and
    nothing else: neither a count nor a metric. Whatever goes wrong is logged on the node and
    answered with a fixed code (`NodeErrorCode`); a request that does not fit is MALFORMED_REQUEST.

    Behind `noise_share_mod` the message holds a plan for distributed noise instead, and the mod
    adds this node's share to the sum; behind `local_noise_mod` one for local noise, and the mod
    adds all of it.

    A node's own ``min-noise-multiplier`` holds for the grid that is asked for. Its ``max-epsilon``
    cannot be kept by a node that does not draw the noise: with one set, the node refuses.

    Parameters
    ----------
    cohort_fn : callable
        Builds the node's `UserCohort`. Flower unpickles the app for every message; the cohort, with
        the users' data and the model, stays in the process.
    mods : sequence of Mod, optional
        Flower mods around every message.
    """
    app = ClientApp(mods=[guard_mod, *(mods or ())])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        request, arrays = _parse(message.content)
        if isinstance(request, CohortRequest):  # else the mod that adds noise has checked
            NodePolicy.from_node_config(context.node_config).check(
                noise_multiplier=request.grid.noise_multiplier, epsilon=float("inf")
            )
        cohort = _resident(cohort_fn, context)
        try:
            total = cohort.answer(request, arrays)
        except ValueError as error:
            if isinstance(error, NodeError):
                raise
            raise NodeError(NodeErrorCode.MALFORMED_REQUEST, str(error)) from error
        reply = ArrayRecord({records.SUM: Array(total)})
        return Message(RecordDict({records.INTEGER_SUM: reply}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        raise NodeError(NodeErrorCode.NOT_IMPLEMENTED, "a cohort of users answers no metrics")

    return app


def _parse(content: RecordDict) -> tuple[AnyRequest, dict[str, NDArray[np.generic]]]:
    try:
        request: AnyRequest | None = request_awaiting_noise()
        if request is None:
            record = config_record(content, records.COHORT)
            if record is None:
                raise KeyError(records.COHORT)
            request = CohortRequest.from_config(record)
        found = array_record(content, records.ARRAYS)
        return request, {name: read_array(array) for name, array in found.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise NodeError(
            NodeErrorCode.MALFORMED_REQUEST, "the cohort request is malformed"
        ) from error


def _resident(cohort_fn: CohortFn, context: Context) -> "UserCohort":
    # The function itself is another object for every message: it is known by its name.
    key = (context.run_id, context.node_id, cohort_fn.__module__, cohort_fn.__qualname__)
    with _lock:
        if key not in _cohorts:
            for stale in [other for other in _cohorts if other[0] != context.run_id]:
                del _cohorts[stale]  # a run that is over does not keep its data in memory
            _cohorts[key] = cohort_fn(context)
        return _cohorts[key]
