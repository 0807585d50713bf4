"""Modules that are imported when something of theirs is first used.

dp-accounting imports all of ``scipy.stats``, which takes longer than Flower itself. A SuperNode
starts a process for every message, and most messages have no price.

>>> statistics = lazily("statistics")
>>> statistics.mean([1, 2, 3])
2
"""

from importlib import import_module
from typing import Any

__all__ = ["lazily"]


class _Lazy:
    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(import_module(self._name), attribute)


def lazily(name: str) -> Any:
    """Return what stands for the module ``name`` until, and after, it is imported."""
    return _Lazy(name)
