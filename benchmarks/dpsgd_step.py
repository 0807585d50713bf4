"""CPU time of one step of DP-SGD against a plain step and Opacus' three ways, noise included.

``python -m benchmarks.dpsgd_step [--task cnn mlp transformer lora] [--save]``. From a batch in
memory to new parameters, one thread; the rivals take turns. Ours is all that `DPSGDClient` does in
a step but for drawing coins and reading records: the sample's sum, a fresh seed for dropout,
buffers put back, and noise that is drawn anew in each round of ten steps. Opacus draws its noise
with ``torch.randn``, we with AES. Memory is measured in a process of its own for each, in which the
allocator gives large blocks back at once. Last line: our time over Opacus ghost clipping's,
geometric mean over the tasks.
"""

import argparse
import math
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from opacus import PrivacyEngine
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import compare, results
from benchmarks.dpsgd_models import TASKS, Task
from dpfl_flower.client.noise_source import NoiseSource
from dpfl_flower.client.noisy_gradient import NoisyGradient
from dpfl_flower.client.per_example import Clip, GradientEngine, per_example_clipper
from dpfl_flower.client.sample_sum import SampleSum
from dpfl_flower.client.separable import buffer_places, restored_buffers
from dpfl_flower.client.torch_seed import seed_torch
from dpfl_flower.rng import secure

CLIP_NORM, NOISE_MULTIPLIER, LEARNING_RATE = 1.0, 1.0, 0.05
BAR, REPEATS = 0.80, 11
STEPS = 10  # in a round
PLAIN, OURS, GHOST = "plain SGD", "dpfl-flower", "Opacus ghost"
Step = Callable[[], object]


def plain(task: Task) -> Step:
    """Return a step of SGD."""
    model, (*inputs, targets) = task.build(), task.batch()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=LEARNING_RATE)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(*inputs), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def ours(
    task: Task,
    *,
    engine: GradientEngine = GradientEngine.AUTO,
    source: NoiseSource = NoiseSource.HOST,
) -> Step:
    """Return a step as `DPSGDClient` takes it, on records that are gathered already."""
    model, batch, rng = task.build().train(), task.batch(), secure()
    clipper = per_example_clipper(
        model, nn.CrossEntropyLoss(reduction="none"), clip_norm=CLIP_NORM, engine=engine
    ).__enter__()
    everyone = range(len(batch[-1]))

    def rounds() -> Iterator[None]:
        while True:
            release = NoisyGradient(
                NOISE_MULTIPLIER, float(len(everyone)), rng, steps=STEPS, source=source
            )
            buffers = buffer_places(model)
            optimizer = torch.optim.SGD(clipper.parameters, lr=LEARNING_RATE)
            for _ in range(STEPS):
                yield
                clipper.clip = Clip(CLIP_NORM)
                sample = SampleSum(clipper, lambda _: batch)
                seed_torch(int.from_bytes(rng.random_bytes(7), "little"), batch[-1].device)
                with restored_buffers(buffers):
                    sample.add(everyone)
                noisy = release(sample.total, clip_norm=CLIP_NORM)
                for parameter, gradient in zip(clipper.parameters, noisy, strict=True):
                    parameter.grad = gradient.to(parameter.dtype)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

    taken = rounds()
    next(taken)  # up to the first step: what torch's first optimizer imports is no step's
    return lambda: next(taken)


def opacus(task: Task, mode: str) -> Step:
    """Return a step as Opacus' ``PrivacyEngine`` takes it."""
    model, (*inputs, targets) = task.build().train(), task.batch()
    trained = [p for p in model.parameters() if p.requires_grad]
    criterion: Any = nn.CrossEntropyLoss()
    optimizer: Any = torch.optim.SGD(trained, lr=LEARNING_RATE)
    private: Any
    private, optimizer, *rest = PrivacyEngine(accountant="rdp").make_private(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(TensorDataset(*inputs, targets), batch_size=len(targets)),
        noise_multiplier=NOISE_MULTIPLIER,
        max_grad_norm=CLIP_NORM,
        poisson_sampling=False,
        grad_sample_mode=mode,
        criterion=criterion,
    )
    criterion = rest[0] if mode == "ghost" else criterion

    def step() -> None:
        optimizer.zero_grad()
        criterion(private(*inputs), targets).backward()
        optimizer.step()

    return step


RIVALS: dict[str, Callable[[Task], Step]] = {
    PLAIN: plain,
    OURS: ours,
    "Opacus hooks": lambda task: opacus(task, "hooks"),
    GHOST: lambda task: opacus(task, "ghost"),
    "Opacus functorch": lambda task: opacus(task, "functorch"),
}


def repeated(step: Step, times: int) -> Step:
    """Return ``times`` steps as one, so that a short step is timed over many."""

    def steps() -> None:
        for _ in range(times):
            step()

    return steps


def memory_of(name: str, rival: str) -> int | None:
    """Return the peak of one step, in bytes above what was held before, from another process."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "16384", "PYTHONWARNINGS": "ignore"}
    told = subprocess.run(
        [sys.executable, "-m", "benchmarks.dpsgd_step", "--memory-of", name, rival],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return None if "None" in told.stdout else int(told.stdout)


def measure_memory(name: str, rival: str) -> int | None:
    """Return the peak of three steps, with what one leaves for the next."""
    step = RIVALS[rival](TASKS[name])
    return compare.peak_memory(repeated(step, 3))


def compare_on(name: str, *, repeats: int) -> dict[str, dict[str, float]]:
    """Print the table of one task and return its figures."""
    task = TASKS[name]
    timings = compare.compare(
        {rival: repeated(build(task), task.steps) for rival, build in RIVALS.items()},
        repeats=repeats,
        clock=time.process_time,  # one thread: CPU time, which other loads disturb least
    )
    base = timings[0].median
    peaks = {rival: memory_of(name, rival) for rival in RIVALS}
    of_plain = peaks[PLAIN]
    rows, figures = [], {}
    for timing in timings:
        peak = peaks[timing.name]
        relative = float("nan") if not peak or not of_plain else peak / of_plain
        rows.append(
            [
                timing.name,
                f"{1e3 * timing.median / task.steps:.3f}",
                f"{timing.median / base:.2f}",
                "-" if peak is None else f"{peak / 2**20:.1f}",
                f"{relative:.2f}",
            ]
        )
        figures[timing.name] = {
            "milliseconds": 1e3 * timing.median / task.steps,
            "x_plain": timing.median / base,
            "memory_x_plain": relative,
        }
    parameters = sum(p.numel() for p in task.build().parameters() if p.requires_grad)
    print(f"{name}: {parameters:,} parameters, batch {len(task.batch()[-1])}, bar {task.bar} x")
    compare.print_table(
        ["", f"median of {repeats} (ms)", "x plain", "peak memory (MiB)", "x plain"], rows
    )
    print()
    return figures


def main() -> None:
    """Print a table per task and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--save", action="store_true", help="write benchmarks/results")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    compare.one_thread()
    torch.manual_seed(0)
    if arguments.memory_of:
        print(measure_memory(*arguments.memory_of))
        return
    print(compare.machine())
    figures = {name: compare_on(name, repeats=REPEATS) for name in arguments.task}
    ratios = [
        figure[OURS]["milliseconds"] / figure[GHOST]["milliseconds"] for figure in figures.values()
    ]
    ratio = math.exp(sum(map(math.log, ratios)) / len(ratios))
    if arguments.save:
        results.save("dpsgd_step", {"ratio": ratio, "bar": BAR, "tasks": figures})
    compare.print_ratio(ratio, bar=BAR)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
