"""Ways to run a Flower app on one machine."""

from dpfl_flower.simulation.app_folder import AppFolder
from dpfl_flower.simulation.connection import run_on_connection
from dpfl_flower.simulation.flower_run import (
    FlowerRun,
    FlowerRunError,
    RunConfig,
    RunOutcome,
    run_flower_app,
)
from dpfl_flower.simulation.in_process import Fault, InProcessGrid, NodeConfig
from dpfl_flower.simulation.run_app import AppRun, run_app
from dpfl_flower.simulation.workers import WorkerGrid

__all__ = [
    "AppFolder",
    "AppRun",
    "Fault",
    "FlowerRun",
    "FlowerRunError",
    "InProcessGrid",
    "NodeConfig",
    "RunConfig",
    "RunOutcome",
    "WorkerGrid",
    "run_app",
    "run_flower_app",
    "run_on_connection",
]
