"""The medical app over several splits: ``python -m benchmarks.medical``.

The bar: pooled AUC of at least 0.84, the mean of 5 seeds, at epsilon 1 and delta 1e-4 in each
hospital; 0.85 with ``--trust distributed``, where each adds a share of the noise. The app's own
client and server code run in this process instead of through ``flwr run``; each seed holds out
other patients and draws fresh noise.
"""

import argparse
import logging
import statistics
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track

from apps.medical.medical.client_app import app
from apps.medical.medical.report import Report
from apps.medical.medical.server_app import train
from apps.medical.medical.settings import Settings
from dpfl_flower.accounting.statement import rounded_up
from dpfl_flower.simulation import InProcessGrid

BARS = {"local": 0.84, "distributed": 0.85}
PYPROJECT = Path(__file__).parents[1] / "apps" / "medical" / "pyproject.toml"


def run(split_seed: int, run_dir: Path, *, trust: str) -> Report:
    """Train once, as the app is configured, and return its report."""
    config = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["tool"]["flwr"]["app"]["config"]
    config |= {"run-dir": str(run_dir), "split-seed": split_seed, "trust": trust}
    settings = Settings.parse(config)
    grid = InProcessGrid(app, num_supernodes=settings.num_hospitals, run_config=config)
    with grid:
        return train(grid, settings, run_id=grid.run.run_id)


def table(reports: Sequence[Report]) -> str:
    """Return the reports as a markdown table, a row for each and one for their mean."""
    hospitals = [hospital.dataset.split("/")[-1] for hospital in reports[0].hospitals]
    header = ["split seed", "pooled", *hospitals, "pooled, no privacy"]
    header += ["epsilon, worst", "epsilon, seen in all"]
    rows = [
        [
            str(report.split_seed),
            *(_auc([value]) for value in _aucs(report)),
            rounded_up(report.worst_epsilon),
            rounded_up(report.epsilon_everywhere),
        ]
        for report in reports
    ]
    means = [_auc(column) for column in zip(*map(_aucs, reports), strict=True)]
    rows.append(
        [
            "**mean**",
            *(f"**{mean}**" for mean in means),
            rounded_up(max(report.worst_epsilon for report in reports)),
            rounded_up(max(report.epsilon_everywhere for report in reports)),
        ]
    )
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Print the table and the mean."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.medical", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="split seeds 1 to this")
    parser.add_argument("--trust", choices=list(BARS), default="local", help="who adds the noise")
    arguments = parser.parse_args()
    seeds, bar = range(1, arguments.seeds + 1), BARS[arguments.trust]
    logging.getLogger("flwr").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        console = Console(stderr=True)
        reports = [
            run(seed, Path(folder) / str(seed), trust=arguments.trust)
            for seed in track(seeds, "Training", console=console, transient=True)
        ]
    first = reports[0]
    print(
        f"AUC on held-out patients (NOT PRIVATE); unit: one patient, {first.relation}, "
        f"delta {first.delta:g}, {first.rounds} rounds\n"
    )
    print(table(reports))
    mean = statistics.fmean(
        report.not_private_auc for report in reports if report.not_private_auc is not None
    )
    print(f"\npooled AUC {mean:.4f} bar {bar}")


def _aucs(report: Report) -> list[float | None]:
    return [
        report.not_private_auc,
        *(h.not_private_auc for h in report.hospitals),
        report.not_private_reference_auc,
    ]


def _auc(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.fmean(known):.3f}" if known else "n/a"


if __name__ == "__main__":
    main()
