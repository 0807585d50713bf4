"""Images per second of a ResNet-18 with GroupNorm at 32 x 32, batch 1024, on a CUDA device.

``python -m benchmarks.resnet [--device cuda] [--batch 1024] [--save]``: a plain step of SGD, a step
of DP-SGD with noise drawn on the host and on the device, and Opacus' ghost clipping, taking turns;
from a batch in the device's memory to new parameters. Without a CUDA device it only runs where
another is named: on a CPU a batch of eight shows that it works, and says nothing about a GPU.
"""

import argparse
import warnings
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor, nn

from benchmarks import compare, results
from benchmarks.dpsgd_models import Task
from benchmarks.dpsgd_step import GHOST, PLAIN, Step, opacus, ours, plain
from dpfl_flower.client import NoiseSource

OURS, ON_DEVICE = "dpfl-flower", "dpfl-flower, noise on the device"
GROUPS, CLASSES, SIDE = 32, 10, 32
WARMUPS, REPEATS, STEPS = 2, 9, 4
BAR: Final = 1.0


class Block(nn.Module):
    """Two convolutions, normalised by groups, and what they change added to their input."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.changed = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.GroupNorm(GROUPS, outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.GroupNorm(GROUPS, outputs),
        )
        same = inputs == outputs and stride == 1
        self.kept = (
            nn.Identity()
            if same
            else nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.GroupNorm(GROUPS, outputs)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of both, without its negative part."""
        return torch.relu(self.changed(x) + self.kept(x))


def resnet18() -> nn.Module:
    """He et al., arXiv 1512.03385, for small images: 11.2 million parameters."""
    blocks: list[nn.Module] = []
    inputs = 64
    for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        blocks += [Block(inputs, outputs, stride), Block(outputs, outputs, 1)]
        inputs = outputs
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1, bias=False),
        nn.GroupNorm(GROUPS, 64),
        nn.ReLU(),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(512, CLASSES),
    )


def task_on(device: torch.device, batch: int) -> Task:
    """Return the model and one batch, on the device."""

    def images() -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(batch, 3, SIDE, SIDE, generator=generator)
        return [x.to(device), torch.arange(batch).remainder(CLASSES).to(device)]

    return Task(build=lambda: resnet18().to(device), batch=images, bar=BAR)


def finished(step: Step, device: torch.device, steps: int) -> Callable[[], None]:
    """Return so many steps as one call, which ends when the device has ended them."""

    def call() -> None:
        for _ in range(steps):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return call


def main() -> None:
    """Print images per second, and our time over ghost clipping's."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resnet")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=STEPS, help="in one timed call")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --device cpu --batch 8 shows that it runs")
    rivals: dict[str, Callable[[Task], Step]] = {PLAIN: plain, OURS: ours}
    if device.type == "cuda":
        rivals[ON_DEVICE] = lambda task: ours(task, source=NoiseSource.DEVICE_PHILOX)
    rivals[GHOST] = lambda task: opacus(task, "ghost")
    task = task_on(device, arguments.batch)
    timings = compare.compare(
        {name: finished(build(task), device, arguments.steps) for name, build in rivals.items()},
        repeats=REPEATS,
        warmups=WARMUPS,
    )
    images = arguments.batch * arguments.steps
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    print(f"ResNet-18 with GroupNorm, {SIDE} x {SIDE}, batch {arguments.batch}, on {named}")
    print(compare.machine())
    plainly = timings[0].median
    rows = [[t.name, f"{images / t.median:.0f}", f"{t.median / plainly:.2f}"] for t in timings]
    compare.print_table(["", f"images/s, median of {REPEATS}", "x plain"], rows)
    medians = {t.name: t.median for t in timings}
    if arguments.save:
        speeds = {name: images / median for name, median in medians.items()}
        results.save("resnet", {"device": named, "images_per_second": speeds})
    compare.print_ratio(medians[OURS] / medians[GHOST], bar=BAR)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
