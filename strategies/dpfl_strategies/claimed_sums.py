"""Secure sums of what nodes add their own noise to: no answer is summed without a privacy claim.

>>> from dpfl_flower.secagg import SecAggPlus
>>> ClaimedSums(SecAggPlus(), population=20).parties
20
"""

from collections.abc import Callable, Sequence
from typing import final

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from dpfl_flower import checks
from dpfl_flower.client.contribution_base import SumBound
from dpfl_flower.secagg import (
    SecureAggregation,
    Session,
    SumRequest,
    encoding_without_wrap,
    terms_of,
)
from dpfl_strategies.secure_round import SecureRound, no_room, round_seconds

__all__ = ["ClaimedSums"]


@final
class ClaimedSums:
    """How strategies whose nodes answer privately by themselves learn sums and nothing else.

    No noise is added here, and no unit is counted: what protects people is in the vectors.

    Parameters
    ----------
    secure : SecureAggregation
        The protocol.
    population : int
        How many nodes there are at least; all of them are asked.

    Raises
    ------
    ValueError
        Where no round among so many nodes could ever end well, or the protocol takes fewer.
    """

    def __init__(self, secure: SecureAggregation, *, population: int) -> None:
        checks.instance(SecureAggregation, secure_aggregation=secure)
        secure.check_population(population)
        if secure.max_cohort is not None and secure.max_cohort < population:
            raise ValueError(
                f"max_cohort={secure.max_cohort} must be >= {population}, the nodes that are asked "
                "in a round"
            )
        self._secure = secure
        self._parties = secure.max_cohort or population

    def __repr__(self) -> str:
        """Name the protocol and its settings, which may not change between the parts of a run."""
        return repr(self._secure)

    @property
    def parties(self) -> int:
        """No more vectors are ever summed: what the modulus leaves room for."""
        return self._parties

    def begin(
        self,
        nodes: Sequence[int],
        task: RecordDict,
        *,
        grid: Grid,
        server_round: int,
        width: int,
        bound: SumBound,
        stage_seconds: float,
        admit: Callable[[Message], bool],
    ) -> SecureRound:
        """Begin a round's exchange with all nodes.

        Parameters
        ----------
        nodes : sequence of int
        task : RecordDict
            What the nodes compute their vectors of, all of it public.
        width : int
            Entries of a vector.
        bound : SumBound
            What no entry of an honest vector exceeds, for ``parties`` of them.
        stage_seconds : float
            How long the replies to one exchange of messages are waited for.
        admit : Callable[[Message], bool]
            Whether a reply with a vector counts; it reads the claim.

        Raises
        ------
        ValueError
            If there are more nodes than the modulus leaves room for; nobody is asked then.
        """
        if len(nodes) > self._parties:
            raise no_room(self._secure, parties=self._parties, nodes=len(nodes))
        encoding = encoding_without_wrap(bound.largest, bound.parties, width)
        request = SumRequest(
            session=Session(grid.run.run_id, server_round, terms_of(task)),
            nodes=tuple(nodes),
            width=width,
            bits=encoding.bits,
            lanes=encoding.lanes,
            seconds=round_seconds(stage_seconds),
            largest=bound.largest,
        )
        return SecureRound(self._secure, request, task, admit=admit)
