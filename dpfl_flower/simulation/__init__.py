"""Ways to run a Flower app on one machine."""

from dpfl_flower.simulation.flower_run import (
    FlowerRun,
    FlowerRunError,
    RunConfig,
    RunOutcome,
    run_flower_app,
)

__all__ = ["FlowerRun", "FlowerRunError", "RunConfig", "RunOutcome", "run_flower_app"]
