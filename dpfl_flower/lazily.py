"""What is imported when it is first used: torch, dp-accounting and scipy take longer than Flower.

A SuperNode starts a process for every message, and most messages train nothing and have no price.

>>> statistics = lazily("statistics")
>>> statistics.mean([1, 2, 3])
2
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

__all__ = ["attributes_from", "lazily"]


class _Lazy:
    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(import_module(self._name), attribute)


def lazily(name: str) -> Any:
    """Return what stands for the module ``name`` until, and after, it is imported."""
    return _Lazy(name)


def attributes_from(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a package's ``__getattr__`` (PEP 562), which imports the module of a name.

    Parameters
    ----------
    package : str
        Its ``__name__``.
    modules : mapping of str to str
        The module, within the package, of each name.
    """

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{modules[name]}"), name)

    return get
