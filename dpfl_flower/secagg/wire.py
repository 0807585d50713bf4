"""Between the protocol's messages and Flower's records.

A message becomes one ConfigRecord: numbers, text and bytes as they are, a tuple of dataclasses as
one list for each of their fields, in the order of their arguments. A masked vector travels in an
ArrayRecord beside it. Whatever is read is checked field by field; nothing in it is executed.

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
    for name in _layout(type(message)).of_bytes:
        value = flat[name]
        flat[name] = value.hex() if isinstance(value, bytes) else [item.hex() for item in value]
    return json.dumps(flat).encode()


def from_bytes(kind: type[M], data: bytes) -> M:
    """Read what `to_bytes` wrote; ValueError for anything else."""
    try:
        flat = json.loads(data)
        for name in _layout(kind).of_bytes:
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
    for part in _layout(type(message)).parts:
        value = getattr(message, part.name)
        if part.columns:
            for column in part.columns:
                flat[column.flat] = [getattr(item, column.name) for item in value]
        else:
            flat[part.name] = list(value) if part.many else value
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
    for part in _layout(kind).parts:
        if part.columns:
            lists = [_list(column.flat, rest, column.kind) for column in part.columns]
            if len(set(map(len, lists))) != 1:
                raise ValueError(f"{part.name}: its lists must be of one length")
            values[part.name] = tuple(map(part.kind, *lists))
        elif part.many:
            values[part.name] = _list(part.name, rest, part.kind)
        else:
            values[part.name] = _value(part.name, rest.pop(part.name, None), part.kind)
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


@dataclasses.dataclass(frozen=True)
class _Column:
    """One field of the dataclasses in a tuple: a list in the flat record."""

    name: str
    flat: str
    kind: type[Any]


@dataclasses.dataclass(frozen=True)
class _Part:
    """One field: a value, or with ``many`` a tuple of values, or of dataclasses with columns."""

    name: str
    kind: type[Any]
    many: bool
    columns: tuple[_Column, ...]


@dataclasses.dataclass(frozen=True)
class _Layout:
    """A dataclass's fields in the order of its constructor's arguments.

    ``of_bytes`` names what is bytes, or a list of bytes, in the flat record.
    """

    parts: tuple[_Part, ...]
    of_bytes: tuple[str, ...]


_known_layouts: Final[dict[type[Any], _Layout]] = {}


def _layout(kind: type[Any]) -> _Layout:
    if kind not in _known_layouts:
        _known_layouts[kind] = _new_layout(kind)
    return _known_layouts[kind]


def _new_layout(kind: type[Any]) -> _Layout:
    hints = typing.get_type_hints(kind)
    parts, of_bytes = [], []
    for entry in dataclasses.fields(kind):
        name, hint = entry.name, hints[entry.name]
        many = typing.get_origin(hint) is tuple
        inner: type[Any] = typing.get_args(hint)[0] if many else hint
        columns = tuple(
            _Column(part.name, f"{name}.{part.name}", part.kind)
            for part in (_layout(inner).parts if dataclasses.is_dataclass(inner) else ())
        )
        parts.append(_Part(name, inner, many, columns))
        of_bytes += [column.flat for column in columns if column.kind is bytes]
        of_bytes += [name] * (inner is bytes)
    return _Layout(tuple(parts), tuple(of_bytes))
