"""A NumPyClient behind the Message API.

Flower's own bridge reads and writes records under its old names, so that a strategy of the Message
API gets nothing but errors from it. This one speaks the names that the strategies use.

>>> from flwr.client import NumPyClient
>>> class Echo(NumPyClient):
...     def fit(self, parameters, config):
...         return parameters, 1, {}
>>> app = numpy_client_app(lambda context: Echo())
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Final, Protocol, TypeVar, runtime_checkable

import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.client import Client, NumPyClient
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod
from numpy.typing import NDArray

from dpfl_flower import records
from dpfl_flower.client.errors import NODE_LOGGER, NodeError, NodeErrorCode, guard_mod
from dpfl_flower.client.legacy_client import LegacyClient

logger = logging.getLogger(NODE_LOGGER)

GET_PARAMETERS: Final = "get_parameters"
"""The query action (message type ``query.get_parameters``) for a client's current arrays."""

ClientFn = Callable[[Context], NumPyClient | Client]
R = TypeVar("R", ArrayRecord, ConfigRecord)


@runtime_checkable
class ClaimsPrivacy(Protocol):
    """A client that can say what its answers have cost."""

    def privacy_claim(self) -> ConfigRecord | None:
        """Return the public claim that goes with the last answer, None where there is none."""


def numpy_client_app(client_fn: ClientFn, *, mods: Sequence[Mod] | None = None) -> ClientApp:
    """Turn a client function into a ClientApp for strategies of the Message API.

    - ``train`` calls ``fit``: arrays come back under the names, in the order and with the dtypes of
      the request, metrics and ``num-examples`` in the MetricRecord ``metrics``, and the client's
      `privacy_claim`, if it has one, in the ConfigRecord ``privacy``;
    - ``evaluate`` calls ``evaluate``: the loss is the metric ``loss``;
    - ``query`` calls ``get_properties`` and answers in the ConfigRecord ``properties``;
      ``query.get_parameters`` calls ``get_parameters`` and answers in the ArrayRecord ``arrays``.

    The ConfigRecord of the request is the ``config`` dictionary. Metrics that are not numbers
    cannot travel in a MetricRecord: they are dropped, and the node's log names them. An exception
    is logged on the node and answered with a fixed code (`NodeErrorCode`), also one from a mod.

    Parameters
    ----------
    client_fn : Callable[[Context], NumPyClient | Client]
        Builds the client of one message. A ``NumPyClient`` does not need ``to_client()``.
    mods : Sequence[Mod], optional
        Flower mods around every kind of message.
    """
    app = ClientApp(mods=[guard_mod, *(mods or ())])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(_fit(_as_numpy(client_fn(context)), message.content), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return Message(_evaluate(_as_numpy(client_fn(context)), message.content), reply_to=message)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return Message(_query(_as_numpy(client_fn(context)), message.content), reply_to=message)

    @app.query(GET_PARAMETERS)
    def get_parameters(message: Message, context: Context) -> Message:
        return Message(
            _get_parameters(_as_numpy(client_fn(context)), message.content), reply_to=message
        )

    return app


def _as_numpy(client: NumPyClient | Client) -> NumPyClient:
    # `NumPyClient.to_client()` keeps the NumPyClient in this attribute.
    inner = getattr(client, "numpy_client", client)
    if isinstance(inner, NumPyClient):
        return inner
    if isinstance(inner, Client):
        return LegacyClient(inner)
    raise TypeError(f"client_fn must return a NumPyClient or a Client, not {type(client).__name__}")


def _fit(client: NumPyClient, content: RecordDict) -> RecordDict:
    _require_override(client, "fit")
    key, arrays = _the_record(content, ArrayRecord, records.ARRAYS)
    result = client.fit(_to_ndarrays(arrays), _config(content))
    parameters, num_examples, metrics = _triple(result, "fit", "parameters, num_examples, metrics")
    reply = RecordDict({key: _like(arrays, parameters), records.METRICS: _metrics(metrics)})
    reply.metric_records[records.METRICS][records.NUM_EXAMPLES] = _weight(num_examples)
    if isinstance(client, ClaimsPrivacy) and (claim := client.privacy_claim()) is not None:
        reply[records.PRIVACY] = claim
    return reply


def _evaluate(client: NumPyClient, content: RecordDict) -> RecordDict:
    _require_override(client, "evaluate")
    _, arrays = _the_record(content, ArrayRecord, records.ARRAYS)
    result = client.evaluate(_to_ndarrays(arrays), _config(content))
    loss, num_examples, metrics = _triple(result, "evaluate", "loss, num_examples, metrics")
    if not isinstance(loss, Real):
        raise NodeError(NodeErrorCode.MALFORMED_REPLY, f"evaluate returned the loss {loss!r}")
    record = _metrics(metrics)
    record[records.LOSS] = float(loss)
    record[records.NUM_EXAMPLES] = _weight(num_examples)
    return RecordDict({records.METRICS: record})


def _query(client: NumPyClient, content: RecordDict) -> RecordDict:
    _require_override(client, "get_properties")
    properties = client.get_properties(_config(content))
    return RecordDict({records.PROPERTIES: ConfigRecord(dict(properties))})


def _get_parameters(client: NumPyClient, content: RecordDict) -> RecordDict:
    _require_override(client, "get_parameters")
    parameters = [np.asarray(array) for array in client.get_parameters(_config(content))]
    return RecordDict({records.ARRAYS: ArrayRecord(parameters)})


def _require_override(client: NumPyClient, method: str) -> None:
    if getattr(type(client), method) is getattr(NumPyClient, method):
        raise NodeError(
            NodeErrorCode.NOT_IMPLEMENTED, f"{type(client).__name__} does not override {method}()"
        )


def _the_record(content: RecordDict, kind: type[R], name: str) -> tuple[str, R]:
    """Return the record of the conventional name, or the only one of its kind."""
    found = {key: record for key, record in content.items() if isinstance(record, kind)}
    key = name if name in found else next(iter(found), name)
    if key not in found or (key != name and len(found) > 1):
        raise NodeError(
            NodeErrorCode.MALFORMED_REQUEST,
            f"expected one {kind.__name__}, or one named {name!r}, but got {sorted(found)}",
        )
    return key, found[key]


def _config(content: RecordDict) -> dict[str, Any]:
    if not content.config_records:
        return {}
    return dict(_the_record(content, ConfigRecord, records.CONFIG)[1])


def _to_ndarrays(arrays: ArrayRecord) -> list[NDArray[Any]]:
    try:
        return arrays.to_numpy_ndarrays()
    except (TypeError, ValueError) as error:
        raise NodeError(
            NodeErrorCode.MALFORMED_REQUEST, "the request's arrays are not numpy arrays"
        ) from error


def _like(template: ArrayRecord, parameters: object) -> ArrayRecord:
    """Give ``parameters`` the names, the order and the dtypes of ``template``."""
    if not isinstance(parameters, Sequence) or len(parameters) != len(template):
        raise NodeError(
            NodeErrorCode.MALFORMED_REPLY,
            f"fit must return a list of {len(template)} arrays, as many as it was given",
        )
    reply = ArrayRecord()
    for (name, wanted), parameter in zip(template.items(), parameters, strict=True):
        array = np.asarray(parameter)
        dtype = np.dtype(wanted.dtype)
        if array.shape != tuple(wanted.shape) or not np.can_cast(array.dtype, dtype, "same_kind"):
            raise NodeError(
                NodeErrorCode.MALFORMED_REPLY,
                f"fit returned {array.dtype}{list(array.shape)} for {name!r}, "
                f"which is {dtype}{list(wanted.shape)}",
            )
        with np.errstate(over="ignore"):  # too large for a float16 becomes inf, and travels as such
            reply[name] = Array(np.asarray(array, dtype=dtype))
    return reply


def _metrics(metrics: Mapping[str, object]) -> MetricRecord:
    record = MetricRecord()
    for name, value in metrics.items():
        number = _number(value)
        if number is None:
            logger.error("Metric %r is dropped: %s is not a number", name, type(value).__name__)
        else:
            record[name] = number
    return record


def _number(value: object) -> int | float | list[int] | list[float] | None:
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        if all(isinstance(item, Integral) for item in value):
            return [int(item) for item in value]
        return [float(item) for item in value] if all(isinstance(i, Real) for i in value) else None
    if isinstance(value, Integral):  # a bool too
        return int(value)
    return float(value) if isinstance(value, Real) else None


def _weight(num_examples: object) -> int | float:
    weight = _number(num_examples)
    if weight is None or isinstance(weight, list) or not 0 <= weight < float("inf"):
        raise NodeError(NodeErrorCode.MALFORMED_REPLY, "num_examples must be a finite number >= 0")
    return weight


def _triple(result: object, method: str, wanted: str) -> tuple[Any, Any, Mapping[str, object]]:
    if isinstance(result, tuple | list) and len(result) == 3 and isinstance(result[2], Mapping):
        return result[0], result[1], result[2]
    raise NodeError(NodeErrorCode.MALFORMED_REPLY, f"{method} must return ({wanted})")
