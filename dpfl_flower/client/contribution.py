"""What a node puts into a secure sum: one integer vector, made of what its app answers.

The server says in a record which kind it wants; the node makes it, holds it to the bound itself,
and nothing of the answer but that vector, masked, leaves it. A sum that carries a share
of the noise already is another kind.

>>> grid = IntegerGrid.for_noise_multiplier(1.0, 2)
>>> request = UpdateRequest(grid=grid, clip_norm=1.0, largest=1 << 14, parties=100)
>>> UpdateRequest.from_config(request.to_config()) == request
True
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Self, cast, final

import numpy as np
from flwr.app import ConfigRecord, RecordDict
from numpy.typing import NDArray

from dpfl_flower import checks, records
from dpfl_flower.client.distributed_request import DistributedRequest
from dpfl_flower.client.errors import NodeError, NodeErrorCode
from dpfl_flower.client.grid_fields import (
    GRID_FIELDS,
    grid_from_fields,
    grid_to_fields,
    integer,
    number,
)
from dpfl_flower.client.policy import NodePolicy
from dpfl_flower.layout import ArrayLayout
from dpfl_flower.quantize import BoundedSum, IntegerGrid
from dpfl_flower.secagg import fewest_bits
from dpfl_flower.secagg.encoding import Integers
from dpfl_flower.secagg.split_lanes import SPLIT_LANES, SPLIT_PARTIES
from dpfl_flower.wire import (
    answered_arrays,
    answered_metrics,
    array_record,
    config_record,
    num_examples,
    read_array,
)

__all__ = [
    "BoundedUpdate",
    "Contribution",
    "IntegerSum",
    "NoisedSum",
    "SumBound",
    "UpdateRequest",
    "contribution_for",
]

_CLIP_NORM: Final = "clip-norm"
_DITHER_SEED: Final = "dither-seed"
_W_MAX: Final = "w-max"
_LARGEST: Final = "largest"
_PARTIES: Final = "parties"


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
        return ConfigRecord({_LARGEST: self.largest, _PARTIES: self.parties})

    @classmethod
    def from_config(cls, record: Mapping[str, object]) -> Self:
        """Read a bound; ValueError when a field is missing or of another type."""
        return cls(largest=integer(record, _LARGEST), parties=integer(record, _PARTIES))


@dataclass(frozen=True, kw_only=True)
class UpdateRequest(SumBound):
    """One round's public constants for a node that is one unit.

    Attributes
    ----------
    grid : IntegerGrid
    clip_norm : float
    dither_seed : bytes or None
    w_max : float
        The node weighs ``min(num_examples / w_max, 1)``; 0: every node weighs 1.
    """

    grid: IntegerGrid
    clip_norm: float
    dither_seed: bytes | None = None
    w_max: float = 0.0

    def __post_init__(self) -> None:
        checks.non_negative(w_max=self.w_max)
        entry = max(self.grid.sensitivity_units, self.grid.indicator_units)
        if self.largest < entry:
            raise ValueError(f"largest={self.largest!r} must be >= {entry}, the grid's own bound")
        BoundedSum(
            IntegerGrid(1, 1, 1.0, 1, rounding=self.grid.rounding),
            clip_norm=self.clip_norm,
            dither_seed=self.dither_seed,
        )  # checks clip norm and seed, at no cost

    def to_config(self) -> ConfigRecord:
        """Return the request as it travels: numbers, text and bytes."""
        record = ConfigRecord(
            {
                **grid_to_fields(self.grid),
                _CLIP_NORM: float(self.clip_norm),
                _W_MAX: float(self.w_max),
                _LARGEST: self.largest,
                _PARTIES: self.parties,
            }
        )
        if self.dither_seed is not None:
            record[_DITHER_SEED] = self.dither_seed
        return record

    @classmethod
    def from_config(cls, record: Mapping[str, object]) -> Self:
        """Read a request and check all of it; ValueError for what does not fit."""
        known = GRID_FIELDS | {_CLIP_NORM, _DITHER_SEED, _W_MAX, _LARGEST, _PARTIES}
        if unknown := record.keys() - known:
            raise ValueError(f"unknown fields {sorted(unknown)}")
        return cls(
            grid=grid_from_fields(record),
            clip_norm=number(record, _CLIP_NORM),
            dither_seed=cast("bytes | None", record.get(_DITHER_SEED)),
            w_max=number(record, _W_MAX),
            largest=integer(record, _LARGEST),
            parties=integer(record, _PARTIES),
        )


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


@final
class BoundedUpdate(Contribution):
    """The node is one unit: weights minus global weights, weighed, clipped, rounded.

    Parameters
    ----------
    request : UpdateRequest
    task : RecordDict
        With the global arrays.
    """

    def __init__(self, request: UpdateRequest, task: RecordDict) -> None:
        self._request = request
        self._task = task
        arrays = array_record(task, records.ARRAYS)
        self._reference = {name: read_array(array) for name, array in arrays.items()}
        self._layout = ArrayLayout.of(self._reference)
        if self._layout.dimension != request.grid.dimension:
            raise ValueError(
                f"dimension={request.grid.dimension} must be {self._layout.dimension}, the model's"
            )

    @property
    def task(self) -> RecordDict:
        """The model and the app's config."""
        return self._task

    def vector(self, answer: RecordDict) -> NDArray[np.int32]:
        """Return the bounded update, and last the clip indicator where one is asked for."""
        request, layout = self._request, self._layout
        try:
            arrays = answered_arrays(answer)
            layout.check(arrays)
            examples = num_examples(answered_metrics(answer))
        except (KeyError, TypeError, ValueError) as error:
            raise NodeError(NodeErrorCode.MALFORMED_REPLY, str(error)) from error
        bounded = BoundedSum(
            request.grid, clip_norm=request.clip_norm, dither_seed=request.dither_seed
        )
        return bounded.contribution(
            layout.released(arrays),
            layout.released(self._reference),
            weight=_weight(examples, request.w_max),
        )


@final
class IntegerSum(Contribution):
    """The node holds many units and its app answers their bounded integer sum already.

    Parameters
    ----------
    bound : SumBound
    task : RecordDict
        With the `CohortRequest`, which the app reads itself.
    """

    def __init__(self, bound: SumBound, task: RecordDict) -> None:
        self._bound = bound
        self._task = task

    @property
    def task(self) -> RecordDict:
        """The model, the cohort's request and the app's config."""
        return self._task

    def vector(self, answer: RecordDict) -> NDArray[np.int64]:
        """Return the node's sum."""
        try:
            total = read_array(array_record(answer, records.INTEGER_SUM)[records.SUM])
        except (KeyError, TypeError, ValueError) as error:
            raise NodeError(NodeErrorCode.MALFORMED_REPLY, "the app answers no sum") from error
        most = self._bound.largest
        if total.dtype != np.int64 or total.ndim != 1:
            raise NodeError(NodeErrorCode.MALFORMED_REPLY, "the app's sum is no int64 vector")
        if total.size and not (-most <= total.min() and total.max() <= most):
            raise NodeError(
                NodeErrorCode.MALFORMED_REPLY,
                f"an entry of the app's sum exceeds largest={most}: this node holds more units "
                "than the population that the server counts on",
            )
        return total.astype(np.int64)


@final
class NoisedSum(Contribution):
    """The app answers a sum to which `noise_share_mod` has added this node's share, mod 2^bits.

    Parameters
    ----------
    request : DistributedRequest
    task : RecordDict
        With the request, which the mod reads itself.
    """

    def __init__(self, request: DistributedRequest, task: RecordDict) -> None:
        self._grid = request.grid
        self._counts_on = request.plan.min_survivors
        self._task = task

    @property
    def counts_on(self) -> int:
        """The fewest survivors that the shares are calibrated to."""
        return self._counts_on

    @property
    def task(self) -> RecordDict:
        """The model, the request and the app's config."""
        return self._task

    def vector(self, answer: RecordDict) -> NDArray[np.int64]:
        """Return the residues."""
        try:
            residues = read_array(array_record(answer, records.INTEGER_SUM)[records.SUM])
        except (KeyError, TypeError, ValueError) as error:
            raise NodeError(NodeErrorCode.MALFORMED_REPLY, "the app answers no sum") from error
        if residues.dtype != np.int64 or residues.shape != (self._grid.padded,):
            raise NodeError(NodeErrorCode.MALFORMED_REPLY, "the app's sum does not fit the plan")
        if not (residues.min() >= 0 and residues.max() < 1 << self._grid.bits):
            raise NodeError(
                NodeErrorCode.MALFORMED_REPLY,
                "the app's sum is not reduced modulo the plan's: noise_share_mod stands between "
                "secure aggregation and the app",
            )
        return residues.astype(np.int64)


def contribution_for(
    content: RecordDict,
    node_config: Mapping[str, object],
    *,
    width: int,
    bits: int,
    lanes: int = 1,
    most_survivors: int | None = None,
) -> Contribution:
    """Return what a masked-input request asks for, everything in it checked.

    Parameters
    ----------
    content : RecordDict
        The request's records.
    node_config : mapping
        The node's own config: its `NodePolicy` holds.
    width, bits, lanes : int
        As agreed on when the round began: several lanes only where no sum wraps around.
    most_survivors : int or None
        How many vectors are certain to be in the sum, colluders included, whatever the server says;
        None where only the server's word counts. A plan for distributed noise must not count on
        more.

    Raises
    ------
    NodeError
        MALFORMED_REQUEST, POLICY_REFUSED.
    """
    own = {records.SECAGG, records.UPDATE}
    task = RecordDict({name: record for name, record in content.items() if name not in own})
    try:
        if (shares := config_record(content, records.DISTRIBUTED)) is not None:
            asked = DistributedRequest.from_config(shares)
            if (width, bits) != (asked.grid.padded, asked.grid.bits):
                raise ValueError(
                    f"width={width!r} and bits={bits!r} must be {asked.grid.padded} and "
                    f"{asked.grid.bits}, the plan's"
                )
            if lanes != 1:
                raise ValueError(f"lanes={lanes!r} must be 1: a sum of noised vectors may wrap")
            counted_on = asked.plan.min_survivors
            if most_survivors is not None and counted_on > most_survivors:
                raise NodeError(
                    NodeErrorCode.POLICY_REFUSED,
                    f"min_survivors={counted_on!r} must be <= {most_survivors!r}, the threshold "
                    "and this node: a higher threshold of secure aggregation makes more certain",
                )
            return NoisedSum(asked, task)
        if (record := config_record(content, records.UPDATE)) is None:
            raise KeyError(records.UPDATE)
        if config_record(content, records.COHORT) is not None:
            bound = SumBound.from_config(record)
            bound.check(bits, lanes)
            return IntegerSum(bound, task)
        request = UpdateRequest.from_config(record)
        request.check(bits, lanes)
        if request.grid.width != width:
            raise ValueError(f"width={width!r} must be {request.grid.width}, the grid's")
        contribution = BoundedUpdate(request, task)
    except (KeyError, TypeError, ValueError) as error:
        raise NodeError(NodeErrorCode.MALFORMED_REQUEST, str(error)) from error
    NodePolicy.from_node_config(node_config).check(
        noise_multiplier=request.grid.noise_multiplier, epsilon=float("inf")
    )
    return contribution


def _weight(examples: float, w_max: float) -> float:
    """Return a node's weight: 1, or ``min(n / w_max, 1)``, 0 for a count that is no number."""
    if not w_max:
        return 1.0
    return min(examples / w_max, 1.0) if examples > 0 else 0.0
