"""``dpfl run``: an app's folder, unchanged, in this process, in Flower's simulation or deployed.

>>> Ended(ExitCode.FAILED, "failed", "no node answered").succeeded
False
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Final

import typer

from dpfl_flower import checks
from dpfl_flower.cli.listener import Listener
from dpfl_flower.cli.output import ExitCode, Format, FormatOption, Output
from dpfl_flower.cli.progress import ProgressDisplay
from dpfl_flower.cli.run_config import parse_run_config
from dpfl_flower.cli.run_dir import RunDirectory, fresh_path
from dpfl_flower.final_model import MODEL, RUN_DIR
from dpfl_flower.simulation import (
    AppFolder,
    AppRun,
    FlowerRun,
    FlowerRunError,
    run_app,
    run_flower_app,
    run_on_connection,
)

__all__ = ["run"]

IN_PROCESS: Final = "in-process"
FLOWER: Final = "flower"


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    code: ExitCode
    outcome: str
    details: str = ""
    run_id: int | None = None

    @property
    def succeeded(self) -> bool:
        """Whether it did what it was to do."""
        return self.code is ExitCode.OK


@dataclass(frozen=True)
class _Order:
    """What is to be run, checked."""

    app: AppFolder
    engine: str
    num_supernodes: int | None
    workers: int | None
    overrides: dict[str, bool | int | float | str]
    timeout_seconds: float

    def described(self) -> dict[str, Any]:
        """Return what ``config.json`` says."""
        return {
            "app": str(self.app.path),
            "name": self.app.name,
            "engine": self.engine,
            "num-supernodes": self.num_supernodes,
            "workers": self.workers,
            "timeout-seconds": self.timeout_seconds,
            "started": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "run-config": self.app.configured(self.overrides),
        }


def run(
    app: Annotated[Path, typer.Argument(help="The app's folder: it holds a pyproject.toml.")],
    engine: Annotated[
        str,
        typer.Option(
            help="in-process; flower: Flower's simulation, started for this run; or the name of a "
            "connection in Flower's config.toml."
        ),
    ] = IN_PROCESS,
    run_config: Annotated[
        list[str] | None,
        typer.Option(help="Overrides of the app's configuration: \"rounds=3 name='a b'\"."),
    ] = None,
    num_supernodes: Annotated[
        int | None,
        typer.Option(help="Nodes to simulate; default: num-supernodes in the app's \\[tool.dpfl]."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Processes for the ClientApps; only in-process. Default: this one."),
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Where the run's files go; default: runs/NAME/NOW.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds that the run may take.")] = 86400.0,
    format: FormatOption = Format.TEXT,  # noqa: A002 - the option's name
) -> None:
    """Run a Flower app.

    Exit codes: 0 the run succeeded, 1 it failed, 2 an argument is wrong, 3 it took longer than
    --timeout, 130 it was interrupted. They are the same on every engine.
    """
    output = Output(format)
    try:
        order = _checked(app, engine, run_config or [], num_supernodes, workers, timeout)
    except ValueError as error:
        raise output.fail(ExitCode.BAD_ARGUMENTS, str(error)) from None
    try:
        directory = RunDirectory(run_dir or fresh_path(order.app.name))
    except OSError as error:
        why = f"--run-dir: {error.filename}: {error.strerror}"
        raise output.fail(ExitCode.BAD_ARGUMENTS, why) from None
    if RUN_DIR in order.app.config:
        order.overrides.setdefault(RUN_DIR, str(directory.path))
    before = directory.model()
    directory.write("config.json", order.described())
    with ProgressDisplay(f"{order.app.name} ({engine})") as display:
        listener = Listener(directory, display, printed=None if output.is_json else sys.stdout)
        ended = _run(order, directory, listener)
    model = directory.model()
    progress = listener.progress
    data = {
        "outcome": ended.outcome,
        "exit-code": int(ended.code),
        "details": ended.details,
        "app": order.app.name,
        "engine": engine,
        "run-id": None if ended.run_id is None else str(ended.run_id),
        "run-dir": str(directory.path),
        "model": None if model is None or model == before else MODEL,
        "seconds": round(listener.seconds, 3),
        "rounds": 0 if progress is None else progress.server_round,
        "epsilon": None if progress is None else progress.epsilon,
        "budget": None if progress is None else progress.budget,
        "metrics": {} if progress is None else dict(progress.metrics),
    }
    directory.write("outcome.json", data)
    if not ended.succeeded:
        why = f"the run {ended.outcome}: {ended.details}"
        raise output.fail(ended.code, f"{why}\nSee {directory.log_path}", data) from None
    if data["model"] is None:
        output.note(
            f"No {MODEL} in the run directory: strategies of dpfl_strategies and "
            "dpfl_flower.final_model.save_model write it, where they can reach the directory"
        )
    output.result(data, f"Completed in {listener.seconds:.1f} s. Run directory: {directory.path}")


def _checked(
    app: Path,
    engine: str,
    texts: list[str],
    num_supernodes: int | None,
    workers: int | None,
    timeout: float,
) -> _Order:
    """Return the order; ValueError where an argument is wrong, naming it."""
    checks.positive(**{"--timeout": timeout})
    if num_supernodes is not None:
        checks.positive_int(**{"--num-supernodes": num_supernodes})
    if workers is not None:
        checks.positive_int(**{"--workers": workers})
        if engine != IN_PROCESS:
            raise ValueError(f"--workers={workers} must not be given with --engine={engine}")
    if not engine.strip():
        raise ValueError(f"--engine={engine!r} must be {IN_PROCESS}, {FLOWER} or a connection")
    folder = AppFolder.read(app)
    overrides = parse_run_config(texts)
    folder.configured(overrides)
    if num_supernodes is None and engine in {IN_PROCESS, FLOWER}:
        num_supernodes = folder.num_supernodes
    return _Order(folder, engine, num_supernodes, workers, overrides, timeout)


def _run(order: _Order, directory: RunDirectory, listener: Listener) -> Ended:
    """Run it and say how it ended, whatever happens."""
    try:
        with _terminable():
            found = _on_engine(order, directory, listener)
    except TimeoutError as error:
        return Ended(ExitCode.TIMED_OUT, "timed out", str(error))
    except KeyboardInterrupt:
        return Ended(ExitCode.INTERRUPTED, "was interrupted", "what it had started was stopped")
    except FlowerRunError as error:
        return Ended(ExitCode.FAILED, "failed", str(error))
    if not found.completed:
        return Ended(ExitCode.FAILED, str(found.outcome), found.details, found.run_id)
    if listener.everybody_failed:
        why = "every node that was asked to train failed, in every round"
        return Ended(ExitCode.FAILED, "failed", why, found.run_id)
    return Ended(ExitCode.OK, str(found.outcome), run_id=found.run_id)


def _on_engine(order: _Order, directory: RunDirectory, listener: Listener) -> AppRun | FlowerRun:
    if order.engine == IN_PROCESS:
        with listener.listening(directory.log_path):
            return run_app(
                order.app.path,
                num_supernodes=order.num_supernodes,
                run_config=order.overrides,
                run_dir=directory.path,
                num_workers=order.workers,
                timeout_seconds=order.timeout_seconds,
            )
    if order.engine == FLOWER:
        return run_flower_app(
            order.app.path,
            num_supernodes=order.num_supernodes or order.app.num_supernodes,
            log_path=directory.log_path,
            run_config=order.overrides,
            run_dir=directory.path,
            on_line=listener.hear_raw,
            timeout_seconds=order.timeout_seconds,
        )
    return run_on_connection(
        order.app.path,
        order.engine,
        log_path=directory.log_path,
        run_config=order.overrides,
        num_supernodes=order.num_supernodes,
        on_line=listener.hear_raw,
        timeout_seconds=order.timeout_seconds,
    )


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end the run as Ctrl-C does, so that what was started is stopped."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
