"""DP-SGD of many small models in one node: all at once against one after the other.

Run it alone on one thread: ``OMP_NUM_THREADS=1 python -m benchmarks.stacked_models``. A step of
either side draws coins, clips per example, adds noise and steps the optimizer; charging the ledgers
happens once a round, the same on both sides, and is left out of the time by timing rounds of two
lengths. The last line is ``ratio <stacked / loop> bar <bar>``.
"""

import argparse
import time
import warnings
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks import compare, results
from benchmarks.dpsgd_models import mlp
from dpfl_flower.client import DPSGDClient, DPSGDConfig, NodeLedger, StackedDPSGD

MODELS, RECORDS, BATCH, SHORT, LONG, REPEATS = 32, 320, 32.0, 5, 55, 7
BAR = 0.25
Round = Callable[[], object]


def _settings(steps: int) -> dict[str, object]:
    config = DPSGDConfig(
        sampling_rate=BATCH / RECORDS,
        steps_per_round=steps,
        planned_rounds=1000,
        clip_norm=1.0,
        expected_batch_size=BATCH,
        delta=1e-5,
        noise_multiplier=1.0,
    )
    return {
        "config": config,
        "loss_fn": nn.CrossEntropyLoss(reduction="none"),
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.05),
        "example": (torch.zeros(30), torch.tensor(0)),
        "device": "cpu",
    }


def _datasets() -> list[TensorDataset]:
    return [
        TensorDataset(torch.randn(RECORDS, 30), torch.randint(2, (RECORDS,))) for _ in range(MODELS)
    ]


def loop(steps: int) -> Round:
    """Return a round of one `DPSGDClient` after the other."""
    clients = [
        DPSGDClient(mlp(), data, ledger=NodeLedger(f"loop-{i}"), **_settings(steps))
        for i, data in enumerate(_datasets())
    ]
    return lambda: [client.fit(client.get_parameters({}), {}) for client in clients]


def stacked(steps: int) -> Round:
    """Return a round of all models at once."""
    stack = StackedDPSGD(
        [mlp() for _ in range(MODELS)],
        _datasets(),
        ledgers=[NodeLedger(f"stacked-{index}") for index in range(MODELS)],
        **_settings(steps),
    )
    if not stack.stacked:
        raise RuntimeError("the models are not stacked")
    return stack.train


def main() -> None:
    """Print the table and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results")
    arguments = parser.parse_args()
    compare.one_thread()
    torch.manual_seed(0)
    builders = {"one after the other": loop, "stacked": stacked}
    timings = compare.compare(
        {f"{name}, {n}": build(n) for name, build in builders.items() for n in (SHORT, LONG)},
        repeats=REPEATS,
        clock=time.process_time,  # one thread: CPU time, which other loads disturb least
    )
    medians = {timing.name: timing.median for timing in timings}
    steps = {
        name: 1e3 * (medians[f"{name}, {LONG}"] - medians[f"{name}, {SHORT}"]) / (LONG - SHORT)
        for name in builders
    }
    print(f"{MODELS} models of {sum(p.numel() for p in mlp().parameters()):,} parameters")
    print(compare.machine())
    compare.print_table(
        ["", "a step of all models (ms)"], [[name, f"{ms:.2f}"] for name, ms in steps.items()]
    )
    ratio = steps["stacked"] / steps["one after the other"]
    if arguments.save:
        results.save("stacked_models", {"ratio": ratio, "bar": BAR, "milliseconds": steps})
    compare.print_ratio(ratio, bar=BAR)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
