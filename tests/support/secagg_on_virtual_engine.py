"""A secure run on Flower's virtual client engine: ``python -m tests.support.<this> OUT``.

A process of its own, because Ray leaves warnings behind that pytest would take for the tests'.
"""

import sys

import numpy as np
from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from dpfl_flower.client import secure_aggregation_mod
from dpfl_flower.secagg import SecAggPlus
from tests.support.secure_run import dropping, run, train

NODES = 6
ROUNDS = 5
# Two neighbours of five may drop out: t = 3, and 2 t > 5.
PROTOCOL = SecAggPlus(threshold=0.6)


def main(out: str) -> None:
    """Run on the engine and save the model."""
    app, server = ClientApp(), ServerApp()
    app.train(mods=[dropping, secure_aggregation_mod])(train)

    @server.main()
    def server_main(grid: Grid, context: Context) -> None:
        np.save(out, run(grid, nodes=NODES, rounds=ROUNDS, secure_aggregation=PROTOCOL))

    run_simulation(
        server,
        app,
        num_supernodes=NODES,
        backend_config={"init_args": {"num_cpus": 1}, "client_resources": {"num_cpus": 1.0}},
    )


if __name__ == "__main__":
    main(sys.argv[1])
