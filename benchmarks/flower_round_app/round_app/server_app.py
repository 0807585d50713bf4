"""What runs at the server: some rounds, and the time at which each ended."""

import json
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
    Strategy,
)

from dpfl_flower import EveryoneSampling, FixedClipping
from dpfl_strategies import DPFedAvg

app = ServerApp()


def strategy_of(rival: str, *, clients: int, nodes: int) -> Strategy:
    """Return the strategy with a noise multiplier and a clip norm of 1."""
    if rival == "flower":
        inner = FedAvg(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
        return DifferentialPrivacyServerSideFixedClipping(
            inner, noise_multiplier=1.0, clipping_norm=1.0, num_sampled_clients=clients
        )
    return DPFedAvg(
        sampling=EveryoneSampling(clients),
        clipping=FixedClipping(1.0),
        noise_multiplier=1.0,
        unit="user" if rival == "users" else "node",
        num_nodes=nodes if rival == "users" else None,
    )


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds and write down how long each took."""
    config = context.run_config
    strategy = strategy_of(
        str(config["rival"]), clients=int(config["clients"]), nodes=int(config["nodes"])
    )
    ended: list[float] = []
    strategy.start(
        grid,
        ArrayRecord({"weight": Array(np.zeros(int(config["parameters"]), np.float32))}),
        num_rounds=int(config["rounds"]),
        evaluate_fn=lambda server_round, arrays: ended.append(time.perf_counter()),
    )
    seconds = [after - before for before, after in pairwise(ended)]
    Path(str(config["run-dir"]), "seconds.json").write_text(json.dumps(seconds), encoding="utf-8")
