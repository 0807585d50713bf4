"""A Flower app's folder: what its ``pyproject.toml`` says, and its two apps, imported and let go.

>>> AppFolder.read(Path("/nowhere"))
Traceback (most recent call last):
    ...
ValueError: app='/nowhere' must be a folder that holds a pyproject.toml
"""

import contextlib
import importlib
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final, TypeVar

from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from dpfl_flower import checks
from dpfl_flower.simulation.flower_run import RunConfig

__all__ = ["AppFolder", "LoadedApp"]

App = TypeVar("App", ServerApp, ClientApp)

_DEFAULT_SUPERNODES: Final = 2
"""As many as Flower simulates where nobody says how many."""


@dataclass(frozen=True)
class LoadedApp:
    """The two apps of a folder."""

    server: ServerApp
    client: ClientApp


@dataclass(frozen=True)
class AppFolder:
    """What a Flower app says of itself.

    Attributes
    ----------
    path
        The folder, absolute.
    name
        The project's name.
    serverapp, clientapp
        ``module:attribute`` of each, from ``[tool.flwr.app.components]``.
    config
        ``[tool.flwr.app.config]``, nested keys joined by dots, as Flower does.
    num_supernodes
        How many nodes to simulate where nobody says: ``[tool.dpfl] num-supernodes``, else 2.
    """

    path: Path
    name: str
    serverapp: str
    clientapp: str
    config: RunConfig
    num_supernodes: int = _DEFAULT_SUPERNODES

    @classmethod
    def read(cls, path: Path) -> "AppFolder":
        """Read the folder's ``pyproject.toml``.

        Raises
        ------
        ValueError
            If there is none, it is no TOML, or a table or key is missing or wrong; says which.
        """
        file = path / "pyproject.toml"
        if not file.is_file():
            raise ValueError(f"app={str(path)!r} must be a folder that holds a pyproject.toml")
        try:
            project = tomllib.loads(file.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} must be TOML: {error}") from error
        components = _table(project, "tool.flwr.app.components", file)
        app = _table(project, "tool.flwr.app", file)
        number = project.get("tool", {}).get("dpfl", {}).get("num-supernodes", _DEFAULT_SUPERNODES)
        checks.positive_int(**{"[tool.dpfl] num-supernodes": number})
        return cls(
            path=path.resolve(),
            name=_text(_table(project, "project", file), "project", "name", file),
            serverapp=_reference(components, "serverapp", file),
            clientapp=_reference(components, "clientapp", file),
            config=_flattened(app.get("config", {})),
            num_supernodes=number,
        )

    def configured(self, overrides: RunConfig) -> dict[str, bool | int | float | str]:
        """Return the configuration with ``overrides``; ValueError for a key that the app lacks."""
        for key in overrides:
            if key not in self.config:
                raise ValueError(f"run_config key {key!r} must be one of {sorted(self.config)}")
        return {**self.config, **overrides}

    @contextlib.contextmanager
    def loaded(self) -> Iterator[LoadedApp]:
        """Import both apps for the length of the block, seen by nobody afterwards.

        Inside, the folder comes first on ``sys.path`` and its modules hide others of the same name,
        as in a Flower run. At the end ``sys.path`` and those others are back and the folder's own
        modules are forgotten, so that the next app may use the same names.
        """
        with self._importable():
            yield LoadedApp(
                server=_load(self.serverapp, ServerApp), client=_load(self.clientapp, ClientApp)
            )

    def client(self) -> ClientApp:
        """Import the ClientApp and keep it: for a process that runs no other app."""
        self._importable().__enter__()
        return _load(self.clientapp, ClientApp)

    @contextlib.contextmanager
    def _importable(self) -> Iterator[None]:
        names = self._top_level_names()

        def ours() -> dict[str, ModuleType]:
            return {
                name: module
                for name, module in list(sys.modules.items())
                if name.partition(".")[0] in names
            }

        before = ours()
        for name, module in before.items():
            if not self._holds(module):
                del sys.modules[name]
        entry = str(self.path)
        sys.path.insert(0, entry)
        importlib.invalidate_caches()
        try:
            yield
        finally:
            with contextlib.suppress(ValueError):  # the app itself may have taken it off
                sys.path.remove(entry)
            for name in ours():
                del sys.modules[name]
            sys.modules.update(before)

    def _top_level_names(self) -> frozenset[str]:
        """Return the names under which modules of this folder are imported."""
        found = {entry.stem for entry in self.path.glob("*.py")}
        found |= {entry.name for entry in self.path.iterdir() if entry.is_dir()}
        return frozenset(name for name in found if name.isidentifier()) - sys.stdlib_module_names

    def _holds(self, module: ModuleType) -> bool:
        places = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
        return any(
            Path(place).resolve().is_relative_to(self.path) for place in places if place is not None
        )


def _load(reference: str, kind: type[App]) -> App:
    module_name, _, attributes = reference.partition(":")
    found: Any = importlib.import_module(module_name)
    for attribute in attributes.split("."):
        found = getattr(found, attribute)
    if not isinstance(found, kind):
        raise TypeError(f"{reference} must be a {kind.__name__}, not a {type(found).__name__}")
    return found


def _table(project: Mapping[str, Any], dotted: str, file: Path) -> Mapping[str, Any]:
    found: Any = project
    for part in dotted.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    if not isinstance(found, dict):
        raise ValueError(f"{file} must have a table [{dotted}]")
    return found


def _text(table: Mapping[str, Any], section: str, key: str, file: Path) -> str:
    value = table.get(key)
    if not (isinstance(value, str) and value):
        raise ValueError(f"{file}: [{section}] {key}={value!r} must be a text")
    return value


def _reference(components: Mapping[str, Any], key: str, file: Path) -> str:
    section = "tool.flwr.app.components"
    value = _text(components, section, key, file)
    module, _, attribute = value.partition(":")
    if not (module and attribute):
        raise ValueError(f"{file}: [{section}] {key}={value!r} must be 'module:attribute'")
    return value


def _flattened(table: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Join nested keys by dots.

    >>> _flattened({"rounds": 3, "train": {"lr": 0.5}})
    {'rounds': 3, 'train.lr': 0.5}
    """
    flat: dict[str, bool | int | float | str] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= _flattened(value, f"{prefix}{key}.")
        elif isinstance(value, (bool, int, float, str)):
            flat[prefix + key] = value
        else:
            raise ValueError(
                f"run_config {prefix}{key}={value!r} must be a text, a number, true, false or a "
                "table of those"
            )
    return flat
