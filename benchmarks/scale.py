"""Round time and peak memory for 10^2 to 10^5 users and 10^4 to 10^7 parameters.

``python -m benchmarks.scale``. One node holds all users, 1 to 200 records each; all of them take
part in the round, which is timed whole: draw, train one epoch in batches of 10, clip, sum, noise,
step. Each cell runs in a process of its own with one thread; peak memory is what the round takes
beyond the data, the engine and the model's arrays included. Cells of more than 10^9 users times
parameters are left out, unless ``--cells`` names them. The bar: 100,000 users in under 2 GiB.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import compare

compare.one_thread()  # before numpy reads the environment

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

from benchmarks import results  # noqa: E402
from dpfl_flower.client.users import (  # noqa: E402
    CohortRequest,
    LazyUsers,
    LocalTraining,
    UserCohort,
)
from dpfl_flower.layout import ArrayLayout  # noqa: E402
from dpfl_flower.noise import RoundedGaussian  # noqa: E402
from dpfl_flower.quantize import IntegerGrid, Rounding, to_float  # noqa: E402
from dpfl_flower.rng import secure  # noqa: E402

USERS = (10**2, 10**3, 10**4, 10**5)
PARAMETERS = (10**4, 10**5, 10**6, 10**7)
LARGEST = 10**9
MOST_RECORDS = 200
FEATURES = 16
CLIP_NORM = 0.5
BAR_BYTES = 2 << 30


def model_of(parameters: int) -> nn.Module:
    """Return a perceptron with two hidden layers of equal width, of about that many parameters."""
    # width^2 + (FEATURES + 4) width + 2 = parameters
    linear = FEATURES + 4
    width = round((-linear + (linear**2 + 4 * (parameters - 2)) ** 0.5) / 2)
    return nn.Sequential(
        nn.Linear(FEATURES, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, 2),
    )


def people(users: int) -> LazyUsers:
    """Return users who are rows of one table, 1 to 200 each."""
    rng = np.random.default_rng(0)
    ends = np.cumsum(rng.integers(1, MOST_RECORDS + 1, users))
    inputs = torch.from_numpy(rng.standard_normal((int(ends[-1]), FEATURES), dtype=np.float32))
    targets = torch.from_numpy(rng.integers(0, 2, int(ends[-1])))

    def user_data(user: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = slice(int(ends[user - 1]) if user else 0, int(ends[user]))
        return inputs[rows], targets[rows]

    return LazyUsers(user_data, users)


def measure(users: int, parameters: int) -> dict[str, Any]:
    """Run one round and return what it took."""
    torch.manual_seed(0)
    data = people(users)
    spent: dict[str, Any] = {}

    def round_() -> None:
        model = {name: t.numpy() for name, t in model_of(parameters).state_dict().items()}
        layout = ArrayLayout.of(model)
        cohort = UserCohort(
            data,
            model_fn=lambda: model_of(parameters),
            training=LocalTraining(
                lr=0.1, batch_size=10, loss_fn=nn.CrossEntropyLoss(reduction="none")
            ),
            example=(torch.zeros(FEATURES), torch.tensor(0)),
            device="cpu",
            obeys_lists=True,
        )
        grid = IntegerGrid.for_noise_multiplier(1.0, layout.dimension, rounding=Rounding.DITHERED)
        noise = RoundedGaussian(grid.noise_units)
        shared = {"grid": grid, "clip_norm": CLIP_NORM, "server_round": 1, "dither_seed": b"public"}
        cohort.answer(CohortRequest(**shared, users=(0,)), model)  # builds and checks the engine
        began, cpu = time.perf_counter(), time.process_time()
        total = cohort.answer(CohortRequest(**shared, sampling_rate=1.0), model)
        total += noise.sample(total.size, secure())
        mean = to_float(total, grid.unit_size(CLIP_NORM), users)
        layout.restore(layout.flatten(model) + mean, template=model)
        spent["seconds"] = time.perf_counter() - began
        spent["cpu_seconds"] = time.process_time() - cpu
        assert cohort.chunk is not None
        spent["dimension"] = layout.dimension
        spent["users_at_a_time"] = cohort.chunk.users

    spent["peak_bytes"] = compare.peak_memory(round_)
    records = sum(len(data.user_data(user)[0]) for user in range(users))
    return {"users": users, "parameters": parameters, "records": records, **spent}


def in_its_own_process(users: int, parameters: int) -> dict[str, Any]:
    """Measure a cell in a fresh process, so that memory of another one is not reused."""
    command = [sys.executable, "-m", "benchmarks.scale", "--cell", str(users), str(parameters)]
    run = subprocess.run(
        command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True, check=True
    )
    cell: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return cell


def default_cells() -> Iterator[tuple[int, int]]:
    """Yield the cells that one person waits for."""
    for parameters in PARAMETERS:
        for users in USERS:
            if users * parameters <= LARGEST:
                yield users, parameters


def main() -> None:
    """Print the table and the bar, and write the figures down."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--cell", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--cells", nargs="+", metavar="USERSxPARAMETERS")
    arguments = parser.parse_args()
    if arguments.cell:
        print(json.dumps(measure(*arguments.cell)))
        return
    wanted = [tuple(map(int, cell.split("x"))) for cell in arguments.cells or ()]
    cells = []
    for users, parameters in wanted or default_cells():
        cells.append(in_its_own_process(users, parameters))
        print(f"{users} users, {parameters} parameters: {cells[-1]['seconds']:.2f} s", flush=True)
    print(f"\n{compare.machine()}")
    compare.print_table(
        ["users", "parameters", "records", "at a time", "round (s)", "peak beyond the data (MiB)"],
        [
            [
                f"{cell['users']:,}",
                f"{cell['dimension']:,}",
                f"{cell['records']:,}",
                str(cell["users_at_a_time"]),
                f"{cell['seconds']:.2f}",
                f"{cell['peak_bytes'] / 2**20:.0f}",
            ]
            for cell in cells
        ],
    )
    most = max(cell["peak_bytes"] for cell in cells if cell["users"] == max(USERS))
    if not wanted:
        results.save("scale", {"bar_bytes": BAR_BYTES, "cells": cells})
    print(f"peak GiB {most / 2**30:.3f} bar {BAR_BYTES / 2**30:g}")


if __name__ == "__main__":
    main()
