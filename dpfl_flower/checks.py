"""Argument checks whose errors name the culprit, its value and the bound.

>>> positive(clip_norm=0.0)
Traceback (most recent call last):
    ...
ValueError: clip_norm=0.0 must be a finite number > 0
"""

import math
from enum import StrEnum
from numbers import Integral, Real
from typing import Any, TypeVar

Choice = TypeVar("Choice", bound=StrEnum)


def _number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        return False


def _whole(value: Any) -> bool:
    if type(value) is int:  # nearly always, and ten times as fast as asking an abstract class
        return True
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


def at_least(bound: float, **values: Any) -> None:
    """Raise ValueError unless every keyword is a finite number >= ``bound``."""
    for name, value in values.items():
        if not (_number(value) and value >= bound):
            _fail(name, value, f"a finite number >= {bound!r}")


def name(**values: Any) -> None:
    """Raise ValueError unless every keyword is a text that is not empty."""
    for key, value in values.items():
        if not (isinstance(value, str) and value):
            _fail(key, value, "a text that is not empty")


def choice(kind: type[Choice], **values: Any) -> Choice:
    """Return the member of ``kind`` that the one keyword names; ValueError lists what it may be.

    >>> class Colour(StrEnum):
    ...     RED = "red"
    >>> choice(Colour, colour="blue")
    Traceback (most recent call last):
        ...
    ValueError: colour='blue' must be one of ['red']
    """
    ((name, value),) = values.items()
    try:
        return kind(value)
    except ValueError:
        allowed = [str(member) for member in kind]
        raise ValueError(f"{name}={value!r} must be one of {allowed}") from None


def instance(*kinds: type, **values: Any) -> None:
    """Raise ValueError unless every keyword is an instance of one of ``kinds``."""
    for name, value in values.items():
        if not isinstance(value, kinds):
            _fail(name, value, "a " + " or a ".join(kind.__name__ for kind in kinds))


def callables(**values: Any) -> None:
    """Raise ValueError unless every keyword can be called."""
    for name, value in values.items():
        if not callable(value):
            _fail(name, value, "a callable")
