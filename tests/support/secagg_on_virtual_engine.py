"""A secure run on Flower's virtual client engine: ``python -m tests.support.<this> OUT``.

A process of its own, because Ray leaves warnings behind that pytest would take for the tests'.
"""

import sys

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from dpfl_flower.accounting import EveryoneSampling
from dpfl_flower.client import secure_aggregation_mod
from dpfl_flower.clipping import FixedClipping
from dpfl_flower.secagg import SecAggPlus
from dpfl_flower.simulation import InProcessGrid
from dpfl_strategies import DPFedAvg

NODES = 4
WIDTH = 300


def train(message: Message, context: Context) -> Message:
    """Move every weight by something of the node's own."""
    index = int(context.node_config["partition-id"])
    step = 0.1 * (index + 1) * np.random.default_rng(index).normal(size=WIDTH)
    weights = message.content["arrays"]["w"].numpy() + step
    arrays = ArrayRecord({"w": Array(weights.astype(np.float32))})
    metrics = MetricRecord({"num-examples": 1})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


def run(grid: Grid, *, secure: bool) -> np.ndarray:
    """Return the model after two rounds of seeded noise."""
    strategy = DPFedAvg(
        noise_multiplier=0.5,
        noise_seed=4,
        relation="zero-out",
        sampling=EveryoneSampling(NODES),
        clipping=FixedClipping(0.5),
        secure_aggregation=SecAggPlus() if secure else None,
    )
    start = ArrayRecord({"w": Array(np.zeros(WIDTH, np.float32))})
    return strategy.start(grid, start, num_rounds=2, timeout=120).arrays["w"].numpy()


def in_process() -> np.ndarray:
    """Return what the run without secure aggregation gives, in this process."""
    app = ClientApp()
    app.train()(train)
    with InProcessGrid(app, num_supernodes=NODES) as grid:
        return run(grid, secure=False)


def main(out: str) -> None:
    """Run on the engine and save the model."""
    app, server = ClientApp(), ServerApp()
    app.train(mods=[secure_aggregation_mod])(train)

    @server.main()
    def server_main(grid: Grid, context: Context) -> None:
        np.save(out, run(grid, secure=True))

    run_simulation(
        server,
        app,
        num_supernodes=NODES,
        backend_config={"client_resources": {"num_cpus": 1.0}},
    )


if __name__ == "__main__":
    main(sys.argv[1])
