"""The medical app on Flower's virtual client engine: ``python -m tests.support.<this> RUN_DIR``.

A process of its own, because Ray leaves warnings behind that pytest would take for the tests'.
"""

import dataclasses
import sys
import tomllib
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from apps.medical.medical.client_app import HospitalClient, client_fn
from apps.medical.medical.server_app import train
from apps.medical.medical.task import Settings
from dpfl_flower.client import numpy_client_app

APP = Path(__file__).parents[2] / "apps" / "medical"


def main(run_dir: str) -> None:
    config = tomllib.loads((APP / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    config |= {"num-server-rounds": 2, "run-dir": run_dir}

    def configured(context: Context) -> HospitalClient:
        # run_simulation hands over an empty run_config.
        return client_fn(dataclasses.replace(context, run_config=config))

    server = ServerApp()

    @server.main()
    def server_main(grid: Grid, context: Context) -> None:
        train(grid, Settings.parse(config), run_id=7)

    run_simulation(
        server,
        numpy_client_app(configured),
        num_supernodes=4,
        backend_config={"client_resources": {"num_cpus": 1.0}},
    )


if __name__ == "__main__":
    main(sys.argv[1])
