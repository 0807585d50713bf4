"""Between the protocol's messages and Flower's records.

A message becomes one ConfigRecord: numbers, text and bytes as they are, a tuple of dataclasses as
one list for each of its fields. A masked vector travels in an ArrayRecord beside it. Whatever is
read is checked field by field; nothing in it is executed.

>>> from dpfl_flower.secagg.messages import UnmaskRequest
>>> request = UnmaskRequest(server_round=2, survivors=(5, 7), dropped=())
>>> decode_request(encode(request)) == request
True
"""

import dataclasses
import json
import math
import typing
from collections.abc import Mapping
from typing import Any, Final, TypeVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from dpfl_flower import records
from dpfl_flower.secagg import messages
from dpfl_flower.secagg.messages import Masked, Reply, Request, Stage, Token
from dpfl_flower.wire import array_record, config_record, read_array, write_array

__all__ = [
    "decode_reply",
    "decode_request",
    "encode",
    "from_bytes",
    "from_config",
    "to_bytes",
    "to_config",
]

M = TypeVar("M")

_STAGE: Final = "stage"
_REQUESTS: Final[Mapping[int, type[Request]]] = {
    kind.stage: kind for kind in typing.get_args(messages.Request)
}
_REPLIES: Final[Mapping[int, type[Reply]]] = {
    kind.stage: kind for kind in typing.get_args(messages.Reply)
}
_MAX_INT: Final = 2**64 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tokens:
    """The part of a masked reply that is no array."""

    tokens: tuple[Token, ...]


def encode(message: Request | Reply) -> RecordDict:
    """Return the records that carry ``message``."""
    if isinstance(message, Masked):
        config = to_config(_Tokens(tokens=message.tokens))
        config[_STAGE] = int(message.stage)
        content = RecordDict({records.SECAGG: config})
        content[records.MASKED] = ArrayRecord({records.SUM: write_array(message.vector)})
        return content
    config = to_config(message)
    config[_STAGE] = int(message.stage)
    return RecordDict({records.SECAGG: config})


def decode_request(content: RecordDict) -> Request:
    """Return the request in ``content``.

    Raises
    ------
    ValueError
        If a field is missing, unknown, of another type or out of range.
    """
    return _decode(content, _REQUESTS)


def decode_reply(content: RecordDict) -> Reply:
    """Return the reply in ``content``; errors as for `decode_request`."""
    record = config_record(content, records.SECAGG)
    if record is not None and record.get(_STAGE) == int(Stage.MASK):
        rest = {name: value for name, value in record.items() if name != _STAGE}
        tokens = from_config(_Tokens, rest).tokens
        try:
            vector = read_array(array_record(content, records.MASKED)[records.SUM])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError("the masked vector is missing or no array") from error
        if vector.dtype != np.uint8 or vector.ndim != 1:
            raise ValueError(f"vector={vector.dtype}{list(vector.shape)} must be flat uint8")
        return Masked(vector=vector.view(np.uint8), tokens=tokens)
    return _decode(content, _REPLIES)


def _decode(content: RecordDict, kinds: Mapping[int, type[M]]) -> M:
    record = config_record(content, records.SECAGG)
    if record is None:
        raise ValueError(f"a ConfigRecord {records.SECAGG!r} must be there")
    fields = dict(record)
    stage = fields.pop(_STAGE, None)
    if type(stage) is not int or stage not in kinds:
        raise ValueError(f"stage={stage!r} must be one of {sorted(kinds)}")
    return from_config(kinds[stage], fields)


def to_config(message: Any) -> ConfigRecord:
    """Return a flat dataclass as a record; see `from_config`."""
    return ConfigRecord(_flat(message))


def to_bytes(message: Any) -> bytes:
    """Return a flat dataclass as JSON, in a fraction of the time that a record of it takes.

    >>> from dpfl_flower.secagg.messages import Advertised
    >>> keys = Advertised(mask_key=b"m", seal_key=bytes([0, 255]), identity=b"", signature=b"")
    >>> from_bytes(Advertised, to_bytes(keys)) == keys
    True
    """
    flat = _flat(message)
    for name in _columns_of_bytes(type(message)):
        value = flat[name]
        flat[name] = value.hex() if isinstance(value, bytes) else [item.hex() for item in value]
    return json.dumps(flat).encode()


def from_bytes(kind: type[M], data: bytes) -> M:
    """Read what `to_bytes` wrote; ValueError for anything else."""
    try:
        flat = json.loads(data)
        for name in _columns_of_bytes(kind):
            value = flat[name]
            flat[name] = (
                bytes.fromhex(value)
                if isinstance(value, str)
                else [bytes.fromhex(item) for item in value]
            )
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{kind.__name__} is damaged") from error
    return from_config(kind, flat)


def _flat(message: Any) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, (kind, items) in _fields(type(message)).items():
        value = getattr(message, name)
        if not items:
            flat[name] = value
        elif dataclasses.is_dataclass(kind):
            for inner in _fields(typing.cast("type[Any]", kind)):
                flat[f"{name}.{inner}"] = [getattr(item, inner) for item in value]
        else:
            flat[name] = list(value)
    return flat


def from_config(kind: type[M], record: Mapping[str, Any]) -> M:
    """Read a dataclass of integers, numbers, bytes, and tuples of them or of such dataclasses.

    Raises
    ------
    ValueError
        If a field is missing, unknown, of another type or out of range.
    """
    rest = dict(record)
    values: dict[str, Any] = {}
    for name, (inner_kind, items) in _fields(kind).items():
        if not items:
            values[name] = _value(name, rest.pop(name, None), inner_kind)
        elif dataclasses.is_dataclass(inner_kind):
            columns = {
                inner: _list(f"{name}.{inner}", rest, field_kind)
                for inner, (field_kind, _) in _fields(typing.cast("type[Any]", inner_kind)).items()
            }
            if len({len(column) for column in columns.values()}) != 1:
                raise ValueError(f"{name}: its lists must be of one length")
            values[name] = tuple(
                inner_kind(**dict(zip(columns, row, strict=True)))
                for row in zip(*columns.values(), strict=True)
            )
        else:
            values[name] = _list(name, rest, inner_kind)
    if rest:
        raise ValueError(f"unknown fields {sorted(rest)}")
    return kind(**values)


def _list(name: str, rest: dict[str, Any], kind: type[Any]) -> tuple[Any, ...]:
    found = rest.pop(name, None)
    if not isinstance(found, list):
        raise ValueError(f"{name}={type(found).__name__} must be a list")
    if _all_fit(found, kind):
        return tuple(found)
    return tuple(_value(name, item, kind) for item in found)  # says which does not


def _all_fit(items: list[Any], kind: type[Any]) -> bool:
    """Whether `_value` would take all of them, as far as whole lists tell: most of the work."""
    if not set(map(type, items)) <= {kind}:
        return False
    return kind is bytes or (
        kind is int and (not items or (min(items) >= 0 and max(items) <= _MAX_INT))
    )


def _value(name: str, value: object, kind: type[Any]) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{name}={type(value).__name__} must be {kind.__name__}")
    if isinstance(value, int) and not 0 <= value <= _MAX_INT:
        raise ValueError(f"{name}={value!r} must be in [0, 2**64)")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}={value!r} must be finite")
    return value


_known_columns: Final[dict[type[Any], tuple[str, ...]]] = {}


def _columns_of_bytes(kind: type[Any]) -> tuple[str, ...]:
    """Return the names, in a flat record, of what is bytes or a list of bytes."""
    if kind in _known_columns:
        return _known_columns[kind]
    found = []
    for name, (inner, _) in _fields(kind).items():
        if dataclasses.is_dataclass(inner):
            parts = _fields(typing.cast("type[Any]", inner)).items()
            found += [f"{name}.{part}" for part, (of, _) in parts if of is bytes]
        elif inner is bytes:
            found.append(name)
    _known_columns[kind] = tuple(found)
    return _known_columns[kind]


_known_fields: Final[dict[type[Any], Mapping[str, tuple[type[Any], bool]]]] = {}


def _fields(kind: type[Any]) -> Mapping[str, tuple[type[Any], bool]]:
    """Return the type of each field, or of its items, and whether it is a tuple of them."""
    if kind in _known_fields:
        return _known_fields[kind]
    hints = typing.get_type_hints(kind)
    found = {}
    for entry in dataclasses.fields(kind):
        hint = hints[entry.name]
        items = typing.get_origin(hint) is tuple
        found[entry.name] = (typing.get_args(hint)[0] if items else hint, items)
    _known_fields[kind] = found
    return found
