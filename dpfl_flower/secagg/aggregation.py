"""How a server learns the sum of its nodes' vectors and nothing else: the extension point.

A strategy knows no protocol. It asks a `SecureAggregation` to begin a round, sends what the
`SecureExchange` wants sent, hands it the replies, and goes on until there is a `SecureSum` or the
round is abandoned. `SecAggPlus` is the one to take; `CKKS` is another. A third subclasses both
classes and brings its own mod for the nodes.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Union

from flwr.app import RecordDict

from dpfl_flower import checks
from dpfl_flower.secagg.round_plan import SecureSum
from dpfl_flower.secagg.session import Session

__all__ = ["SecureAggregation", "SecureExchange", "SumRequest"]


@dataclass(frozen=True, kw_only=True)
class SumRequest:
    """What is to be summed.

    Parameters
    ----------
    session : Session
        The round of the run.
    nodes : tuple of int
        Whose vectors, each once.
    width : int
        Entries of a vector.
    bits : int
        The sum is known mod 2^bits.
    lanes : int
        How many entries a protocol with masks may pack into a word, where no sum of honest vectors
        wraps around mod 2^bits; 1 where one may.
    seconds : float
        How long the round may take in all; after that nodes forget it.
    largest : int or None
        The most that an entry of an honest vector can be, where that is known.
    """

    session: Session
    nodes: tuple[int, ...]
    width: int
    bits: int
    seconds: float
    largest: int | None = None
    lanes: int = 1

    def __post_init__(self) -> None:
        checks.positive_int(width=self.width, bits=self.bits, lanes=self.lanes)
        checks.at_most(64, bits=self.bits)
        checks.positive(seconds=self.seconds)


class SecureExchange(ABC):
    """A round in progress: what to send now, and what follows from the replies."""

    @property
    @abstractmethod
    def stage(self) -> str:
        """A name of this stage, unlike that of any other stage of the round."""

    @property
    @abstractmethod
    def carries_task(self) -> bool:
        """Whether the model and what is asked for go along, so that nodes compute their vectors."""

    @property
    @abstractmethod
    def requests(self) -> Mapping[int, RecordDict]:
        """The protocol's records for each node that is asked now."""

    @abstractmethod
    def receive(self, replies: Mapping[int, RecordDict]) -> Union["SecureExchange", SecureSum]:
        """Return the next stage, or the sum.

        ``replies`` may hold anything; nodes that are missing from them have dropped out.

        Raises
        ------
        RoundAbandoned
            If the sum cannot be had any more. Nothing else may be raised for what a node answers.
        """


class SecureAggregation(ABC):
    """A protocol for secure sums, with its settings."""

    @property
    @abstractmethod
    def max_cohort(self) -> int | None:
        """The most nodes in a round that the user allows; None: as many as the population."""

    @property
    @abstractmethod
    def min_cohort(self) -> int:
        """The fewest vectors in a sum: with fewer the round is abandoned, nothing is learned."""

    @property
    @abstractmethod
    def colluders(self) -> int:
        """How many nodes may work with the server, for all that the protocol promises."""

    @property
    @abstractmethod
    def nodes_learn_sum(self) -> bool:
        """Whether honest nodes are shown the sum: then noise of their own must not be claimed."""

    def seen_by_a_node(self, population: int) -> int:
        """Return how many vectors of a sum a node can tell are in it, its own included."""
        return population

    @abstractmethod
    def check_population(self, population: int) -> None:
        """Raise ValueError where no round among ``population`` nodes could ever end well."""

    @abstractmethod
    def begin(self, request: SumRequest) -> SecureExchange:
        """Return the first stage of a round.

        Raises
        ------
        RoundAbandoned
            If there are too few nodes to begin with.
        """
