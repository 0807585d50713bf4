"""One round of answers with local noise: who was asked what, and the sum of what came back.

>>> NoisySum(np.zeros(3, np.int64), came=0, valid=0).valid
0
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from dpfl_flower import records
from dpfl_flower.client.contribution_base import SumBound
from dpfl_flower.client.local_request import LocalRequest
from dpfl_strategies.claim_book import ClaimBook
from dpfl_strategies.claimed_sums import ClaimedSums
from dpfl_strategies.local_plan import LocalPlan, claim_covers
from dpfl_strategies.messages import Arrays, to_messages
from dpfl_strategies.replies import accepted, parse_sum
from dpfl_strategies.secure_round import SecureRound, unfinished

__all__ = ["NoisySum", "OpenRound", "masked_round"]

log = logging.getLogger("flwr.dpfl")


@dataclass(frozen=True)
class NoisySum:
    """What a round came to.

    Attributes
    ----------
    total : int64 array, shape (width,)
        Zeros where no answer is in it.
    came : int
        How many answers somebody saw or may have seen.
    valid : int
        How many are in the sum.
    """

    total: NDArray[np.int64]
    came: int
    valid: int


@dataclass(frozen=True)
class OpenRound:
    """The round that waits for replies; ``masked`` is None where each answer is seen."""

    request: LocalRequest
    nodes: frozenset[int]
    reference: Arrays
    masked: SecureRound | None

    def messages(
        self, nodes: Sequence[int], *, arrays: ArrayRecord, config: ConfigRecord
    ) -> list[Message]:
        """Return the round's first messages; under masks the model goes along later."""
        if self.masked is not None:
            return self.masked.messages()
        return to_messages(
            nodes,
            MessageType.TRAIN,
            server_round=self.request.server_round,
            arrays=arrays,
            config=config,
            extra=RecordDict({records.LOCAL: self.request.to_config()}),
        )

    def proceed(self, replies: Iterable[Message]) -> list[Message] | None:
        """Return what to send once these replies are there, None where they are the last ones."""
        return None if self.masked is None else self.masked.proceed(replies)

    def gathered(self, replies: Iterable[Message], plan: LocalPlan, claims: ClaimBook) -> NoisySum:
        """Return the sum of all answers that are as asked.

        Raises
        ------
        RuntimeError
            If secure aggregation has not come to its end.
        """
        request = self.request
        total = np.zeros(request.grid.width, np.int64)
        if self.masked is not None:
            return self._unmasked(self.masked, total)
        came = valid = 0
        for message in accepted(replies, asked=self.nodes, group=str(request.server_round)):
            came += 1
            if not _covers(message, request, claims):
                continue
            part = parse_sum(message, width=request.grid.width, bound=plan.largest_entry(request))
            if part is not None:
                total += part
                valid += 1
        return NoisySum(total, came, valid)

    def _unmasked(self, masked: SecureRound, nothing: NDArray[np.int64]) -> NoisySum:
        if not masked.finished:
            raise unfinished(self.request.server_round)
        summed = masked.total
        if summed is None:
            return NoisySum(nothing, 0, 0)
        return NoisySum(summed.total, len(summed.survivors), len(summed.survivors))


def masked_round(
    secure: ClaimedSums,
    plan: LocalPlan,
    request: LocalRequest,
    nodes: Sequence[int],
    *,
    arrays: ArrayRecord,
    config: ConfigRecord,
    grid: Grid,
    stage_seconds: float,
    claims: ClaimBook,
) -> SecureRound:
    """Begin a round in which nodes mask their noisy integers; errors as for `ClaimedSums.begin`.

    An honest entry holds what the units inside a node can add up to and the largest noise there is,
    so that no sum wraps around. Whose claim does not cover its answer is a dropout.
    """
    bound = SumBound(largest=plan.largest_entry(request), parties=secure.parties)
    config[records.SERVER_ROUND] = request.server_round
    task = RecordDict(
        {
            records.ARRAYS: arrays,
            records.CONFIG: config,
            records.LOCAL: request.to_config(),
            records.UPDATE: bound.to_config(),
        }
    )
    return secure.begin(
        nodes,
        task,
        grid=grid,
        server_round=request.server_round,
        width=request.grid.width,
        bound=bound,
        stage_seconds=stage_seconds,
        admit=lambda reply: _covers(reply, request, claims),
    )


def _covers(reply: Message, request: LocalRequest, claims: ClaimBook) -> bool:
    """Note what a reply claims, and return whether that covers the answer beside it."""
    node, noise = reply.metadata.src_node_id, request.noise
    assert noise.noise_multiplier is not None
    known = claims.durably_released(node, noise.event(noise.noise_multiplier))
    claim = claims.read(reply)  # what was spent counts, whatever else is wrong
    if claim is None:
        return False
    if not claim_covers(claim, noise, known=known):
        log.warning("Node %d's claim does not cover its answer: it is a dropout", node)
        return False
    return True
