"""What a node puts into a secure sum: one integer vector, made of what its app answers.

The server says in a record which kind it wants; the node makes it, holds it to the bound itself,
and nothing of the answer but that vector, masked, leaves it. A sum that carries a share
of the noise already is another kind. Answers that are private already, with all of their noise in
them, leave with a privacy claim beside the vector.

>>> grid = IntegerGrid.for_noise_multiplier(1.0, 2)
>>> request = UpdateRequest(grid=grid, clip_norm=1.0, largest=1 << 14, parties=100)
>>> UpdateRequest.from_config(request.to_config()) == request
True
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, Self, cast, final

import numpy as np
from flwr.app import ConfigRecord, RecordDict
from numpy.typing import NDArray

from dpfl_flower import checks, records
from dpfl_flower.client.contribution_base import (
    LARGEST,
    PARTIES,
    Contribution,
    SumBound,
    global_model,
)
from dpfl_flower.client.distributed_request import DistributedRequest
from dpfl_flower.client.errors import NODE_LOGGER, NodeError, NodeErrorCode
from dpfl_flower.client.grid_fields import (
    GRID_FIELDS,
    METRIC_FIELDS,
    grid_from_fields,
    grid_to_fields,
    integer,
    number,
    ranges_from_fields,
    ranges_to_fields,
)
from dpfl_flower.client.local_request import LocalRequest
from dpfl_flower.client.policy import NodePolicy
from dpfl_flower.client.public_claim import public_claim, require_unclaimed
from dpfl_flower.client.weighted_update import WeightedUpdate
from dpfl_flower.metric_ranges import NO_METRICS, MetricRanges
from dpfl_flower.quantize import BoundedSum, IntegerGrid
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

logger = logging.getLogger(NODE_LOGGER)

_CLIP_NORM: Final = "clip-norm"
_DITHER_SEED: Final = "dither-seed"
_W_MAX: Final = "w-max"


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
    metrics : MetricRanges
        Which of the app's metrics ride behind the update, and the range that the node clips each
        to: as many as the grid carries.
    """

    grid: IntegerGrid
    clip_norm: float
    dither_seed: bytes | None = None
    w_max: float = 0.0
    metrics: MetricRanges = NO_METRICS

    def __post_init__(self) -> None:
        checks.non_negative(w_max=self.w_max)
        entry = self.grid.largest_entry
        if self.largest < entry:
            raise ValueError(f"largest={self.largest!r} must be >= {entry}, the grid's own bound")
        if len(self.metrics) != self.grid.num_metrics:
            raise ValueError(
                f"metrics={self.metrics.names!r} must be {self.grid.num_metrics}, the grid's"
            )
        BoundedSum(
            replace(self.grid, dimension=1),
            clip_norm=self.clip_norm,
            dither_seed=self.dither_seed,
        )  # checks clip norm and seed, at no cost

    def to_config(self) -> ConfigRecord:
        """Return the request as it travels: numbers, text and bytes."""
        record = ConfigRecord(
            {
                **grid_to_fields(self.grid),
                **ranges_to_fields(self.metrics),
                _CLIP_NORM: float(self.clip_norm),
                _W_MAX: float(self.w_max),
                LARGEST: self.largest,
                PARTIES: self.parties,
            }
        )
        if self.dither_seed is not None:
            record[_DITHER_SEED] = self.dither_seed
        return record

    @classmethod
    def from_config(cls, record: Mapping[str, object]) -> Self:
        """Read a request and check all of it; ValueError for what does not fit."""
        known = GRID_FIELDS | METRIC_FIELDS | {_CLIP_NORM, _DITHER_SEED, _W_MAX, LARGEST, PARTIES}
        if unknown := record.keys() - known:
            raise ValueError(f"unknown fields {sorted(unknown)}")
        return cls(
            grid=grid_from_fields(record),
            clip_norm=number(record, _CLIP_NORM),
            dither_seed=cast("bytes | None", record.get(_DITHER_SEED)),
            w_max=number(record, _W_MAX),
            metrics=ranges_from_fields(record),
            largest=integer(record, LARGEST),
            parties=integer(record, PARTIES),
        )


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
        self._reference, self._layout = global_model(task, dimension=request.grid.dimension)

    @property
    def task(self) -> RecordDict:
        """The model and the app's config."""
        return self._task

    def vector(self, answer: RecordDict) -> NDArray[np.int32]:
        """Return the bounded update, then the clip indicator and the metrics that are asked for."""
        request, layout = self._request, self._layout
        require_unclaimed(answer)
        try:
            arrays = answered_arrays(answer)
            layout.check(arrays)
            metrics = answered_metrics(answer)
            examples = num_examples(metrics)
        except (KeyError, TypeError, ValueError) as error:
            raise NodeError(NodeErrorCode.MALFORMED_REPLY, str(error)) from error
        places = request.metrics.places(metrics)
        if missing := request.metrics.missing(places):
            logger.warning(
                "The server asks for the metrics %s, of which this answer holds no finite number:"
                " each counts as the middle of its range. The answer's metrics are %s",
                list(missing),
                sorted(metrics),
            )
        bounded = BoundedSum(
            request.grid, clip_norm=request.clip_norm, dither_seed=request.dither_seed
        )
        return bounded.contribution(
            layout.released(arrays),
            layout.released(self._reference),
            weight=_weight(examples, request.w_max),
            metrics=places,
        )


@final
class IntegerSum(Contribution):
    """What is inside answers an integer sum already: of a node's units, or with all of its noise.

    Parameters
    ----------
    bound : SumBound
    task : RecordDict
        With the `CohortRequest`, which the app reads itself, or the `LocalRequest`, which
        `local_noise_mod` reads.
    claimed : bool
        Whether the answer must hold a privacy claim, which goes along.
    """

    def __init__(self, bound: SumBound, task: RecordDict, *, claimed: bool = False) -> None:
        self._bound = bound
        self._task = task
        self._claimed = claimed

    @classmethod
    def with_noise(
        cls, bound: SumBound, task: RecordDict, request: LocalRequest, *, width: int
    ) -> Self:
        """Return the sum that ``request`` asks for.

        Raises
        ------
        ValueError
            If the bound is below one unit's and the largest noise's, or the width another.
        """
        if width != request.grid.width:
            raise ValueError(f"width={width!r} must be {request.grid.width}, the grid's")
        least = request.grid.sensitivity_units + request.largest_noise
        if bound.largest < least:
            raise ValueError(
                f"largest={bound.largest!r} must be >= {least}, one unit and the largest noise"
            )
        return cls(bound, task, claimed=True)

    @property
    def task(self) -> RecordDict:
        """The model, the request and the app's config."""
        return self._task

    def claim(self, answer: RecordDict) -> ConfigRecord | None:
        """Return the claim that goes along; NodeError where one must and there is none."""
        return public_claim(answer) if self._claimed else None

    def vector(self, answer: RecordDict) -> NDArray[np.int64]:
        """Return the node's sum; zeros for one above the bound, unless it is noised already."""
        if not self._claimed:
            require_unclaimed(answer)
        try:
            total = read_array(array_record(answer, records.INTEGER_SUM)[records.SUM])
        except (KeyError, TypeError, ValueError) as error:
            raise NodeError(NodeErrorCode.MALFORMED_REPLY, "the app answers no sum") from error
        most = self._bound.largest
        if total.dtype != np.int64 or total.ndim != 1:
            raise NodeError(NodeErrorCode.MALFORMED_REPLY, "the app's sum is no int64 vector")
        if total.size and not (-most <= total.min() and total.max() <= most):
            what = (
                f"an entry of the app's sum exceeds largest={most}: this node holds more units "
                "than the population that the server counts on"
            )
            if self._claimed:
                raise NodeError(NodeErrorCode.MALFORMED_REPLY, what)
            # A refusal would tell of this node's exact sum, outside of all masks and noise, to a
            # server that names bounds to find out.
            logger.error("%s: it counts as zeros", what)
            return np.zeros_like(total)
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
    own = {records.SECAGG, records.UPDATE, records.AVERAGE}
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
        if (averaged := config_record(content, records.AVERAGE)) is not None:
            return WeightedUpdate.asked(averaged, task, width=width, bits=bits, lanes=lanes)
        if (record := config_record(content, records.UPDATE)) is None:
            raise KeyError(records.UPDATE)
        local = config_record(content, records.LOCAL)
        if local is not None or config_record(content, records.COHORT) is not None:
            bound = SumBound.from_config(record)
            bound.check(bits, lanes)
            if local is None:
                return IntegerSum(bound, task)
            noisy = LocalRequest.from_config(local)
            return IntegerSum.with_noise(bound, task, noisy, width=width)
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
