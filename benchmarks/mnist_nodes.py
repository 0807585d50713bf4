"""DP-SGD on ten nodes with handwritten digits: accuracy by epsilon, ours and Opacus'.

``python -m benchmarks.mnist_nodes [--seeds 5] [--save] [--fashion-mnist FOLDER]``. mnist_5k (500 of
each digit; ``dpfl data mnist-5k`` fetches it), or all of Fashion-MNIST from the folder that holds
its four files (Debian's dataset-fashion-mnist brings them); a fifth of the images for the test, the
others on ten nodes by Dirichlet(0.5) over the classes. Unit: the example; relation: add or remove
one; every node spends the whole epsilon on its own records. The same model, start, rates, steps,
clip norm, noise multiplier and averaging under both; Opacus trains on each node with its own
per-example gradients, sampling and noise. The last line compares the accuracy at epsilon 3.
"""

import argparse
import copy
import gzip
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks import compare, results
from dpfl_flower.client import DPSGDConfig
from dpfl_flower.client.noisy_gradient import NoisyGradient
from dpfl_flower.client.per_example import per_example_clipper
from dpfl_flower.datasets import fetch
from dpfl_flower.rng import secure

NODES, CONCENTRATION, TEST_SHARE = 10, 0.5, 5
EPSILONS = (1.0, 3.0, 8.0, math.inf)
ROUNDS, STEPS, RATE, DELTA, CLIP_NORM, LEARNING_RATE = 10, 10, 0.1, 1e-4, 1.0, 1.0
BAR = 0.98
LOSS = nn.CrossEntropyLoss(reduction="none")
Arrays = list[NDArray[np.float32]]
TrainNode = Callable[[nn.Module, TensorDataset, DPSGDConfig, Arrays], Arrays]


def digits() -> TensorDataset:
    """Return 5,000 images in [0, 1] and their digits."""
    with gzip.open(fetch("mnist-5k") / "mnist_5k.csv.gz", "rt") as file:
        table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.float32))
    return TensorDataset(table[:, :-1] / 255, table[:, -1].long())


def clothes(folder: Path) -> TensorDataset:
    """Return the 70,000 images of Fashion-MNIST in [0, 1] and their classes."""
    images, labels = [], []
    for part in ("train", "t10k"):
        images.append(_idx(folder / f"{part}-images-idx3-ubyte.gz", header=16).reshape(-1, 784))
        labels.append(_idx(folder / f"{part}-labels-idx1-ubyte.gz", header=8))
    return TensorDataset(
        torch.from_numpy(np.concatenate(images)).float() / 255,
        torch.from_numpy(np.concatenate(labels)).long(),
    )


def _idx(path: Path, *, header: int) -> NDArray[np.uint8]:
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), np.uint8, offset=header)


def split(data: TensorDataset, seed: int) -> tuple[list[TensorDataset], TensorDataset]:
    """Return what each node holds, and the test set."""
    rng = np.random.default_rng(seed)
    images, labels = data.tensors
    order = rng.permutation(len(labels))
    test, train = np.split(order, [len(order) // TEST_SHARE])
    held: list[list[int]] = [[] for _ in range(NODES)]
    for digit in range(10):
        own = train[labels.numpy()[train] == digit]
        shares = rng.dirichlet([CONCENTRATION] * NODES)
        cuts = (np.cumsum(shares)[:-1] * len(own)).astype(int)
        for node, part in zip(held, np.split(own, cuts), strict=True):
            node.extend(part.tolist())
    return (
        [TensorDataset(images[indices], labels[indices]) for indices in held],
        TensorDataset(images[test], labels[test]),
    )


def build(seed: int) -> nn.Module:
    """Return the model at its start: 50,890 parameters."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))


def configured(epsilon: float, examples: int) -> DPSGDConfig:
    """Return the public configuration of every node; ``examples`` are on all of them together."""
    return DPSGDConfig(
        sampling_rate=RATE,
        steps_per_round=STEPS,
        planned_rounds=ROUNDS,
        clip_norm=CLIP_NORM,
        expected_batch_size=RATE * examples / NODES,
        delta=DELTA,
        noise_multiplier=0.0 if math.isinf(epsilon) else None,
        target_epsilon=None if math.isinf(epsilon) else epsilon,
    )


def ours(model: nn.Module, data: TensorDataset, config: DPSGDConfig, arrays: Arrays) -> Arrays:
    """Train one round on a node as `DPSGDClient` does, without its ledger, which costs the most."""
    _load(model, arrays)
    release = NoisyGradient(config.resolve_noise_multiplier(), config.expected_batch_size, secure())
    images, labels = data.tensors
    with per_example_clipper(model, LOSS, clip_norm=CLIP_NORM) as clipper:
        optimizer = torch.optim.SGD(clipper.parameters, lr=LEARNING_RATE)
        for _ in range(STEPS):
            chosen = torch.from_numpy(secure().coins(RATE, len(labels)))
            total = clipper.clipped_sum([images[chosen], labels[chosen]])
            noisy = release(total, clip_norm=CLIP_NORM)
            for parameter, gradient in zip(clipper.parameters, noisy, strict=True):
                parameter.grad = gradient.to(parameter.dtype)
            optimizer.step()
    return [tensor.detach().numpy().copy() for tensor in model.state_dict().values()]


def _load(model: nn.Module, arrays: Arrays) -> None:
    with torch.no_grad():
        for tensor, array in zip(model.state_dict().values(), arrays, strict=True):
            tensor.copy_(torch.from_numpy(array))


def opacus(model: nn.Module, data: TensorDataset, config: DPSGDConfig, arrays: Arrays) -> Arrays:
    """Train one round on a node by Opacus' hooks, optimizer and noise."""
    _load(model, arrays)
    private = GradSampleModule(model, loss_reduction="sum")
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=LEARNING_RATE),
        noise_multiplier=config.resolve_noise_multiplier(),
        max_grad_norm=CLIP_NORM,
        expected_batch_size=int(config.expected_batch_size),
    )
    images, labels = data.tensors
    for _ in range(STEPS):
        chosen = torch.rand(len(labels)) < RATE
        optimizer.zero_grad()
        LOSS(private(images[chosen]), labels[chosen]).sum().backward()
        optimizer.step()
    private.to_standard_module()
    return [tensor.detach().numpy().copy() for tensor in model.state_dict().values()]


def accuracy(
    train: TrainNode,
    nodes: Sequence[TensorDataset],
    test: TensorDataset,
    *,
    epsilon: float,
    seed: int,
) -> float:
    """Return the share of test images that the averaged model names rightly, in the end."""
    start = build(seed)
    config = configured(epsilon, sum(map(len, nodes)))
    arrays: Arrays = [t.detach().numpy().copy() for t in start.state_dict().values()]
    for _ in range(ROUNDS):
        answers = [train(copy.deepcopy(start), data, config, arrays) for data in nodes]
        arrays = [np.mean(parts, axis=0) for parts in zip(*answers, strict=True)]
    _load(start, arrays)
    with torch.no_grad():
        images, labels = test.tensors
        right: Tensor = start(images).argmax(1) == labels
    return float(right.float().mean())


def main() -> None:
    """Print the table and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--fashion-mnist", type=Path, help="the folder of its four files")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results")
    arguments = parser.parse_args()
    compare.one_thread()
    folder: Path | None = arguments.fashion_mnist
    data = digits() if folder is None else clothes(folder)
    rivals: dict[str, TrainNode] = {"dpfl-flower": ours, "Opacus": opacus}
    figures: dict[str, dict[str, list[float]]] = {name: {} for name in rivals}
    seconds = dict.fromkeys(rivals, 0.0)
    runs = [(epsilon, seed) for epsilon in EPSILONS for seed in range(arguments.seeds)]
    for epsilon, seed in track(runs, "Training", console=Console(stderr=True), transient=True):
        nodes, test = split(data, seed)
        for name, train in rivals.items():
            began = time.process_time()
            reached = accuracy(train, nodes, test, epsilon=epsilon, seed=seed)
            seconds[name] += time.process_time() - began
            figures[name].setdefault(f"{epsilon:g}", []).append(reached)
    rows = [
        [name, *(f"{statistics.mean(v):.3f} ± {_spread(v):.3f}" for v in by_epsilon.values())]
        for name, by_epsilon in figures.items()
    ]
    for row, name in zip(rows, rivals, strict=True):
        row.append(f"{seconds[name]:.0f}")
    print(
        f"accuracy after {ROUNDS} rounds, {NODES} nodes, mean ± deviation, {arguments.seeds} seeds"
    )
    print(compare.machine())
    compare.print_table(["epsilon", *(f"{e:g}" for e in EPSILONS), "CPU-s"], rows)
    means = [statistics.mean(figures[name]["3"]) for name in rivals]
    if arguments.save:
        results.save(
            "mnist_nodes" if folder is None else "fashion_mnist_nodes",
            {"accuracy": figures, "cpu_seconds": seconds},
        )
    compare.print_ratio(means[0] / means[1], bar=BAR)


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
