"""How far a node has gone, so that no stage of a round is ever answered twice.

A SuperNode keeps an app's state in memory and pushes it after the reply, so a crash or a replay in
between would find the state of before. With a file, what is about to be answered is written and
synced first. One file serves all runs, and several nodes if need be.

>>> memory = MemoryJournal(Progress(server_round=2, stage=5))
>>> memory.enter(3, Stage.ADVERTISE)
>>> memory.enter(3, Stage.MASK)
Traceback (most recent call last):
    ...
dpfl_flower.secagg.errors.Refused: out-of-order: MASK of round 3 must follow SHARE of that round
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

from dpfl_flower.accounting import LedgerError
from dpfl_flower.accounting.ledger_file import TORN_MARK, LedgerFile
from dpfl_flower.secagg.errors import Refusal, Refused
from dpfl_flower.secagg.messages import Stage

__all__ = ["FileJournal", "Journal", "MemoryJournal", "Progress"]

_WAIT_SECONDS: Final = 60.0
_LINE: Final = re.compile(rb"\[\d+, \d+, \d+, \d+\]")


@dataclass(frozen=True, order=True)
class Progress:
    """The last stage that a node has entered in a run; (0, 0) before the first."""

    server_round: int = 0
    stage: int = 0


class Journal(ABC):
    """The stages that a node has entered in one run."""

    @property
    @abstractmethod
    def progress(self) -> Progress:
        """The last one."""

    @abstractmethod
    def enter(self, server_round: int, stage: Stage) -> None:
        """Note that a stage is about to be answered.

        Raises
        ------
        Refused
            ALREADY_UNMASKED or REPLAYED where it was entered before, OUT_OF_ORDER where the one
            before it was not, JOURNAL where it cannot be noted.
        """


def _following(last: Progress, server_round: int, stage: Stage) -> Progress:
    asked = Progress(server_round, int(stage))
    if asked <= last:
        again = asked == last and stage is Stage.UNMASK
        reason = Refusal.ALREADY_UNMASKED if again else Refusal.REPLAYED
        raise Refused(reason, f"{stage.name} of round {server_round} comes after {last}")
    if stage is Stage.ADVERTISE:
        return asked
    allowed = {int(stage) - 1}
    if stage is Stage.UNMASK:  # without rosters nothing is acknowledged
        allowed.add(int(Stage.MASK))
    if last.server_round != server_round or last.stage not in allowed:
        before = Stage(min(allowed)).name
        raise Refused(
            Refusal.OUT_OF_ORDER,
            f"{stage.name} of round {server_round} must follow {before} of that round",
        )
    return asked


@final
class MemoryJournal(Journal):
    """Keeps the progress in memory; who owns it keeps it over messages."""

    def __init__(self, progress: Progress | None = None) -> None:
        self._progress = progress or Progress()

    @property
    def progress(self) -> Progress:
        """The last stage."""
        return self._progress

    def enter(self, server_round: int, stage: Stage) -> None:
        """Note a stage."""
        self._progress = _following(self._progress, server_round, stage)


@final
class FileJournal(Journal):
    """Keeps the progress in every run in a file, appended to and synced before each answer.

    Parameters
    ----------
    path : Path
    run_id, node_id : int
    remembered : Progress, optional
        What memory says: the later of the two counts.
    wait_seconds : float
        How long to wait for another process that has the file.
    """

    def __init__(
        self,
        path: Path,
        run_id: int,
        node_id: int,
        *,
        remembered: Progress | None = None,
        wait_seconds: float = _WAIT_SECONDS,
    ) -> None:
        self._path = path
        self._who = [run_id, node_id]
        self._progress = remembered or Progress()
        self._wait_seconds = wait_seconds

    @property
    def progress(self) -> Progress:
        """The last stage that this object knows of."""
        return self._progress

    def enter(self, server_round: int, stage: Stage) -> None:
        """Note a stage in the file, then return."""
        try:
            file = LedgerFile.lock(self._path, wait_seconds=self._wait_seconds)
            try:
                data = file.read()
                last = max((self._progress, *_of(data, self._who)))
                self._progress = _following(last, server_round, stage)
                line = json.dumps([*self._who, server_round, int(stage)]).encode() + b"\n"
                # A line that a crash cut short was never answered: it is closed and passed over.
                torn = data and not data.endswith(b"\n")
                file.append(TORN_MARK + line if torn else line)
            finally:
                file.close()
        except (LedgerError, OSError, ValueError) as error:
            raise Refused(Refusal.JOURNAL, f"the journal {self._path} failed: {error}") from error


def _of(data: bytes, who: list[int]) -> Iterable[Progress]:
    *lines, _ = data.split(b"\n")
    own = json.dumps(who)[:-1].encode() + b","
    for line in lines:
        # Of other runs and nodes, which are most, no more is read than that they are lines.
        if not line.startswith(own) and _LINE.fullmatch(line):
            continue
        if (line + b"\n").endswith(TORN_MARK):
            continue
        found = json.loads(line)
        if not (isinstance(found, list) and [type(item) for item in found] == [int] * 4):
            raise ValueError(f"{line!r} is no line of a journal")
        if found[:2] == who:
            yield Progress(found[2], found[3])
