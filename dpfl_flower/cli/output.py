"""What a command prints and how it ends: text for people or one JSON object, and an exit code.

Results go to the standard output, everything else to the standard error. With ``--format json`` the
standard output is exactly one JSON object, also for an error.

>>> Output(Format.JSON).result({"epsilon": math.inf})
{
  "epsilon": "infinite"
}
"""

import contextlib
import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType

__all__ = ["ExitCode", "Format", "FormatOption", "Output"]


class ExitCode(IntEnum):
    """What the exit codes of ``dpfl`` mean."""

    OK = 0
    """It succeeded; for a run: on whatever engine, the run did."""
    FAILED = 1
    """The run failed, or what was asked for cannot be had."""
    BAD_ARGUMENTS = 2
    """An argument is wrong; the message names it. Nothing was run."""
    TIMED_OUT = 3
    """The run took longer than allowed, and was stopped."""
    INTERRUPTED = 130
    """Ctrl-C, or SIGTERM; what was started was stopped."""


class Format(StrEnum):
    """How results are printed."""

    TEXT = "text"
    JSON = "json"


FormatOption = Annotated[
    Format, typer.Option("--format", help="Text for people, or one JSON object.")
]


@dataclass(frozen=True)
class Output:
    """Prints in the format that was asked for."""

    format: Format

    @contextlib.contextmanager
    def working(self, what: str) -> Iterator[None]:
        """Show, on a terminal, that ``what`` takes its time."""
        errors = Console(stderr=True)
        if not errors.is_terminal:
            yield
            return
        with errors.status(f"{what} ..."):
            yield

    @property
    def is_json(self) -> bool:
        """Whether the standard output must hold one JSON object and nothing else."""
        return self.format is Format.JSON

    def result(self, data: Mapping[str, Any], *text: RenderableType) -> None:
        """Print ``data`` as JSON, or ``text``, each on lines of its own."""
        if self.is_json:
            print(json.dumps(plain(data), indent=2, ensure_ascii=False, allow_nan=False))
            return
        console = Console(highlight=False, soft_wrap=True)
        for part in text:
            console.print(part, markup=False)

    def note(self, text: str) -> None:
        """Tell the user something that is no result."""
        print(text, file=sys.stderr, flush=True)

    def fail(self, code: ExitCode, why: str, data: Mapping[str, Any] | None = None) -> typer.Exit:
        """Print why and return the exception that ends the command with ``code``: raise it."""
        if self.is_json:
            self.result({**(data or {}), "error": why, "exit-code": int(code)})
        else:
            self.note(f"dpfl: {why}")
        return typer.Exit(int(code))


def plain(value: Any) -> Any:
    """Return ``value`` as JSON can hold it: numbers that are not finite become words.

    >>> plain({"a": (1, math.nan)})
    {'a': [1, 'not a number']}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite" if value > 0 else "-infinite"
    return value
