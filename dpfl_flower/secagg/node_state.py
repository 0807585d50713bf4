"""What a node insists on, and what it keeps between two stages of a round.

>>> NodeRules(min_cohort=1)
Traceback (most recent call last):
    ...
ValueError: min_cohort=1 must be >= 2: a sum of one is no sum
"""

from dataclasses import dataclass, field
from functools import cached_property

from dpfl_flower import checks
from dpfl_flower.secagg.messages import PeerKeys, Token
from dpfl_flower.secagg.roster import Identity, Roster
from dpfl_flower.secagg.session import Session

__all__ = ["HeldShares", "NodeRules", "NodeState", "OpeningKey", "Party"]


@dataclass(frozen=True, kw_only=True)
class NodeRules:
    """What a node insists on, whatever the server asks for.

    Parameters
    ----------
    min_cohort : int
        The fewest nodes, itself included, that its vector may be summed with: counted among itself
        and its neighbours, and with a roster among members only. At least 2.
    colluders : int
        How many of its neighbours may work with the server: ``2 t > k + colluders`` must hold.
        Neighbours that are not on the roster count on top.
    identity, roster
        Given together: the node signs its keys, counts only peers on the roster towards
        ``min_cohort``, and unmasks only once enough of them confirm that it counts as a survivor.
    """

    min_cohort: int = 3
    colluders: int = 0
    identity: Identity | None = None
    roster: Roster | None = None

    def __post_init__(self) -> None:
        checks.positive_int(min_cohort=self.min_cohort)
        checks.non_negative_int(colluders=self.colluders)
        if self.min_cohort < 2:
            raise ValueError(f"min_cohort={self.min_cohort!r} must be >= 2: a sum of one is no sum")
        if (self.identity is None) != (self.roster is None):
            raise ValueError("identity and roster must be given together or not at all")
        if self.identity and self.roster and self.identity.public not in self.roster.members:
            raise ValueError("roster must name this node's own identity")


@dataclass(frozen=True)
class Party:
    """Which node this is, in which run."""

    run_id: int
    node_id: int


@dataclass(frozen=True)
class HeldShares:
    """What a peer entrusted to this node."""

    node_id: int
    seed_share: bytes = field(repr=False)
    key_share: bytes = field(repr=False)


@dataclass(frozen=True)
class OpeningKey:
    """Opens what one peer seals for this node."""

    node_id: int
    key: bytes = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class NodeState:
    """What a node keeps between two stages, and deletes with the round.

    Attributes
    ----------
    run_id, node_id, server_round, width, bits, lanes, threshold : int
    terms : bytes
        What the vector is to be made by, as the round began.
    expires : float
        Seconds since the epoch after which the round is over for this node.
    mask_private, seal_private, seed : bytes
        Its secrets; empty once they are of no more use.
    mask_public, seal_public : bytes
        The public keys that it advertised.
    peers : tuple of PeerKeys
        Its neighbours, until it has masked where none signs; ``sharers`` are those whose masks are
        in the masked vector.
    members : tuple of int
        The neighbours on the roster; all neighbours where there is none.
    opening : tuple of OpeningKey
        Until the peers' shares are opened.
    shown, expected : tuple of Token
        With a roster: what the node shows to peers that it has masked with, and what these show.
    held : tuple of HeldShares
    counted_on : int
        How many vectors its own is made to be summed with, itself included; 0: any number.
    survivors : tuple of int
        The peers it signed as survivors.
    """

    run_id: int
    node_id: int
    server_round: int
    width: int
    bits: int
    lanes: int = 1
    terms: bytes = b""
    expires: float
    mask_private: bytes = field(repr=False)
    seal_private: bytes = field(repr=False)
    mask_public: bytes
    seal_public: bytes
    seed: bytes = field(default=b"", repr=False)
    threshold: int = 0
    peers: tuple[PeerKeys, ...] = ()
    members: tuple[int, ...] = ()
    sharers: tuple[int, ...] = ()
    opening: tuple[OpeningKey, ...] = ()
    shown: tuple[Token, ...] = ()
    expected: tuple[Token, ...] = ()
    held: tuple[HeldShares, ...] = ()
    counted_on: int = 0
    survivors: tuple[int, ...] = ()

    @cached_property
    def session(self) -> Session:
        """The round of the run, bound to its terms and to how vectors become words."""
        told = Session(self.run_id, self.server_round, self.terms)
        return told.of_words(self.width, self.bits, self.lanes)
