"""Draw the committed results: ``python -m benchmarks.draw`` writes ``docs/figures/*.png``.

``ratios.png``: each comparison's ratio against its bar. ``flower_round.png``: a round of no-op
training on three engines. ``scale.png``: round time and peak memory. A figure whose results are not
there yet is left out, and named.
"""

import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure

from benchmarks import results

FIGURES: Final = Path(__file__).parents[1] / "docs" / "figures"
RATIOS: Final = {
    "user_round_cnn": "user-level round, CNN\nagainst pfl",
    "user_round_mlp": "user-level round, MLP\nagainst pfl",
    "app_wall_clock": "medical app, dpfl run\nagainst flwr run",
}

Results = Mapping[str, Any]


def load(name: str) -> Results | None:
    """Return committed figures, None where there are none."""
    path = results.FOLDER / f"{name}.json"
    if not path.is_file():
        return None
    found: Results = json.loads(path.read_text(encoding="utf-8"))
    return found


def ratios() -> Figure | None:
    """Bars of our time over the peer's, each with the most that it may be."""
    found = {label: figures for name, label in RATIOS.items() if (figures := load(name))}
    if not found:
        return None
    figure = Figure(figsize=(7, 0.8 + 0.7 * len(found)), layout="constrained")
    axes = figure.subplots()
    for position, figures in enumerate(found.values()):
        ratio, bar = float(figures["ratio"]), float(figures["bar"])
        axes.barh(position, ratio, color="#3b6ea5")
        axes.plot([bar, bar], [position - 0.42, position + 0.42], color="#c0392b", linewidth=2)
        axes.text(ratio, position, f" {ratio:.3f}", va="center")
    axes.axvline(1.0, color="gray", linestyle=":")
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.1), xlabel="our time / the peer's; red: the most it may be")
    return figure


def flower_round() -> Figure | None:
    """Bars of a round's median time, the rounds as dots."""
    found = load("flower_round")
    if found is None:
        return None
    figure = Figure(figsize=(8, 2.6), layout="constrained")
    axes = figure.subplots()
    for position, seconds in enumerate(found["seconds"].values()):
        median = statistics.median(seconds)
        axes.barh(position, median, color="#3b6ea5")
        axes.plot(seconds, [position] * len(seconds), "|", color="black")
        axes.text(max(seconds), position, f"  {median:.2f} s", va="center")
    axes.set_yticks(range(len(found["seconds"])), list(found["seconds"]))
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set(xlabel="seconds a round: 100 clients, 1,000,000 parameters, no-op training")
    return figure


def scale() -> Figure | None:
    """Round time and peak memory against the number of users, a line for each model size."""
    found = load("scale")
    if found is None:
        return None
    cells, bar = found["cells"], found["bar_bytes"]
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for parameters in sorted({cell["parameters"] for cell in cells}):
        line = [cell for cell in cells if cell["parameters"] == parameters]
        users = [cell["users"] for cell in line]
        label = f"$10^{len(str(parameters)) - 1}$ parameters"
        left.plot(users, [cell["seconds"] for cell in line], "o-", label=label)
        right.plot(users, [cell["peak_bytes"] / 2**20 for cell in line], "o-", label=label)
    right.axhline(bar / 2**20, color="gray", linestyle=":", label=f"{bar / 2**30:g} GiB")
    for axes, what in ((left, "round, seconds"), (right, "peak memory beyond the data, MiB")):
        axes.set(xscale="log", yscale="log", xlabel="users in the round", ylabel=what)
        axes.legend()
        axes.grid(alpha=0.3)
    return figure


DRAWINGS: Final[Mapping[str, Callable[[], Figure | None]]] = {
    "ratios": ratios,
    "flower_round": flower_round,
    "scale": scale,
}


def draw(folder: Path = FIGURES) -> list[Path]:
    """Write every figure whose results are there; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, drawing in DRAWINGS.items():
        figure = drawing()
        if figure is None:
            print(f"{name}: no results in {results.FOLDER}")
            continue
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=120, metadata={"Software": None})
    return paths


if __name__ == "__main__":
    for path in draw():
        print(path)
