"""What ``--run-config`` says: ``key=value`` pairs with TOML values, as for ``flwr run``.

>>> parse_run_config(["rounds=3 lr=0.5", "name='a b' fast=true"])
{'rounds': 3, 'lr': 0.5, 'name': 'a b', 'fast': True}
>>> parse_run_config(["rounds"])
Traceback (most recent call last):
    ...
ValueError: --run-config 'rounds' must be key=value pairs, such as "rounds=3 name='a b'"
"""

import re
import tomllib
from collections.abc import Sequence
from typing import Any, Final

__all__ = ["parse_run_config"]

_PAIR: Final = re.compile(r"""\s*([\w.-]+)=('[^']*'|"[^"]*"|[^\s'"]+)(?=\s|$)""")


def parse_run_config(texts: Sequence[str]) -> dict[str, bool | int | float | str]:
    """Return the pairs of all ``texts``; a later one wins.

    Raises
    ------
    ValueError
        For anything that is no pair, or whose value is no text, number, true or false; quotes it.
    """
    found: dict[str, bool | int | float | str] = {}
    for text in texts:
        rest = text.strip()
        while rest:
            pair = _PAIR.match(rest)
            if pair is None:
                raise ValueError(
                    f"--run-config {rest!r} must be key=value pairs, such as "
                    "\"rounds=3 name='a b'\""
                )
            found[pair[1]] = _value(pair[1], pair[2])
            rest = rest[pair.end() :].strip()
    return found


def _value(key: str, text: str) -> bool | int | float | str:
    try:
        value: Any = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = None
    if not isinstance(value, (bool, int, float, str)):
        raise ValueError(
            f"--run-config {key}={text} must be true, false, a number or a quoted text "
            f"({key}='{text}')"
        )
    return value
