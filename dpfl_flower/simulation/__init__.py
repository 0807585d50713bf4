"""Ways to run a Flower app on one machine."""

from dpfl_flower.simulation.flower_run import (
    FlowerRun,
    FlowerRunError,
    RunConfig,
    RunOutcome,
    run_flower_app,
)
from dpfl_flower.simulation.in_process import Fault, InProcessGrid, NodeConfig

__all__ = [
    "Fault",
    "FlowerRun",
    "FlowerRunError",
    "InProcessGrid",
    "NodeConfig",
    "RunConfig",
    "RunOutcome",
    "run_flower_app",
]
