"""One node's district: whose counts it holds, as units to train on and hours held out."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

import numpy as np

from dpfl_flower.datasets import fetch

from .counts import HourlyCounts, read_counts
from .data import SensorFortnight, held_out_rows, of_node, units_of
from .features import Rows

SAMPLE: Final = "akl-pedestrians"
"""The packaged data set."""

FILE: Final = "hourly_counts.csv"

NodeConfig = Mapping[str, bool | float | int | str]


@dataclass(frozen=True)
class District:
    """A node's sensors.

    Attributes
    ----------
    counts
        What they counted.
    packaged
        Whether they are of the packaged data set, which is public.
    """

    counts: HourlyCounts
    packaged: bool

    @classmethod
    def of(cls, node_config: NodeConfig) -> "District":
        """Return the district of a node; files are read once in a process.

        ``data-path`` names a CSV file of the node's own. Without it the node holds those packaged
        sensors that belong to ``partition-id`` of ``num-partitions``.

        Raises
        ------
        ValueError
            If the node config or the file is not as it should be.
        OSError
            If the file cannot be opened.
        """
        path = node_config.get("data-path")
        if path is not None:
            if not isinstance(path, str) or not path:
                raise ValueError(f"node config data-path={path!r} must be a text")
            return cls(_read(Path(path)), packaged=False)
        partition = _number(node_config, "partition-id")
        num_partitions = _number(node_config, "num-partitions")
        counts = sample_counts()
        here = of_node(counts.sensors, partition=partition, num_partitions=num_partitions)
        columns = [counts.sensors.index(sensor) for sensor in here]
        return cls(
            HourlyCounts(counts.first_hour, here, np.ascontiguousarray(counts.counts[:, columns])),
            packaged=True,
        )

    @property
    def units(self) -> tuple[SensorFortnight, ...]:
        """The privacy units, those without rows included."""
        return units_of(self.counts)

    @property
    def held_out(self) -> dict[str, Rows]:
        """The hours to measure with, by sensor."""
        return {sensor: held_out_rows(self.counts, sensor) for sensor in self.counts.sensors}


@lru_cache(maxsize=1)
def sample_counts() -> HourlyCounts:
    """Return the packaged counts, fetched if they are not here."""
    return _read(fetch(SAMPLE) / FILE)


@lru_cache(maxsize=4)
def _read(path: Path) -> HourlyCounts:
    # Flower unpickles the app for every message; what was read stays in the process.
    return read_counts(path)


def _number(node_config: NodeConfig, key: str) -> int:
    value = node_config.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"node config {key}={value!r} must be a whole number; or give data-path")
    return value
