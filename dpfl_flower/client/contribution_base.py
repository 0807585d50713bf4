"""What all that nodes put into secure sums has in common: a bound, and a vector of an answer.

>>> SumBound(largest=1 << 14, parties=100).check(32)
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from flwr.app import ConfigRecord, RecordDict
from numpy.typing import NDArray

from dpfl_flower import records
from dpfl_flower.client.grid_fields import integer
from dpfl_flower.layout import ArrayLayout
from dpfl_flower.secagg import fewest_bits
from dpfl_flower.secagg.encoding import Integers
from dpfl_flower.secagg.split_lanes import SPLIT_LANES, SPLIT_PARTIES
from dpfl_flower.wire import array_record, read_array

__all__ = ["LARGEST", "PARTIES", "Contribution", "SumBound", "global_model"]

LARGEST: Final = "largest"
PARTIES: Final = "parties"


@dataclass(frozen=True, kw_only=True)
class SumBound:
    """What keeps the sum from wrapping around.

    Attributes
    ----------
    largest : int
        No entry of a node's vector is larger in absolute value.
    parties : int
        No more vectors are summed.
    """

    largest: int
    parties: int

    def check(self, bits: int, lanes: int = 1) -> None:
        """Raise ValueError unless ``parties`` such vectors fit ``bits`` in so many lanes."""
        needed = fewest_bits(self.largest, self.parties)
        if bits < needed:
            raise ValueError(f"bits={bits!r} must be >= {needed}, or the sum could wrap around")
        if lanes == SPLIT_LANES and self.parties > SPLIT_PARTIES:
            raise ValueError(
                f"parties={self.parties!r} must be <= {SPLIT_PARTIES} with lanes={lanes!r}"
            )

    def to_config(self) -> ConfigRecord:
        """Return the bound as it travels."""
        return ConfigRecord({LARGEST: self.largest, PARTIES: self.parties})

    @classmethod
    def from_config(cls, record: Mapping[str, object]) -> Self:
        """Read a bound; ValueError when a field is missing or of another type."""
        return cls(largest=integer(record, LARGEST), parties=integer(record, PARTIES))


def global_model(
    task: RecordDict, *, dimension: int
) -> tuple[dict[str, NDArray[Any]], ArrayLayout]:
    """Return the global arrays of a request by name, and their layout.

    Raises
    ------
    ValueError
        Unless so many of their numbers are released.
    KeyError
        If there are none.
    """
    arrays = {name: read_array(array) for name, array in array_record(task, records.ARRAYS).items()}
    layout = ArrayLayout.of(arrays)
    if layout.dimension != dimension:
        raise ValueError(f"dimension={dimension} must be {layout.dimension}, the model's")
    return arrays, layout


class Contribution(ABC):
    """What a node makes of its app's answer.

    ``task`` is what the app is asked: the request's records without those of the protocol.
    """

    @property
    @abstractmethod
    def task(self) -> RecordDict:
        """The records that the app is called with."""

    @property
    def counts_on(self) -> int:
        """In a sum of how many vectors at least this one may be; 0: as many as the node says."""
        return 0

    @abstractmethod
    def vector(self, answer: RecordDict) -> Integers:
        """Return the vector to be masked, shape ``(width,)``.

        Raises
        ------
        NodeError
            MALFORMED_REPLY where the answer does not fit what was asked.
        """

    def claim(self, answer: RecordDict) -> ConfigRecord | None:
        """Return the privacy claim that must go along in clear; None: nothing may.

        Raises
        ------
        NodeError
            MALFORMED_REPLY where one must, and the answer holds none that can be read.
        """
        del answer
        return None
