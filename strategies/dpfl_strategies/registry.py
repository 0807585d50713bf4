"""The fixed population of nodes that cohorts are drawn from."""

import logging
import time
from collections.abc import Callable

from flwr.serverapp import Grid

from dpfl_flower import checks
from dpfl_flower.simulation.local_grid import LocalGrid

log = logging.getLogger("flwr.dpfl")


class PopulationNotReached(TimeoutError):
    """Too few nodes connected before the time was up."""


class Registry:
    """Waits for the population once, then keeps it fixed for the whole run.

    Flower's own sampling computes a cohort from whichever nodes happen to be registered, so the
    first rounds see a smaller population than the accountant was told. Here nobody is drawn before
    ``population`` nodes are there; all that are there then take part in the draws of the whole run,
    and a node that joins later does not.

    Parameters
    ----------
    population:
        The least number of nodes.
    wait_seconds:
        How long to wait for them.
    sleep:
        Called with the seconds between two looks; a test may replace it.
    """

    def __init__(
        self,
        population: int,
        *,
        wait_seconds: float = 600.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        checks.positive_int(population=population)
        checks.non_negative(wait_seconds=wait_seconds)
        self._population = population
        self._wait_seconds = wait_seconds
        self._sleep = sleep
        self._node_ids: tuple[int, ...] = ()

    def node_ids(self, grid: Grid) -> tuple[int, ...]:
        """Return the ids of the registered nodes, waiting for them the first time.

        Raises
        ------
        PopulationNotReached
            If fewer than ``population`` nodes connected within ``wait_seconds``.
        """
        if not self._node_ids:
            self._node_ids = self._wait(grid)
        return self._node_ids

    def _wait(self, grid: Grid) -> tuple[int, ...]:
        deadline = time.monotonic() + self._wait_seconds
        announced = -1
        while True:
            connected = sorted(grid.get_node_ids())
            if len(connected) >= self._population:
                # Never cut: leaving one node out for another would turn the removal of a node
                # into a replacement, which moves the sum twice as far. A sampling whose price
                # depends on the population refuses a larger registry itself.
                return tuple(connected)
            if isinstance(grid, LocalGrid):
                raise PopulationNotReached(
                    f"{len(connected)} nodes are there and none can join a run in this process: "
                    f"population={self._population} must be. num_supernodes= says how many there "
                    "are; for `dpfl run`, --num-supernodes or [tool.dpfl] in pyproject.toml"
                )
            if time.monotonic() >= deadline:
                raise PopulationNotReached(
                    f"{len(connected)} nodes connected within wait_seconds={self._wait_seconds:g}, "
                    f"population={self._population} must be there before anyone is drawn"
                )
            if len(connected) != announced:
                announced = len(connected)
                log.info("Waiting for nodes: %d of %d connected", announced, self._population)
            self._sleep(min(1.0, max(0.01, deadline - time.monotonic())))
