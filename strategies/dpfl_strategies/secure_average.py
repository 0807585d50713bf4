"""A weighted mean of updates that are private already, of which the server sees sums only.

>>> from dpfl_flower.secagg import SecAggPlus
>>> SecureAverage.of(SecAggPlus(), population=20, max_update_norm=None, max_num_examples=None,
...     weigh_by_num_examples=False)
Traceback (most recent call last):
    ...
ValueError: max_update_norm=None must be given with secure_aggregation: it keeps sums from \
wrapping around
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self, final

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from dpfl_flower import checks, records
from dpfl_flower.client.weighted_update import AverageRequest
from dpfl_flower.secagg import SecureAggregation, fewest_bits
from dpfl_strategies.claimed_sums import ClaimedSums
from dpfl_strategies.secure_round import SecureRound

__all__ = ["OpenAverage", "SecureAverage"]

log = logging.getLogger("flwr.dpfl")

_AT_THE_BOUND: Final = 0.99
"""Updates whose mean has this share of the bound's length were most likely shortened to it."""


@final
@dataclass(frozen=True)
class OpenAverage:
    """The exchange of one round: what to send, and the mean once there is one.

    Attributes
    ----------
    request : AverageRequest
    exchange : SecureRound
    """

    request: AverageRequest
    exchange: SecureRound

    @property
    def survivors(self) -> int:
        """How many vectors are in the sum; 0 where the round was abandoned."""
        summed = self.exchange.total
        return 0 if summed is None else len(summed.survivors)

    @property
    def mean(self) -> NDArray[np.float64] | None:
        """The mean update, shape ``(dimension,)``; None for an abandoned round.

        And for one in whose sum there is no weight, or more than its vectors can have.
        """
        summed = self.exchange.total
        if summed is None:
            return None
        mean = self.request.mean(summed.total, survivors=len(summed.survivors))
        if mean is None:
            log.warning("A round is given up: its weights add up to nothing, or to too much")
        else:
            self._judge(summed.total[:-1], survivors=len(summed.survivors))
        return mean

    def _judge(self, updates: NDArray[np.int64], *, survivors: int) -> None:
        """Warn where the sum of updates shows that the bound on each does not suit them."""
        request = self.request
        if not updates.any():
            log.warning(
                "The mean update is zero in every entry: either no node changed anything, or"
                " max_update_norm=%g is too large. Updates are rounded to"
                " multiples of %.2g, and those below half of that are lost; take about ten times"
                " the norm of a node's update, which the nodes' own logs tell",
                request.max_update_norm,
                request.resolution,
            )
            return
        # Over the vectors and not their weight: each is bounded after it was weighed.
        length = request.resolution * float(np.linalg.norm(updates.astype(np.float64))) / survivors
        if length >= _AT_THE_BOUND * request.max_update_norm:
            log.warning(
                "The mean update is as long as max_update_norm=%g lets it be: nodes shorten their"
                " updates. Take about ten times the norm of a node's update, which the nodes' own"
                " logs tell",
                request.max_update_norm,
            )


@final
class SecureAverage:
    """What a strategy needs to average under masks.

    Parameters
    ----------
    sums : ClaimedSums
    max_update_norm : float
        L2 bound on a node's weighted update, and 2^24 times what its entries are rounded to.
    max_num_examples : int or None
        The largest weight; None: every node counts the same.
    """

    def __init__(
        self, sums: ClaimedSums, *, max_update_norm: float, max_num_examples: int | None
    ) -> None:
        self._sums = sums
        self._max_update_norm = max_update_norm
        self._max_num_examples = int(max_num_examples or 0)  # goes into a checkpoint

    @classmethod
    def of(
        cls,
        secure: SecureAggregation | None,
        *,
        population: int,
        max_update_norm: float | None,
        max_num_examples: int | None,
        weigh_by_num_examples: bool,
    ) -> Self | None:
        """Check a user's arguments against each other; None where there is no protocol.

        Raises
        ------
        ValueError
            Naming the argument, its value and the bound.
        """
        if secure is None:
            for name, value in (
                ("max_update_norm", max_update_norm),
                ("max_num_examples", max_num_examples),
            ):
                if value is not None:
                    raise ValueError(
                        f"{name}={value!r} must be None without secure_aggregation: nothing then "
                        "has to be bounded"
                    )
            return None
        sums = ClaimedSums(secure, population=population)
        if max_update_norm is None:
            raise ValueError(
                "max_update_norm=None must be given with secure_aggregation: it keeps sums from "
                "wrapping around"
            )
        if (max_num_examples is not None) != weigh_by_num_examples:
            raise ValueError(
                f"max_num_examples={max_num_examples!r} must be given with secure_aggregation "
                "where nodes weigh by their examples, and only there; "
                f"weigh_by_num_examples={weigh_by_num_examples!r}"
            )
        if max_num_examples is not None:
            checks.positive_int(max_num_examples=max_num_examples)
        average = cls(sums, max_update_norm=max_update_norm, max_num_examples=max_num_examples)
        average._request(1)  # what does not depend on the model is refused at once
        return average

    def __repr__(self) -> str:
        """Name the protocol and the bound."""
        return f"{self._sums!r}, max_update_norm={self._max_update_norm!r}"

    def settings(self) -> dict[str, Any]:
        """Return what may not change between the parts of a resumed run."""
        return {
            "secure_aggregation": repr(self._sums),
            "max_update_norm": self._max_update_norm,
            "max_num_examples": self._max_num_examples,
        }

    def begin(
        self,
        nodes: Sequence[int],
        *,
        arrays: ArrayRecord,
        config: ConfigRecord,
        dimension: int,
        server_round: int,
        grid: Grid,
        stage_seconds: float,
        admit: Callable[[Message], bool],
    ) -> OpenAverage:
        """Begin a round with these nodes; parameters and errors as for `ClaimedSums.begin`."""
        request = self._request(dimension)
        config[records.SERVER_ROUND] = server_round
        task = RecordDict(
            {
                records.ARRAYS: arrays,
                records.CONFIG: config,
                records.AVERAGE: request.to_config(),
            }
        )
        exchange = self._sums.begin(
            nodes,
            task,
            grid=grid,
            server_round=server_round,
            width=request.width,
            bound=request.bound,
            stage_seconds=stage_seconds,
            admit=admit,
        )
        return OpenAverage(request, exchange)

    def _request(self, dimension: int) -> AverageRequest:
        """Return what nodes are asked; ValueError where the sum could wrap around."""
        request = AverageRequest(
            dimension=dimension,
            max_update_norm=self._max_update_norm,
            parties=self._sums.parties,
            max_num_examples=self._max_num_examples,
        )
        try:
            fewest_bits(request.bound.largest, request.parties)
        except ValueError as error:
            raise ValueError(f"max_cohort={self._sums.parties} is too large: {error}") from error
        return request
