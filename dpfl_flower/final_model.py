"""Where a run leaves its final model, the same on every engine: ``model.safetensors``.

A ServerApp is another process under ``flwr run``, and maybe on another host, so whoever starts a
run cannot take the model out of it. The strategies here write it down instead, in the directory
that the run was given: the override ``run-dir`` of the app's configuration, which Flower hands to
every ServerApp, or for apps without that key the variable ``DPFL_RUN_DIR``. An app whose final
model is another one (a mean over rounds, say) calls :func:`save_model` after the strategy.

>>> import numpy as np, tempfile
>>> from flwr.app import Array
>>> model = ArrayRecord({"weight": Array(np.ones(2, np.float32))})
>>> with tempfile.TemporaryDirectory() as folder:
...     path = save_model(model, Path(folder), notes={"rounds": "3"})
...     path.name, load_model(path)["weight"].tolist()
('model.safetensors', [1.0, 1.0])
"""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from flwr.app import ArrayRecord
from flwr.serverapp import Grid
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

__all__ = ["MODEL", "RUN_DIR", "RUN_DIR_VARIABLE", "load_model", "run_directory", "save_model"]

MODEL: Final = "model.safetensors"
"""The file's name."""

RUN_DIR: Final = "run-dir"
"""The configuration key of an app that writes files."""

RUN_DIR_VARIABLE: Final = "DPFL_RUN_DIR"
"""The environment variable that stands in for the key where an app lacks it."""


def run_directory(grid: Grid) -> Path | None:
    """Return the absolute directory that the run behind ``grid`` was given, None without one."""
    overrides: Mapping[str, Any] = {}
    # Not every grid knows its run: one made for a test may not, and Flower's raises before it does.
    with contextlib.suppress(NotImplementedError, AttributeError, TypeError):
        overrides = grid.run.override_config
    named = overrides.get(RUN_DIR) or os.environ.get(RUN_DIR_VARIABLE)
    if not isinstance(named, str) or not Path(named).is_absolute():
        return None
    return Path(named)


def save_model(
    arrays: ArrayRecord, folder: Path, *, notes: Mapping[str, str] | None = None
) -> Path:
    """Write ``folder/model.safetensors``, all of it or nothing, and return its path.

    Parameters
    ----------
    arrays
        Under the names of the model's ``state_dict``.
    folder
        Made where it is missing.
    notes
        Kept in the file's own metadata.
    """
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f".{MODEL}.{os.getpid()}"
    # A copy in C order: safetensors writes the memory as it lies.
    values = {name: np.array(array.numpy(), order="C") for name, array in arrays.items()}
    save_file(values, unfinished, metadata=dict(notes or {}))
    return unfinished.replace(folder / MODEL)


def load_model(path: Path) -> dict[str, NDArray[Any]]:
    """Return the arrays that :func:`save_model` wrote, by name."""
    return load_file(path)
