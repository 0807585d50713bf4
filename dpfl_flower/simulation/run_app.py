"""Run a Flower app's folder in this process: ``run_app`` is to tests what ``flwr run`` is to users.

The folder is the one that ``flwr run`` takes, with no edit: its ServerApp and ClientApp are found
in its ``pyproject.toml``, whose configuration is merged with the overrides, and the ServerApp runs
on an :class:`~dpfl_flower.simulation.in_process.InProcessGrid`, or with its ClientApps in worker
processes.

>>> AppRun(RunOutcome.FAILED, run_id=7, details="RuntimeError: no", config={}).completed
False
"""

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Final

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from dpfl_flower import checks
from dpfl_flower.final_model import RUN_DIR
from dpfl_flower.simulation.app_folder import AppFolder
from dpfl_flower.simulation.flower_run import RunConfig, RunOutcome
from dpfl_flower.simulation.in_process import Fault, InProcessGrid, NodeConfig
from dpfl_flower.simulation.workers import WorkerGrid

__all__ = ["AppRun", "run_app"]

log = logging.getLogger("flwr.dpfl")

_SERVER: Final = 1
_running: Final = threading.Lock()


@dataclass(frozen=True)
class AppRun:
    """An app's run that ended.

    Attributes
    ----------
    outcome
        Completed or failed.
    run_id
        Its number, as the apps saw it; 0 where they could not be loaded.
    details
        Why it failed, empty when it completed.
    config
        The configuration it ran with.
    error
        What the ServerApp, or importing the app, raised.
    """

    outcome: RunOutcome
    run_id: int
    details: str
    config: RunConfig
    error: BaseException | None = field(default=None, compare=False)

    @property
    def completed(self) -> bool:
        """Whether the ServerApp ran to its end and not every message it sent failed."""
        return self.outcome is RunOutcome.COMPLETED


def run_app(
    app_dir: str | Path,
    *,
    num_supernodes: int | None = None,
    run_config: RunConfig | None = None,
    run_dir: str | Path | None = None,
    node_configs: Sequence[NodeConfig] | None = None,
    fault: Callable[[Message], Fault | None] | None = None,
    num_workers: int | None = None,
    timeout_seconds: float | None = None,
) -> AppRun:
    """Run the app in ``app_dir`` in this process and return how it ended.

    What the app raises is in the result, not raised here. One run at a time in a process.

    Parameters
    ----------
    app_dir
        The app's folder, the one that holds its ``pyproject.toml``.
    num_supernodes
        Nodes; by default the ``num-supernodes`` of the table ``[tool.dpfl]``, else 2.
    run_config
        Overrides of the app's configuration; only keys that it has.
    run_dir
        Value of the configuration key ``run-dir``, made absolute, for apps that have this key; for
        any app where the strategies leave the final model.
    node_configs, fault
        As for :class:`~dpfl_flower.simulation.in_process.InProcessGrid`.
    num_workers
        Processes that the ClientApps run in, as for
        :class:`~dpfl_flower.simulation.workers.WorkerGrid`; None: in this one.
    timeout_seconds
        For the run; from the main thread only, because a signal ends it.

    Raises
    ------
    ValueError
        If the folder is no Flower app, or an argument is out of bounds; names it.
    TimeoutError
        If the run took longer.
    RuntimeError
        If another run is under way in this process.
    """
    app = AppFolder.read(Path(app_dir))
    nodes = app.num_supernodes if num_supernodes is None else num_supernodes
    checks.positive_int(num_supernodes=nodes)
    if num_workers is not None:
        checks.positive_int(num_workers=num_workers)
    overrides = dict(run_config or {})
    place = None if run_dir is None else str(Path(run_dir).absolute())
    if place is not None and RUN_DIR in app.config:
        overrides.setdefault(RUN_DIR, place)
    config = app.configured(overrides)
    if place is not None:
        overrides.setdefault(RUN_DIR, place)  # where strategies leave the model of any app
    if not _running.acquire(blocking=False):
        raise RuntimeError("another app is running in this process: one at a time")
    try:
        with _limit(timeout_seconds):
            return _run(
                app,
                partial(
                    _grid,
                    app,
                    num_workers=num_workers,
                    num_supernodes=nodes,
                    run_config=config,
                    node_configs=node_configs,
                    fault=fault,
                ),
                config,
                overrides=overrides,
            )
    finally:
        _running.release()


def _grid(
    app: AppFolder, client: ClientApp, *, num_workers: int | None, **settings: Any
) -> InProcessGrid | WorkerGrid:
    if num_workers is None:
        return InProcessGrid(client, **settings)
    return WorkerGrid(app.client, num_workers=num_workers, **settings)


def _run(
    app: AppFolder,
    grid_of: Callable[[ClientApp], InProcessGrid | WorkerGrid],
    config: RunConfig,
    *,
    overrides: RunConfig,
) -> AppRun:
    run_id, grid = 0, None
    try:
        with app.loaded() as loaded, grid_of(loaded.client) as grid:
            run_id = grid.run.run_id
            grid.run.override_config = dict(overrides)
            context = Context(
                run_id=run_id,
                node_id=_SERVER,
                node_config={},
                state=RecordDict(),
                run_config=dict(config),
            )
            loaded.server(grid, context)
    except (Exception, SystemExit) as error:
        if not (isinstance(error, SystemExit) and error.code in {None, 0}):
            log.debug("The app failed", exc_info=True)
            return AppRun(
                RunOutcome.FAILED,
                run_id=run_id,
                details=f"{type(error).__name__}: {error}",
                config=config,
                error=error,
            )
    # Flower calls a run successful in which everybody failed.
    if grid is not None and grid.delivered and not grid.answered:
        details = f"all {grid.delivered} messages that reached a node were answered by an error"
        return AppRun(RunOutcome.FAILED, run_id=run_id, details=details, config=config)
    return AppRun(RunOutcome.COMPLETED, run_id=run_id, details="", config=config)


class _Expired(BaseException):
    """Time is up; not an Exception, which a ClientApp's or a strategy's own handler would catch."""


@contextlib.contextmanager
def _limit(seconds: float | None) -> Iterator[None]:
    """Raise TimeoutError when the block takes longer than ``seconds``."""
    if seconds is None:
        yield
        return
    checks.positive(timeout_seconds=seconds)
    if threading.current_thread() is not threading.main_thread():
        raise ValueError(f"timeout_seconds={seconds!r} must be None outside of the main thread")

    def expire(number: int, frame: FrameType | None) -> None:
        raise _Expired

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _Expired:
        raise TimeoutError(f"the run did not end within {seconds:g} seconds") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
