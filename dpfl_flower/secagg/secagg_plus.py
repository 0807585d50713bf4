"""Secure aggregation with pairwise masks, as a strategy's argument.

>>> SecAggPlus(neighbours=20).begin(
...     SumRequest(session=Session(1, 1), nodes=(1, 2, 3), width=5, bits=32, seconds=60.0)
... ).stage
'advertise'
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Union, final

from flwr.app import RecordDict

from dpfl_flower import checks
from dpfl_flower.secagg.aggregation import SecureAggregation, SecureExchange, SumRequest
from dpfl_flower.secagg.messages import Reply, Stage
from dpfl_flower.secagg.round_plan import RoundPlan, SecureSum, check_threshold, is_count, t_of
from dpfl_flower.secagg.server import (
    Acknowledging,
    Advertising,
    Masking,
    ServerStage,
    Sharing,
    Unmasking,
)
from dpfl_flower.secagg.session import Session
from dpfl_flower.secagg.wire import decode_reply, encode

__all__ = ["SecAggPlus", "Session", "SumRequest"]

log = logging.getLogger("flwr.dpfl")

_STAGES = {
    Advertising: Stage.ADVERTISE,
    Sharing: Stage.SHARE,
    Masking: Stage.MASK,
    Acknowledging: Stage.ACKNOWLEDGE,
    Unmasking: Stage.UNMASK,
}


@final
@dataclass(frozen=True, kw_only=True)
class SecAggPlus(SecureAggregation):
    """Double masking (Bonawitz et al., CCS 2017) on a k-regular graph (Bell et al., CCS 2020).

    The server learns the exact sum and whose vectors are in it, as long as it keeps to the
    protocol or the nodes have rosters; docs/threat-model.md says what else it can learn, and when.

    Parameters
    ----------
    threshold : float or int
        How many of a node's k neighbours must stay to the end: a share of them, above 1/2 and at
        most 1, t = ceil(threshold k); or t itself, an integer of 2 or more, without which a round
        is abandoned. Raised where ``2 t > k + colluders`` needs it.
    neighbours : int or None
        k, even; None (the default): all other nodes. Costs grow with k; about 2 log2 of the cohort
        plus what dropouts and colluders take is enough (Bell et al., section 3.2).
    min_cohort : int
        The fewest vectors in a sum; with fewer the round is abandoned. Nodes have their own.
    max_cohort : int or None
        The most nodes in a round, for which the modulus leaves room. None: the population.
    colluders : int
        How many neighbours of any node may work with the server.
    rosters : bool
        Whether the nodes have rosters of each other's identity keys: then nodes also sign who
        survived, and refuse to unmask otherwise. True needs it on every node.

    Raises
    ------
    ValueError
        Naming the argument, its value and the bound.
    """

    threshold: float | int = 2 / 3
    neighbours: int | None = None
    min_cohort: int = 3
    max_cohort: int | None = None
    colluders: int = 0
    rosters: bool = False

    def __post_init__(self) -> None:
        check_threshold(self.threshold)
        checks.positive_int(min_cohort=self.min_cohort)
        if self.min_cohort < 2:
            raise ValueError(f"min_cohort={self.min_cohort!r} must be >= 2: a sum of one is no sum")
        checks.non_negative_int(colluders=self.colluders)
        if self.neighbours is not None:
            checks.positive_int(neighbours=self.neighbours)
            if self.neighbours % 2:
                raise ValueError(
                    f"neighbours={self.neighbours!r} must be even: half stand before a node, half "
                    "after it"
                )
            if is_count(self.threshold) and self.threshold > self.neighbours:
                raise ValueError(
                    f"threshold={self.threshold!r} must be <= neighbours={self.neighbours!r}"
                )
            if self.colluders >= self.neighbours:
                raise ValueError(
                    f"colluders={self.colluders!r} must be < neighbours={self.neighbours!r}"
                )
        if self.max_cohort is not None:
            checks.positive_int(max_cohort=self.max_cohort)
            if self.max_cohort < self.min_cohort:
                raise ValueError(
                    f"max_cohort={self.max_cohort!r} must be >= min_cohort={self.min_cohort!r}"
                )

    @property
    def nodes_learn_sum(self) -> bool:
        """Nodes see shares and keys, and never a vector or a sum."""
        return False

    def seen_by_a_node(self, population: int) -> int:
        """Its own and its neighbours'; with a roster its own and those of a threshold of them."""
        count = population - 1 if self.neighbours is None else min(self.neighbours, population - 1)
        if not self.rosters:
            return 1 + count
        return 1 + t_of(self.threshold, count, colluders=self.colluders)

    def check_population(self, population: int) -> None:
        """Raise ValueError where no round among ``population`` nodes could ever end well."""
        least = max(self.min_cohort, self.colluders + 2)
        if is_count(self.threshold) and population <= self.threshold:
            raise ValueError(
                f"threshold={self.threshold!r} must be < {population}, the nodes: a node has no "
                "more neighbours"
            )
        if population < least:
            raise ValueError(
                f"min_cohort={self.min_cohort!r} with colluders={self.colluders!r} needs at least "
                f"{least} nodes, and there are {population}"
            )

    def begin(self, request: SumRequest) -> SecureExchange:
        """Return the first stage of a round; RoundAbandoned if there are too few nodes."""
        plan = RoundPlan(
            session=request.session,
            nodes=request.nodes,
            width=request.width,
            bits=request.bits,
            threshold=self.threshold,
            neighbours=self.neighbours,
            min_cohort=self.min_cohort,
            colluders=self.colluders,
            rosters=self.rosters,
            seconds=request.seconds,
            largest=request.largest,
            lanes=request.lanes,
        )
        plan.require(request.nodes, "were drawn")
        return _Exchange(Advertising(plan))


@final
@dataclass(frozen=True)
class _Exchange(SecureExchange):
    """A stage of the protocol, in Flower's records."""

    inner: ServerStage

    @property
    def stage(self) -> str:
        """The stage's name."""
        return _STAGES[type(self.inner)].name.lower()

    @property
    def carries_task(self) -> bool:
        """Whether nodes are asked for their masked vectors."""
        return isinstance(self.inner, Masking)

    @property
    def requests(self) -> Mapping[int, RecordDict]:
        """The protocol's records for each node."""
        return {node: encode(request) for node, request in self.inner.requests.items()}

    def receive(self, replies: Mapping[int, RecordDict]) -> Union["_Exchange", SecureSum]:
        """Return the next stage, or the sum."""
        decoded: dict[int, Reply] = {}
        for node, content in replies.items():
            try:
                decoded[node] = decode_reply(content)
            except Exception as malformed:  # whatever a node wrote must not end the run
                log.warning(
                    "A malformed reply of node %d counts as a dropout (%s)",
                    node,
                    type(malformed).__name__,
                )
        following = self.inner.receive(decoded)
        return following if isinstance(following, SecureSum) else _Exchange(following)
