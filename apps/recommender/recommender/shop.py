"""One node's shop: whose ratings it holds, and which of them are held out."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

from dpfl_flower.datasets import fetch

from .catalogue import FILE as CATALOGUE_FILE
from .catalogue import Catalogue, read_catalogue
from .data import FILE as RATINGS_FILE
from .data import Split, UserRatings, of_node, read_ratings

SAMPLE: Final = "ml-100k"
"""The packaged data set."""

NodeConfig = Mapping[str, bool | float | int | str]


@dataclass(frozen=True)
class Shop:
    """A node's customers.

    Attributes
    ----------
    catalogue
        The films there are, the same for every shop.
    users
        All customers with all their ratings, held-out ones included.
    packaged
        Whether they are of the packaged data set, which is public.
    """

    catalogue: Catalogue
    users: tuple[UserRatings, ...]
    packaged: bool

    @classmethod
    def of(cls, node_config: NodeConfig) -> "Shop":
        """Return the shop of a node; files are read once in a process.

        ``data-path`` names a folder of the node's own with the two files. Without it the node holds
        those packaged users who live on ``partition-id`` of ``num-partitions``.

        Raises
        ------
        ValueError
            If the node config or a file is not as it should be.
        OSError
            If a file cannot be opened.
        """
        path = node_config.get("data-path")
        if path is not None:
            if not isinstance(path, str) or not path:
                raise ValueError(f"node config data-path={path!r} must be a text")
            return cls(*_read(Path(path)), packaged=False)
        partition = _number(node_config, "partition-id")
        num_partitions = _number(node_config, "num-partitions")
        catalogue, users = _read(sample_folder())
        here = of_node(users, partition=partition, num_partitions=num_partitions)
        return cls(catalogue, here, packaged=True)

    def splits(self, *, seed: int) -> tuple[Split, ...]:
        """Part each customer's ratings into those to learn from and those held out."""
        return tuple(Split.of(user, self.catalogue, seed=seed) for user in self.users)


@lru_cache(maxsize=1)
def sample_folder() -> Path:
    """Return where the packaged data set lies, fetched if it is not here."""
    return fetch(SAMPLE)


def sample() -> Shop:
    """Return a shop of all packaged users."""
    return Shop(*_read(sample_folder()), packaged=True)


@lru_cache(maxsize=4)
def _read(folder: Path) -> tuple[Catalogue, tuple[UserRatings, ...]]:
    # Flower unpickles the app for every message; what was read stays in the process.
    catalogue = read_catalogue(folder / CATALOGUE_FILE)
    return catalogue, read_ratings(folder / RATINGS_FILE, catalogue)


def _number(node_config: NodeConfig, key: str) -> int:
    value = node_config.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"node config {key}={value!r} must be a whole number; or give data-path")
    return value
