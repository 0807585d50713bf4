"""Records of secure aggregation with something wrong in them, in every way that is to be had."""

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from dpfl_flower import records

INTEGERS = (-1, 0, 1, 2, 3, 4, 5, 2**31, 2**63, 2**64 - 1)
BLOBS = (b"", bytes(8), bytes(32), bytes(33), b"\xff" * 33, bytes(64), bytes(94))


def integer(chance):
    return chance.choice((*INTEGERS, chance.randint(-(2**63), 2**64 - 1)))


def blob(chance):
    return chance.choice((*BLOBS, chance.randbytes(chance.randint(0, 100))))


def value(chance):
    """Anything that a ConfigRecord can hold."""
    number = chance.choice((0.0, -1.5, float("nan"), float("inf")))
    some = range(chance.randint(0, 5))
    return chance.choice(
        (
            integer(chance),
            blob(chance),
            number,
            chance.random() < 0.5,
            chance.choice(("", "a", "3")),
            [integer(chance) for _ in some],
            [blob(chance) for _ in some],
            [number for _ in some],
        )
    )


def array(chance):
    """Anything that can stand in an ArrayRecord, readable or not."""
    if chance.random() < 0.6:
        shape = [chance.randint(0, 12) for _ in range(chance.randint(0, 3))]
        return Array(np.ones(shape, chance.choice(("u1", "i1", "i8", "f8", "U3", "?"))))
    start = chance.choice((b"", b"\x93NUMPY\x01\x00v\x00"))
    data = start + chance.randbytes(chance.randint(0, 80))
    stype = chance.choice(("numpy.ndarray", "pickle", ""))
    return Array(dtype="uint8", shape=(8,), stype=stype, data=data)


def change(chance):
    """A change to a message: which field, and what becomes of it."""
    how = chance.choice(
        (
            *("set",) * 5,
            *("flip",) * 4,
            *("shorten", "repeat", "reverse", "empty", "drop", "add", "array", "strip"),
        )
    )
    makers = {"set": value, "add": value, "array": array, "flip": lambda c: c.randint(0, 2000)}
    return chance.randint(0, 20), how, makers.get(how, lambda c: None)(chance)


def changed(content, change):
    """Return a copy of a message's records with the change made to it."""
    which, how, value = change
    content = RecordDict(dict(content))
    record = content[records.SECAGG] = ConfigRecord(dict(content.config_records[records.SECAGG]))
    name = sorted(record)[which % len(record)]
    if how == "strip":
        del content[sorted(content)[which % len(content)]]
    elif how == "array":
        content[records.MASKED] = ArrayRecord({records.SUM: value})
    elif how == "add":
        record["unknown"] = value
    elif how == "drop":
        del record[name]
    elif how == "set":
        record[name] = value
    else:
        record[name] = edited(record[name], how, value)
    return content


def edited(field, how, value):
    if isinstance(field, list) and field:
        if how == "flip":
            i = value % len(field)
            return [*field[:i], edited(field[i], how, value), *field[i + 1 :]]
        return {
            "shorten": field[1:],
            "repeat": [*field, field[0]],
            "reverse": field[::-1],
            "empty": [],
        }[how]
    if isinstance(field, bytes):
        if not field:
            return b"\0"
        i = value % len(field) if how == "flip" else 0
        return {"shorten": field[1:], "repeat": field * 2, "reverse": field[::-1]}.get(
            how, field[:i] + bytes([field[i] ^ (1 + i % 255)]) + field[i + 1 :]
        )
    if isinstance(field, int) and not isinstance(field, bool):
        return field ^ 1
    return 7.5
