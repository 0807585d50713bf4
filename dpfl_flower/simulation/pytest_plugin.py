"""Fixtures to test a federated app in milliseconds, without Ray.

In your ``conftest.py``::

    pytest_plugins = ["dpfl_flower.simulation.pytest_plugin"]

or import the fixtures there. Then::

    def test_one_round(in_process_grid):
        grid = in_process_grid(client_app, num_supernodes=4, run_config={"lr": 0.1})
        result = strategy.start(grid, initial_arrays, num_rounds=1)


    def test_the_app(in_process_app, tmp_path):
        assert in_process_app("apps/medical", run_config={"num-server-rounds": 2}).completed

>>> in_process_grid.__name__
'in_process_grid'
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dpfl_flower.simulation.in_process import InProcessGrid
from dpfl_flower.simulation.run_app import AppRun, run_app

__all__ = ["in_process_app", "in_process_grid"]


@pytest.fixture
def in_process_grid() -> Iterator[Callable[..., InProcessGrid]]:
    """Make grids, each with its run begun, that end with the test.

    Arguments are those of :class:`~dpfl_flower.simulation.in_process.InProcessGrid`. The grid made
    last is the one whose server sends messages.
    """
    with contextlib.ExitStack() as runs:

        def grid(*arguments: Any, **settings: Any) -> InProcessGrid:
            return runs.enter_context(InProcessGrid(*arguments, **settings))

        yield grid


@pytest.fixture
def in_process_app(tmp_path: Path) -> Callable[..., AppRun]:
    """Run an app's folder; arguments are those of :func:`~dpfl_flower.simulation.run_app.run_app`.

    What an app writes to its ``run-dir`` goes to ``tmp_path / "run"``.
    """
    return partial(run_app, run_dir=tmp_path / "run")
