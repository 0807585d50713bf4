"""Hears what a run logs and prints, on whatever engine, and passes on what its user wants to know.

>>> LogLine.parse("(ClientAppActor pid=7) WARNING :   Budget spent")
LogLine(level='WARNING', text='Budget spent')
>>> LogLine.parse("a table")
LogLine(level='', text='a table')
"""

import contextlib
import io
import logging
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TextIO

from dpfl_flower.cli.progress import ProgressDisplay, RoundProgress
from dpfl_flower.cli.run_dir import RunDirectory

__all__ = ["Listener", "LogLine"]

_SERIOUS: Final = frozenset({"WARNING", "ERROR", "CRITICAL"})
_LEVELS: Final = "DEBUG|INFO|WARNING|ERROR|CRITICAL"
_LINE: Final = re.compile(rf"^(?:\([\w:. -]+ pid=\d+\) ?)?(?P<level>{_LEVELS}) ?: +(?P<text>.*)$")
_RAY: Final = re.compile(r"^\((?:[\w:. -]+ )?pid=\d+\)|^\d{4}-\d\d-\d\d [\d:,]+\s+(?:INFO|WARNING)")
_RUNTIME: Final = re.compile(
    r"^Using SuperLink: |^Successfully installed |^\d\d/\d\d/\d{4} [\d:]+:[A-Z]+:|FutureWarning: |"
    r"^  warnings\.warn\("
)
"""What the runtime prints beside the app, and what another library's log handler says again."""
_REFUSAL: Final = re.compile(r"\bNodeError: (?P<text>.+?)\]?$")
"""Why a node refused; in a simulation the nodes' own logs are here too."""
_NOT_PRIVATE: Final = "NOT PRIVATE: "
_CHATTER: Final = re.compile(r"^$|Since flwr 1\.32|Manually terminating|DEPRECATED FEATURE")
_FLOWER_COUNT: Final = re.compile(r"aggregate_train: Received (\d+) results and (\d+) failures")


@dataclass(frozen=True)
class LogLine:
    """A line of a run's log; ``level`` is empty for what was printed."""

    level: str
    text: str

    @classmethod
    def parse(cls, line: str) -> "LogLine":
        """Take Flower's, and Ray's, decoration off."""
        found = _LINE.match(line)
        return cls("", line) if found is None else cls(found["level"], found["text"])


class Listener:
    """Shows progress and warnings, and writes each round down.

    Parameters
    ----------
    directory
        Where rounds are written down.
    display
        Where they are shown.
    printed
        Where lines go that the app printed; None drops them (the log has them).
    """

    def __init__(
        self, directory: RunDirectory, display: ProgressDisplay, *, printed: TextIO | None
    ) -> None:
        self.progress: RoundProgress | None = None
        self._directory = directory
        self._display = display
        self._printed = printed
        self._started = time.monotonic()
        self._noted: set[str] = set()
        self._answers = self._failures = 0

    @property
    def seconds(self) -> float:
        """Time since the run began."""
        return time.monotonic() - self._started

    @property
    def everybody_failed(self) -> bool:
        """Whether Flower's own strategies counted failures and never an answer."""
        return self._failures > 0 and self._answers == 0

    def hear(self, line: LogLine) -> None:
        """Take in one line."""
        if counted := _FLOWER_COUNT.search(line.text):
            self._answers += int(counted[1])
            self._failures += int(counted[2])
        progress = RoundProgress.parse(line.text)
        if progress is not None:
            self._round(progress.after(self.progress))
        elif refusal := _REFUSAL.search(line.text):
            self._note(f"A node refuses: {refusal['text']}")
        elif line.level in _SERIOUS or line.text.startswith(_NOT_PRIVATE):
            self._note(line.text)
        elif not line.level and self._printed is not None and _printed_by_app(line.text):
            print(line.text, file=self._printed, flush=True)

    def hear_raw(self, line: str) -> None:
        """Take in a line of a log file."""
        self.hear(LogLine.parse(line))

    def _note(self, text: str) -> None:
        """Show something once."""
        if text not in self._noted and not _CHATTER.search(text):
            self._noted.add(text)
            self._display.note(text)

    def _round(self, progress: RoundProgress) -> None:
        # The simulation shows a line more than once where more than one process logs it.
        before = self.progress
        self.progress = progress
        if before is None or before.server_round != progress.server_round:
            self._directory.add_round(progress, seconds=self.seconds)
            self._display.update(progress)

    @contextlib.contextmanager
    def listening(self, log_path: Path) -> Iterator[None]:
        """Hear what this process logs as Flower and prints, and write it to ``log_path``."""
        with log_path.open("w", encoding="utf-8") as log:
            handler = _Handler(self, log)
            tee = _Tee(log, self._printed)
            with _only_handler(handler), contextlib.redirect_stdout(tee):
                yield


@contextlib.contextmanager
def _only_handler(handler: logging.Handler) -> Iterator[None]:
    """Let ``handler`` alone have what Flower and everybody else logs, each record once."""
    flower, root = logging.getLogger("flwr"), logging.getLogger()
    before = (flower.handlers, flower.propagate, root.handlers)
    flower.handlers, flower.propagate, root.handlers = [handler], False, [handler]
    try:
        yield
    finally:
        flower.handlers, flower.propagate, root.handlers = before


def _printed_by_app(line: str) -> bool:
    return not (_RAY.search(line) or _RUNTIME.search(line))


class _Handler(logging.Handler):
    """Writes all to the log, details of errors too, and lets the listener hear."""

    def __init__(self, listener: Listener, log: TextIO) -> None:
        super().__init__(level=logging.DEBUG)
        self.setFormatter(logging.Formatter("%(levelname)s : %(message)s"))
        self._listener = listener
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        """Take in one record."""
        try:
            print(self.format(record), file=self._log, flush=True)
            if record.levelno < logging.INFO:
                return
            text = record.getMessage()
            if record.exc_info and record.exc_info[0] is not None:
                text = f"{text} [{record.exc_info[0].__name__}: {record.exc_info[1]}]"
            elif record.exc_text:  # of another process
                text = f"{text} [{record.exc_text.splitlines()[-1]}]"
            self._listener.hear(LogLine(record.levelname, text))
        except Exception:
            self.handleError(record)


class _Tee(io.TextIOBase):
    """Writes to the log and, if given, to where the user sees it."""

    def __init__(self, log: TextIO, shown: TextIO | None) -> None:
        self._log = log
        self._shown = shown

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._shown is not None and self._shown.isatty()

    def write(self, text: str) -> int:
        self._log.write(text)
        if self._shown is not None:
            self._shown.write(text)
        return len(text)

    def flush(self) -> None:
        self._log.flush()
        if self._shown is not None:
            self._shown.flush()
