"""The server's side of a round: one immutable object for each stage.

A stage says what to send to whom; given the replies that came, it becomes the next one. A node
whose reply is missing, or no answer to what it was asked, has dropped out. Whatever the replies
are, the outcome is the exact sum of the vectors of the nodes in `SecureSum.survivors`, or
`RoundAbandoned`.

>>> plan = RoundPlan(session=Session(1, 1), nodes=(1, 2, 3, 4), width=2, bits=32)
>>> sorted(Advertising(plan).requests)
[1, 2, 3, 4]
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from dpfl_flower import checks
from dpfl_flower.rng import RandomSource, secure
from dpfl_flower.secagg import shamir
from dpfl_flower.secagg.errors import RoundAbandoned
from dpfl_flower.secagg.graph import neighbour_graph
from dpfl_flower.secagg.keys import KeyPair, commitment, is_usable
from dpfl_flower.secagg.masks import apply_mask
from dpfl_flower.secagg.messages import (
    Acknowledged,
    AcknowledgeRequest,
    Advertised,
    AdvertiseRequest,
    Masked,
    MaskRequest,
    PeerKeys,
    Reply,
    Request,
    Sealed,
    SharedKeys,
    ShareRequest,
    SignedSurvivors,
    Unmasked,
    UnmaskRequest,
)
from dpfl_flower.secagg.modulus import Modulus, Words
from dpfl_flower.secagg.node import pair_key
from dpfl_flower.secagg.session import Session, node_bytes

__all__ = [
    "Acknowledging",
    "Advertising",
    "Masking",
    "RoundPlan",
    "SecureSum",
    "ServerStage",
    "Sharing",
    "Unmasking",
]

R = TypeVar("R", bound=Reply)
_Graph = Mapping[int, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class RoundPlan:
    """The public constants of a round.

    Parameters
    ----------
    session : Session
    nodes : tuple of int
        Who is asked.
    width, bits : int
        Vectors of ``width`` entries are summed mod 2^bits.
    threshold : float
        The share of a node's k neighbours that can put its secrets together: ``t`` is
        ``ceil(threshold * k)``, and at least what ``2 t > k + colluders`` needs.
    neighbours : int or None
        k, even; None: everyone.
    min_cohort : int
        The fewest vectors in a sum.
    colluders : int
        How many neighbours of a node may work with the server.
    rosters : bool
        Whether the nodes have rosters, and so sign who survived.
    seconds : float
        After so long nodes forget the round.
    """

    session: Session
    nodes: tuple[int, ...]
    width: int
    bits: int
    threshold: float = 2 / 3
    neighbours: int | None = None
    min_cohort: int = 3
    colluders: int = 0
    rosters: bool = False
    seconds: float = 3600.0

    def __post_init__(self) -> None:
        checks.positive_int(width=self.width, min_cohort=self.min_cohort)
        checks.fraction(threshold=self.threshold)
        checks.non_negative_int(colluders=self.colluders)
        checks.positive(seconds=self.seconds)
        if self.neighbours is not None:
            checks.positive_int(neighbours=self.neighbours)
            if self.neighbours % 2:
                raise ValueError(f"neighbours={self.neighbours!r} must be even, or None")

    def threshold_of(self, count: int) -> int:
        """Return t for nodes of ``count`` neighbours.

        Raises
        ------
        RoundAbandoned
            If no t <= count fulfils ``2 t > count + colluders``.
        """
        least = (count + self.colluders) // 2 + 1
        threshold = max(math.ceil(self.threshold * count - 1e-9), least)
        if threshold > count:
            raise RoundAbandoned(
                f"{count} neighbours cannot outvote colluders={self.colluders}: "
                f"{threshold} shares would be needed"
            )
        return threshold

    def require(self, nodes: Iterable[int], what: str) -> None:
        """Raise RoundAbandoned unless at least ``min_cohort`` nodes are left."""
        count = len(set(nodes))
        if count < self.min_cohort:
            raise RoundAbandoned(
                f"{count} of {len(self.nodes)} nodes {what}, min_cohort={self.min_cohort} must"
            )


@dataclass(frozen=True)
class SecureSum:
    """What the server learns: the sum, and whose vectors are in it.

    Attributes
    ----------
    total : int64 array, shape (width,)
        In ``[-2^(bits-1), 2^(bits-1))``.
    survivors : tuple of int
    """

    total: NDArray[np.int64]
    survivors: tuple[int, ...]


class ServerStage(ABC):
    """One stage of a round."""

    @property
    @abstractmethod
    def requests(self) -> Mapping[int, Request]:
        """What to send to whom."""

    @abstractmethod
    def receive(self, replies: Mapping[int, Reply]) -> "ServerStage | SecureSum":
        """Return what follows from the replies; nodes that are not in them have dropped out.

        Raises
        ------
        RoundAbandoned
            If too few are left.
        """

    def _of(self, kind: type[R], replies: Mapping[int, Reply]) -> Iterator[tuple[int, R]]:
        """Yield the replies of a kind from nodes that were asked, in the order of their ids."""
        asked = self.requests.keys()
        for node in sorted(replies.keys() & asked):
            reply = replies[node]
            if isinstance(reply, kind):
                yield node, reply


@dataclass(frozen=True)
class Advertising(ServerStage):
    """Waits for public keys. ``rng`` draws the graph; no secret of a node depends on it."""

    plan: RoundPlan
    rng: RandomSource = field(default_factory=secure)

    @property
    def requests(self) -> Mapping[int, Request]:
        """Everyone is asked for keys."""
        plan = self.plan
        request = AdvertiseRequest(
            server_round=plan.session.server_round,
            width=plan.width,
            bits=plan.bits,
            seconds=float(plan.seconds),
        )
        return dict.fromkeys(plan.nodes, request)

    def receive(self, replies: Mapping[int, Reply]) -> "Sharing":
        """Draw the graph over the nodes that have advertised."""
        keys: dict[int, PeerKeys] = {}
        seen: set[bytes] = set()
        for node, reply in self._of(Advertised, replies):
            own = {reply.mask_key, reply.seal_key}
            named = {reply.identity} - {b""}
            # A key that is nobody's would make every neighbour refuse; so would one that is two's.
            if len(own) == 2 and not (own | named) & seen and all(map(is_usable, own)):
                seen |= own | named
                keys[node] = PeerKeys(
                    node_id=node,
                    mask_key=reply.mask_key,
                    seal_key=reply.seal_key,
                    identity=reply.identity,
                    signature=reply.signature,
                )
        self.plan.require(keys, "advertised keys")
        graph = neighbour_graph(list(keys), self.plan.neighbours, self.rng)
        degree = len(next(iter(graph.values())))
        return Sharing(self.plan, keys, graph, self.plan.threshold_of(degree))


@dataclass(frozen=True)
class Sharing(ServerStage):
    """Waits for sealed shares."""

    plan: RoundPlan
    keys: Mapping[int, PeerKeys]
    graph: _Graph
    threshold: int

    @property
    def requests(self) -> Mapping[int, Request]:
        """Each node is told the keys of its neighbours."""
        return {
            node: ShareRequest(
                server_round=self.plan.session.server_round,
                threshold=self.threshold,
                peers=tuple(self.keys[peer] for peer in peers),
            )
            for node, peers in self.graph.items()
        }

    def receive(self, replies: Mapping[int, Reply]) -> "Masking":
        """Keep the nodes of which enough neighbours have shared too."""
        shared: dict[int, SharedKeys] = {}
        for node, reply in self._of(SharedKeys, replies):
            receivers = tuple(item.node_id for item in reply.sealed)
            if receivers == self.graph[node] and len(reply.commitment) == 32:
                shared[node] = reply
        while lonely := {
            node for node in shared if len(self._shared(node, shared)) < self.threshold
        }:
            shared = {node: reply for node, reply in shared.items() if node not in lonely}
        self.plan.require(shared, "shared their keys")
        sealed: dict[int, list[Sealed]] = {node: [] for node in shared}
        for node, reply in shared.items():
            for item in reply.sealed:
                if item.node_id in sealed:
                    sealed[item.node_id].append(Sealed(node_id=node, sealed=item.sealed))
        return Masking(
            self.plan,
            self.keys,
            self.graph,
            self.threshold,
            commitments={node: reply.commitment for node, reply in shared.items()},
            sealed={node: tuple(items) for node, items in sealed.items()},
        )

    def _shared(self, node: int, shared: Mapping[int, SharedKeys]) -> list[int]:
        return [peer for peer in self.graph[node] if peer in shared]


@dataclass(frozen=True)
class Masking(ServerStage):
    """Waits for masked vectors: the stage in which nodes compute."""

    plan: RoundPlan
    keys: Mapping[int, PeerKeys]
    graph: _Graph
    threshold: int
    commitments: Mapping[int, bytes]
    sealed: Mapping[int, tuple[Sealed, ...]]

    @property
    def requests(self) -> Mapping[int, Request]:
        """Each node is sent what its neighbours sealed for it."""
        server_round = self.plan.session.server_round
        return {
            node: MaskRequest(server_round=server_round, sealed=items)
            for node, items in self.sealed.items()
        }

    def receive(self, replies: Mapping[int, Reply]) -> "Acknowledging | Unmasking":
        """Add up the masked vectors."""
        modulus = Modulus(self.plan.bits)
        total = modulus.zeros(self.plan.width)
        survivors = []
        for node, reply in self._of(Masked, replies):
            try:
                modulus.add_packed(total, reply.vector)
            except ValueError:
                continue
            survivors.append(node)
        self.plan.require(survivors, "sent a masked vector")
        masked = _MaskedSum(
            self.plan,
            self.keys,
            {node: self._sharing_peers(node) for node in self.sealed},
            {node: {p: x for x, p in enumerate(peers, 1)} for node, peers in self.graph.items()},
            self.threshold,
            self.commitments,
            total,
            tuple(survivors),
        )
        masked.require_holders(survivors)
        return Acknowledging(masked) if self.plan.rosters else Unmasking(masked, {})

    def _sharing_peers(self, node: int) -> tuple[int, ...]:
        return tuple(peer for peer in self.graph[node] if peer in self.sealed)


@dataclass(frozen=True)
class _MaskedSum:
    """The sum under the masks that are still in it.

    ``peers`` holds, for each node that shared, the neighbours that did; ``places`` the x of each
    neighbour's share of its secrets.
    """

    plan: RoundPlan
    keys: Mapping[int, PeerKeys]
    peers: _Graph
    places: Mapping[int, Mapping[int, int]]
    threshold: int
    commitments: Mapping[int, bytes]
    total: Words = field(repr=False)
    survivors: tuple[int, ...]

    @property
    def dropped(self) -> tuple[int, ...]:
        """The nodes whose masks are in the sum though their vectors are not."""
        survivors = set(self.survivors)
        return tuple(
            node
            for node, peers in self.peers.items()
            if node not in survivors and survivors.intersection(peers)
        )

    def require_holders(self, answering: Iterable[int]) -> None:
        """Raise RoundAbandoned unless every secret that is needed can be put together."""
        there = set(answering)
        for node in (*self.survivors, *self.dropped):
            holders = len(there.intersection(self.peers[node]))
            if holders < self.threshold:
                raise RoundAbandoned(
                    f"{holders} neighbours of a node are left to unmask it, threshold="
                    f"{self.threshold} must be"
                )

    def surviving_peers(self, node: int) -> tuple[int, ...]:
        """Return the neighbours of ``node`` that sent a masked vector."""
        survivors = set(self.survivors)
        return tuple(peer for peer in self.peers[node] if peer in survivors)

    def dropped_peers(self, node: int) -> tuple[int, ...]:
        """Return the neighbours of ``node`` that shared and sent no masked vector."""
        survivors = set(self.survivors)
        return tuple(peer for peer in self.peers[node] if peer not in survivors)

    def seed(self, node: int, shares: Mapping[int, bytes]) -> bytes:
        """Return a survivor's seed, the one it committed to."""
        label = self.plan.session.label("commit", node)
        for candidate in self._candidates(shares):
            if commitment(candidate, label) == self.commitments[node]:
                return candidate
        raise RoundAbandoned("the shares of a survivor's seed do not give what it committed to")

    def key_pair(self, node: int, shares: Mapping[int, bytes]) -> KeyPair:
        """Return a dropped node's mask key, the one it advertised."""
        for candidate in self._candidates(shares):
            pair = KeyPair(candidate)
            if pair.public == self.keys[node].mask_key:
                return pair
        raise RoundAbandoned("the shares of a dropped node's key do not give what it advertised")

    def _candidates(self, shares: Mapping[int, bytes]) -> Iterator[bytes]:
        """Yield what ``threshold`` of the shares give, in turn, so that a wrong one is got past."""
        places = sorted(shares)
        if len(places) < self.threshold:
            raise RoundAbandoned(
                f"{len(places)} shares of a secret came, threshold={self.threshold} must"
            )
        turns = len(places) if len(places) > self.threshold else 1
        for turn in range(turns):
            chosen = (places[turn:] + places[:turn])[: self.threshold]
            try:
                yield shamir.combine({x: shares[x] for x in chosen})
            except ValueError:
                continue


@dataclass(frozen=True)
class Acknowledging(ServerStage):
    """Waits for signatures under the lists of survivors; only where nodes have rosters."""

    masked: _MaskedSum

    @property
    def plan(self) -> RoundPlan:
        """The round's constants."""
        return self.masked.plan

    @property
    def requests(self) -> Mapping[int, Request]:
        """Each survivor is told which of its neighbours survived."""
        server_round = self.plan.session.server_round
        return {
            node: AcknowledgeRequest(
                server_round=server_round, survivors=self.masked.surviving_peers(node)
            )
            for node in self.masked.survivors
        }

    def receive(self, replies: Mapping[int, Reply]) -> "Unmasking":
        """Keep the signatures for the nodes that wait for them."""
        signed = {
            node: SignedSurvivors(
                node_id=node,
                survivors=b"".join(map(node_bytes, self.masked.surviving_peers(node))),
                signature=reply.signature,
            )
            for node, reply in self._of(Acknowledged, replies)
            if len(reply.signature) == 64
        }
        self.masked.require_holders(signed)
        return Unmasking(self.masked, signed)


@dataclass(frozen=True)
class Unmasking(ServerStage):
    """Waits for the shares that take the masks off the sum."""

    masked: _MaskedSum
    signed: Mapping[int, SignedSurvivors]

    @property
    def plan(self) -> RoundPlan:
        """The round's constants."""
        return self.masked.plan

    @property
    def requests(self) -> Mapping[int, Request]:
        """Each survivor, once it has signed, is told who survived and who dropped out."""
        masked, server_round = self.masked, self.plan.session.server_round
        asked = [node for node in masked.survivors if node in self.signed or not self.plan.rosters]
        return {
            node: UnmaskRequest(
                server_round=server_round,
                survivors=masked.surviving_peers(node),
                dropped=masked.dropped_peers(node),
                acknowledgements=tuple(
                    self.signed[peer]
                    for peer in masked.surviving_peers(node)
                    if peer in self.signed
                ),
            )
            for node in asked
        }

    def receive(self, replies: Mapping[int, Reply]) -> SecureSum:
        """Put the secrets together, check each, and take the masks off."""
        masked, plan = self.masked, self.plan
        shares: dict[int, dict[int, bytes]] = {}
        survivors = set(masked.survivors)
        for holder, reply in self._of(Unmasked, replies):
            seeds = [item for item in reply.seed_shares if item.node_id in survivors]
            keys = [item for item in reply.key_shares if item.node_id not in survivors]
            for item in (*seeds, *keys):
                place = masked.places.get(item.node_id, {}).get(holder)
                if place is not None and len(item.share) == shamir.SHARE_BYTES:
                    shares.setdefault(item.node_id, {})[place] = item.share
        # Every secret first: most of the work is not begun on a round that has to be abandoned.
        own_keys = {node: masked.seed(node, shares.get(node, {})) for node in masked.survivors}
        pairs = {node: masked.key_pair(node, shares.get(node, {})) for node in masked.dropped}
        modulus = Modulus(plan.bits)
        total = masked.total.copy()
        for key in own_keys.values():
            apply_mask(total, key, modulus, subtract=True)
        for node, pair in pairs.items():
            for peer in masked.surviving_peers(node):
                key = pair_key(pair, masked.keys[peer].mask_key, plan.session, node, peer)
                # The survivor added it where its own id is the larger one.
                apply_mask(total, key, modulus, subtract=peer > node)
        return SecureSum(modulus.signed(total), masked.survivors)
