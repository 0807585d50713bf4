"""A node's part of a weighted mean under masks: its update in fixed point, and its weight.

For nodes whose answers are private already, as DP-SGD's are: no noise is added to the sum, and the
bound on an update is there only so that no sum can wrap around.

>>> request = AverageRequest(dimension=3, max_update_norm=2.0, parties=4)
>>> AverageRequest.from_config(request.to_config()) == request
True
>>> request.width, request.weight_units
(4, 1)
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Self, final

import numpy as np
from flwr.app import ConfigRecord, RecordDict
from numpy.typing import NDArray

from dpfl_flower import checks, clipping
from dpfl_flower.client.contribution_base import Contribution, SumBound, global_model
from dpfl_flower.client.errors import NODE_LOGGER, NodeError, NodeErrorCode
from dpfl_flower.client.grid_fields import integer, number
from dpfl_flower.client.public_claim import public_claim
from dpfl_flower.quantize import BoundedSum, IntegerGrid
from dpfl_flower.quantize.grid import LARGEST_SENSITIVITY_UNITS
from dpfl_flower.wire import (
    answered_arrays,
    answered_metrics,
    num_examples,
)

__all__ = ["AverageRequest", "WeightedUpdate"]

_DIMENSION: Final = "dimension"
_MAX_UPDATE_NORM: Final = "max-update-norm"
_MAX_NUM_EXAMPLES: Final = "max-num-examples"
_PARTIES: Final = "parties"
_FIELDS: Final = frozenset({_DIMENSION, _MAX_UPDATE_NORM, _MAX_NUM_EXAMPLES, _PARTIES})

_WEIGHT_BITS: Final = 24
"""About so many bits has the largest weight, where it need not have more."""

_FEWEST_ROUNDINGS: Final = 20
"""An update is to be so many times as long as what rounding does to it."""

logger = logging.getLogger(NODE_LOGGER)


@dataclass(frozen=True, kw_only=True)
class AverageRequest:
    """One round's public constants of a weighted mean; the node makes the integers of them itself.

    Attributes
    ----------
    dimension : int
        The length of the released model.
    max_update_norm : float
        L2 bound on a node's weighted update, and 2^24 times what its entries are rounded to.
        Longer ones are shortened: that costs utility only.
    parties : int
        No more vectors are summed.
    max_num_examples : int
        The node weighs ``min(num_examples / max_num_examples, 1)``; 0: every node weighs 1.

    Raises
    ------
    ValueError
        Naming the field, its value and its bound.
    """

    dimension: int
    max_update_norm: float
    parties: int
    max_num_examples: int = 0

    def __post_init__(self) -> None:
        checks.positive_int(dimension=self.dimension, parties=self.parties)
        checks.positive(max_update_norm=self.max_update_norm)
        checks.non_negative_int(max_num_examples=self.max_num_examples)
        checks.at_most(LARGEST_SENSITIVITY_UNITS, max_num_examples=self.max_num_examples)

    @cached_property
    def grid(self) -> IntegerGrid:
        """The integers of an update: ``max_update_norm`` is 2^24 units."""
        return IntegerGrid.for_noise_multiplier(0, self.dimension)

    @property
    def resolution(self) -> float:
        """The multiples to which each entry of a weighted update is rounded: the bound / 2^24."""
        return self.grid.unit_size(self.max_update_norm)

    @property
    def weight_units(self) -> int:
        """What the largest weight is as an integer: whole numbers of examples stay exact."""
        most = self.max_num_examples
        return most << max(0, _WEIGHT_BITS - most.bit_length()) if most else 1

    @property
    def width(self) -> int:
        """The length of a vector: the update, then the weight."""
        return self.dimension + 1

    @property
    def bound(self) -> SumBound:
        """What keeps the sum from wrapping around."""
        largest = max(self.grid.sensitivity_units, self.weight_units)
        return SumBound(largest=largest, parties=self.parties)

    def mean(self, total: NDArray[np.int64], *, survivors: int) -> NDArray[np.float64] | None:
        """Return the mean update, shape ``(dimension,)``, of so many vectors' sum.

        None where no weight is in the sum, or more than the vectors' could be.

        Parameters
        ----------
        total : int64 array, shape (width,)
        survivors : int
        """
        weight = int(total[-1])
        if not 0 < weight <= survivors * self.weight_units:
            return None
        unit = self.resolution * (self.weight_units / weight)
        return np.asarray(total[:-1], np.float64) * unit

    def to_config(self) -> ConfigRecord:
        """Return the request as it travels: numbers."""
        return ConfigRecord(
            {
                _DIMENSION: int(self.dimension),
                _MAX_UPDATE_NORM: float(self.max_update_norm),
                _MAX_NUM_EXAMPLES: int(self.max_num_examples),
                _PARTIES: int(self.parties),
            }
        )

    @classmethod
    def from_config(cls, record: Mapping[str, object]) -> Self:
        """Read a request and check all of it.

        Raises
        ------
        ValueError
            When a field is missing, unknown, of another type or out of range.
        """
        if unknown := record.keys() - _FIELDS:
            raise ValueError(f"unknown fields {sorted(unknown)}")
        return cls(
            dimension=integer(record, _DIMENSION),
            max_update_norm=number(record, _MAX_UPDATE_NORM),
            max_num_examples=integer(record, _MAX_NUM_EXAMPLES),
            parties=integer(record, _PARTIES),
        )


@final
class WeightedUpdate(Contribution):
    """Weights minus global weights, weighed and rounded, and the weight; never without a claim.

    An answer with numbers that are not finite is a vector of zeros, its weight included: it is then
    no part of the mean, and the sum does not tell whose it was.

    Parameters
    ----------
    request : AverageRequest
    task : RecordDict
        With the global arrays.
    """

    def __init__(self, request: AverageRequest, task: RecordDict) -> None:
        self._request = request
        self._task = task
        self._reference, self._layout = global_model(task, dimension=request.dimension)
        # Whatever the request asks that cannot be had shows now, and not by what the app answers.
        self._bounded = BoundedSum(request.grid, clip_norm=request.max_update_norm)

    @classmethod
    def asked(
        cls, record: ConfigRecord, task: RecordDict, *, width: int, bits: int, lanes: int
    ) -> Self:
        """Read a request; ValueError where it does not fit the sum that nodes agreed on."""
        request = AverageRequest.from_config(record)
        request.bound.check(bits, lanes)
        if width != request.width:
            raise ValueError(f"width={width!r} must be {request.width}, the update's and a weight")
        return cls(request, task)

    @property
    def task(self) -> RecordDict:
        """The model and the app's config."""
        return self._task

    def claim(self, answer: RecordDict) -> ConfigRecord:
        """Return the claim that goes along; NodeError where there is none."""
        return public_claim(answer)

    def vector(self, answer: RecordDict) -> NDArray[np.int32]:
        """Return the update's integers, and last the weight's."""
        request, layout = self._request, self._layout
        try:
            arrays = answered_arrays(answer)
            update = layout.flatten(arrays)
        except (KeyError, TypeError, ValueError) as error:
            raise NodeError(NodeErrorCode.MALFORMED_REPLY, str(error)) from error
        with np.errstate(all="ignore"):  # what is not finite has a defined outcome
            update -= layout.flatten(self._reference)
        length = clipping.norm([update])
        weight = self._weight(num_examples(answered_metrics(answer)))
        vector = np.zeros(request.width, np.int32)
        if not math.isfinite(length) or not weight:
            logger.warning("This round's answer weighs nothing, or is not finite: it is zeros")
            return vector
        share = weight / request.weight_units
        vector[:-1] = self._bounded.contribution([update], weight=share)
        self._warn(share * length, kept=bool(vector[:-1].any()))
        vector[-1] = weight
        return vector

    def _warn(self, length: float, *, kept: bool) -> None:
        """Say in the node's own log where the bound is no good for an update of this length."""
        if not length:
            return
        most, grid = self._request.max_update_norm, self._request.grid
        if length > most:
            logger.warning(
                "The weighted update's norm %g exceeds max_update_norm=%g: it was shortened",
                length,
                most,
            )
        if not kept:
            logger.warning(
                "The weighted update's norm %g is so small beside max_update_norm=%g that it is"
                " rounded to nothing: each entry is held to %g. The server should take about ten"
                " times the norm of an update",
                length,
                most,
                self._request.resolution,
            )
            return
        # What rounding to nearest does to d entries has a norm of about sqrt(d / 12) units.
        rounded = math.sqrt(grid.dimension / 12) * self._request.resolution
        if length < _FEWEST_ROUNDINGS * rounded:
            logger.warning(
                "The weighted update's norm %g is small beside max_update_norm=%g: rounding changes"
                " it by about %g. About ten times the norm of an update keeps it",
                length,
                most,
                rounded,
            )

    def _weight(self, examples: float) -> int:
        """Return the weight in units; 0 for a count that is no number."""
        request = self._request
        most = request.max_num_examples
        if not most:
            return request.weight_units
        if not (math.isfinite(examples) and examples > 0):
            return 0
        return round(min(examples / most, 1.0) * request.weight_units)
