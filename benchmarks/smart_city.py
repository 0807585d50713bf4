"""The street forecaster over several seeds: ``python -m benchmarks.smart_city``.

The bars: MAE of at most 41 at epsilon 4 and 39.5 at epsilon 8, delta 1e-5, unit = sensor-fortnight,
the mean of 5 seeds. The app's own client and server code run in this process; each seed starts from
another model, and each run draws fresh coins and noise.
"""

import argparse
import logging
import statistics
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from apps.smart_city.smart_city.client_app import app
from apps.smart_city.smart_city.report import Report
from apps.smart_city.smart_city.server_app import train
from apps.smart_city.smart_city.task import Settings
from dpfl_flower.accounting.statement import rounded_up
from dpfl_flower.simulation import InProcessGrid

BARS = {4.0: 41.0, 8.0: 39.5}
PYPROJECT = Path(__file__).parents[1] / "apps" / "smart_city" / "pyproject.toml"


def run(epsilon: float, init_seed: int, run_dir: Path) -> Report:
    """Train once, as the app is configured but for the budget, and return its report."""
    config = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["tool"]["flwr"]["app"]["config"]
    config |= {"run-dir": str(run_dir), "init-seed": init_seed, "target-epsilon": epsilon}
    config |= {"figure-sensor": ""}
    settings = Settings.parse(config)
    grid = InProcessGrid(app, num_supernodes=settings.num_nodes, run_config=config)
    with grid:
        return train(grid, settings, run_id=grid.run.run_id)


def table(reports: Mapping[float, Sequence[Report]]) -> str:
    """Return the reports as a markdown table, a row for each seed and one for the means.

    ``reports`` holds one report for each seed, in the same order, by budget.
    """
    header = ["init seed", *(f"epsilon {epsilon:g}" for epsilon in reports)]
    header += ["last hour", "last week", "naive forecast", "this model, no privacy"]
    rows = []
    for same_seed in zip(*reports.values(), strict=True):
        reference = same_seed[0].not_private_reference
        references = (
            [None] * 4
            if reference is None
            else [reference.last_hour, reference.last_week, reference.naive, reference.pooled]
        )
        rows.append([*(report.not_private_mae for report in same_seed), *references])
    seeds = [str(report.init_seed) for report in next(iter(reports.values()))]
    lines = [header, ["---"] * len(header)]
    lines += [
        [seed, *(_people([value]) for value in row)] for seed, row in zip(seeds, rows, strict=True)
    ]
    lines.append(["**mean**", *(f"**{_people(column)}**" for column in zip(*rows, strict=True))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def mean(reports: Sequence[Report]) -> float:
    """Return the mean MAE of runs that all have one."""
    return statistics.fmean(r.not_private_mae for r in reports if r.not_private_mae is not None)


def main() -> None:
    """Print the table, what was spent, and the means beside their bars."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smart_city", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="init seeds 1 to this")
    seeds = range(1, parser.parse_args().seeds + 1)
    logging.getLogger("flwr").setLevel(logging.WARNING)
    reports = {}
    with tempfile.TemporaryDirectory() as folder:
        for epsilon in BARS:
            reports[epsilon] = [
                run(epsilon, seed, Path(folder) / f"{epsilon:g}-{seed}") for seed in seeds
            ]
    first = reports[8.0][0]
    print(
        f"MAE over held-out hours, in people an hour (NOT PRIVATE); unit: one sensor's fortnight, "
        f"{first.relation}, delta {first.delta:g}, {first.rounds} rounds\n"
    )
    print(f"{table(reports)}\n")
    for epsilon, bar in BARS.items():
        spent = rounded_up(max(report.epsilon for report in reports[epsilon]))
        print(f"epsilon {epsilon:g}, spent {spent}: MAE {mean(reports[epsilon]):.3f} bar {bar:g}")


def _people(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.fmean(known):.2f}" if known else "n/a"


if __name__ == "__main__":
    main()
