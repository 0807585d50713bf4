"""How far a run has come: read from the line that strategies log each round, shown as it comes.

The line is the same on every engine: ``[ROUND 3/30] epsilon 0.41 of 1, about 4 s left``. Further
parts of the form ``name number`` are the round's metrics; ``± number`` follows one that is noised.

>>> seen = RoundProgress.parse("[ROUND 3/30] epsilon 0.41 of 1, rmse 0.96, about 4 s left")
>>> seen.server_round, seen.num_rounds, seen.epsilon, seen.budget, seen.seconds_left
(3, 30, 0.41, 1.0, 4.0)
>>> dict(seen.metrics)
{'rmse': 0.96}
>>> noised = RoundProgress.parse("[ROUND 3/30] accuracy 0.954 ± 0.05")
>>> dict(noised.metrics), dict(noised.metric_noise)
({'accuracy': 0.954}, {'accuracy': 0.05})
>>> RoundProgress.parse("Run directory: runs/1") is None
True
"""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Final, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

__all__ = ["ProgressDisplay", "RoundProgress"]

_NUMBER: Final = r"-?(?:\d[\d.]*(?:e[+-]?\d+)?|inf|nan)"
_ROUND: Final = re.compile(r"^\s*\[ROUND (\d+)/(\d+)\](?P<rest>.*)$")
_EPSILON: Final = re.compile(rf"\bepsilon ({_NUMBER})(?: of ({_NUMBER}))?$")
_LEFT: Final = re.compile(rf"^about ({_NUMBER}) s left$")
_METRIC: Final = re.compile(rf"^([A-Za-z][\w /@().-]*?) ({_NUMBER})(?: ± ({_NUMBER}))?$")


@dataclass(frozen=True)
class RoundProgress:
    """A round that ended.

    Attributes
    ----------
    server_round, num_rounds
        Which, of how many.
    epsilon
        What has been spent, as last shown; of the worst node where nodes account for themselves.
    budget
        The most that may be.
    metrics
        By name.
    metric_noise
        The standard deviation of the noise on those that are noised, by name.
    seconds_left
        Until the last round ends, at the pace so far.
    """

    server_round: int
    num_rounds: int
    epsilon: float | None = None
    budget: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    metric_noise: Mapping[str, float] = field(default_factory=dict)
    seconds_left: float | None = None

    @classmethod
    def parse(cls, line: str) -> "RoundProgress | None":
        """Read a line of the log; None if it is about something else."""
        found = _ROUND.match(line)
        if found is None:
            return None
        progress = cls(int(found[1]), int(found[2]))
        for part in (text.strip() for text in found["rest"].split(",")):
            if epsilon := _EPSILON.search(part):
                budget = None if epsilon[2] is None else float(epsilon[2])
                progress = replace(progress, epsilon=float(epsilon[1]), budget=budget)
            elif left := _LEFT.match(part):
                progress = replace(progress, seconds_left=float(left[1]))
            elif metric := _METRIC.match(part):
                metrics = {**progress.metrics, metric[1]: float(metric[2])}
                noise = dict(progress.metric_noise)
                if metric[3] is not None:
                    noise[metric[1]] = float(metric[3])
                progress = replace(progress, metrics=metrics, metric_noise=noise)
        return progress

    def after(self, before: "RoundProgress | None") -> "RoundProgress":
        """Return this with what only ``before`` knows: epsilon is not logged in every round."""
        if before is None:
            return self
        return replace(
            self,
            epsilon=before.epsilon if self.epsilon is None else self.epsilon,
            budget=before.budget if self.budget is None else self.budget,
            metrics={**before.metrics, **self.metrics},
            metric_noise={**before.metric_noise, **self.metric_noise},
        )

    def __str__(self) -> str:
        parts = [f"round {self.server_round}/{self.num_rounds}"]
        if self.epsilon is not None:
            of = "" if self.budget is None else f" of {self.budget:g}"
            parts.append(f"epsilon {self.epsilon:g}{of}")
        for name, value in self.metrics.items():
            noise = self.metric_noise.get(name)
            parts.append(f"{name} {value:g}" + ("" if noise is None else f" ± {noise:g}"))
        if self.seconds_left is not None:
            parts.append(f"{self.seconds_left:.0f} s left")
        return ", ".join(parts)


class ProgressDisplay:
    """A live bar on the standard error, or a line per round where that is no terminal."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._console = Console(stderr=True, highlight=False)
        self._task: TaskID | None = None
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[shown]}", markup=False),
            console=self._console,
            disable=not self._console.is_terminal,
            # What the app prints is its result: never moved to the standard error.
            redirect_stdout=sys.stdout.isatty(),
        )

    def __enter__(self) -> Self:
        """Show that the run begins."""
        self._bar.start()
        self._task = self._bar.add_task(self._name, total=None, shown="starting")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave the last state standing."""
        self._bar.stop()

    def update(self, progress: RoundProgress) -> None:
        """Show a round that ended."""
        if self._bar.disable:
            self.note(str(progress))
        elif self._task is not None:
            self._bar.update(
                self._task,
                completed=progress.server_round,
                total=progress.num_rounds,
                shown=str(progress),
            )

    def note(self, line: str) -> None:
        """Show a line above the bar."""
        self._console.print(line, markup=False, soft_wrap=True)
