"""Argument checks whose errors name the culprit, its value and the bound.

>>> positive(clip_norm=0.0)
Traceback (most recent call last):
    ...
ValueError: clip_norm=0.0 must be a finite number > 0
"""

import math
from numbers import Integral, Real
from typing import Any


def _number(value: Any) -> bool:
    real = isinstance(value, Real) and not isinstance(value, (bool, str))
    return real and math.isfinite(value)


def _whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, (bool, str))


def _fail(name: str, value: Any, bound: str) -> None:
    raise ValueError(f"{name}={value!r} must be {bound}")


def positive(**values: Any) -> None:
    """Raise ValueError unless every keyword is a finite number > 0."""
    for name, value in values.items():
        if not (_number(value) and value > 0):
            _fail(name, value, "a finite number > 0")


def non_negative(**values: Any) -> None:
    """Raise ValueError unless every keyword is a finite number >= 0."""
    for name, value in values.items():
        if not (_number(value) and value >= 0):
            _fail(name, value, "a finite number >= 0")


def positive_int(**values: Any) -> None:
    """Raise ValueError unless every keyword is an integer >= 1."""
    for name, value in values.items():
        if not (_whole(value) and value >= 1):
            _fail(name, value, "an integer >= 1")


def non_negative_int(**values: Any) -> None:
    """Raise ValueError unless every keyword is an integer >= 0."""
    for name, value in values.items():
        if not (_whole(value) and value >= 0):
            _fail(name, value, "an integer >= 0")


def probability(**values: Any) -> None:
    """Raise ValueError unless every keyword lies strictly between 0 and 1."""
    for name, value in values.items():
        if not (_number(value) and 0 < value < 1):
            _fail(name, value, "strictly between 0 and 1")


def fraction(**values: Any) -> None:
    """Raise ValueError unless every keyword lies in (0, 1]."""
    for name, value in values.items():
        if not (_number(value) and 0 < value <= 1):
            _fail(name, value, "in (0, 1]")


def at_most(bound: float, **values: Any) -> None:
    """Raise ValueError unless every keyword is a finite number <= ``bound``."""
    for name, value in values.items():
        if not (_number(value) and value <= bound):
            _fail(name, value, f"<= {bound!r}")
