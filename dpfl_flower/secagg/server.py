"""The server's side of a round: one immutable object for each stage.

A stage says what to send to whom; given the replies that came, it becomes the next one. A node
whose reply is missing, or no answer to what it was asked, has dropped out. Whatever the replies
are, the outcome is the exact sum of the vectors of the nodes in `SecureSum.survivors`, or
`RoundAbandoned`.

>>> from dpfl_flower.secagg.session import Session
>>> plan = RoundPlan(session=Session(1, 1), nodes=(1, 2, 3, 4), width=2, bits=32)
>>> sorted(Advertising(plan).requests)
[1, 2, 3, 4]
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from dpfl_flower.rng import RandomSource, secure
from dpfl_flower.secagg import shamir
from dpfl_flower.secagg.errors import RoundAbandoned
from dpfl_flower.secagg.graph import neighbour_graph
from dpfl_flower.secagg.keys import is_usable
from dpfl_flower.secagg.masked_sum import Graph, MaskedSum
from dpfl_flower.secagg.masks import apply_masks
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
    Token,
    Unmasked,
    UnmaskRequest,
)
from dpfl_flower.secagg.round_plan import RoundPlan, SecureSum
from dpfl_flower.secagg.secret_joiner import SecretJoiner
from dpfl_flower.secagg.session import node_bytes
from dpfl_flower.secagg.statements import is_signed, keys_statement

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
            lanes=plan.lanes,
            seconds=float(plan.seconds),
            terms=plan.session.terms,
        )
        return dict.fromkeys(plan.nodes, request)

    def receive(self, replies: Mapping[int, Reply]) -> "Sharing":
        """Draw the graph over the nodes that have advertised."""
        keys: dict[int, PeerKeys] = {}
        seen: set[bytes] = set()
        for node, reply in self._of(Advertised, replies):
            own = {reply.mask_key, reply.seal_key}
            named = {reply.identity} - {b""}
            if named and not self._signed(node, reply):
                continue  # or whoever names another's identity would have it taken for the second
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
        # Of nobody at all the likeliest cause is an app that has never heard of the protocol.
        hint = "" if keys else ": do the apps have mods=[secure_aggregation_mod]?"
        self.plan.require(keys, "advertised keys", hint)
        graph = neighbour_graph(list(keys), self.plan.neighbours, self.rng)
        degree = len(next(iter(graph.values())))
        return Sharing(self.plan, keys, graph, self.plan.threshold_of(degree))

    def _signed(self, node: int, reply: Advertised) -> bool:
        statement = keys_statement(self.plan.bound_session, node, reply.mask_key, reply.seal_key)
        return is_signed(reply.identity, reply.signature, statement)


@dataclass(frozen=True)
class Sharing(ServerStage):
    """Waits for sealed shares."""

    plan: RoundPlan
    keys: Mapping[int, PeerKeys]
    graph: Graph
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
    graph: Graph
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
        encoding = self.plan.encoding
        total = encoding.zeros(self.plan.width)
        survivors = []
        tokens: dict[int, dict[int, bytes]] = {}
        for node, reply in self._of(Masked, replies):
            shown = {item.node_id: item.token for item in reply.tokens}
            if self.plan.rosters and shown.keys() != set(self._sharing_peers(node)):
                continue
            try:
                encoding.add_packed(total, reply.vector)
            except ValueError:
                continue
            survivors.append(node)
            tokens[node] = shown
        self.plan.require(survivors, "sent a masked vector")
        masked = MaskedSum(
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
        return Acknowledging(masked, tokens) if self.plan.rosters else Unmasking(masked, {})

    def _sharing_peers(self, node: int) -> tuple[int, ...]:
        return tuple(peer for peer in self.graph[node] if peer in self.sealed)


@dataclass(frozen=True)
class Acknowledging(ServerStage):
    """Waits for signatures under the lists of survivors; only where nodes have rosters.

    ``tokens`` holds what each survivor shows to its peers.
    """

    masked: MaskedSum
    tokens: Mapping[int, Mapping[int, bytes]]

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
                server_round=server_round,
                survivors=tuple(
                    Token(node_id=peer, token=self.tokens[peer][node])
                    for peer in self.masked.surviving_peers(node)
                ),
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

    masked: MaskedSum
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
        joiner = SecretJoiner(masked.threshold)
        survivors = set(masked.survivors)
        for holder, reply in self._of(Unmasked, replies):
            seeds = [item for item in reply.seed_shares if item.node_id in survivors]
            keys = [item for item in reply.key_shares if item.node_id not in survivors]
            for item in (*seeds, *keys):
                holds = holder in masked.places.get(item.node_id, {})
                if holds and len(item.share) == shamir.SHARE_BYTES:
                    shares.setdefault(item.node_id, {})[holder] = item.share
        # Every secret first: most of the work is not begun on a round that has to be abandoned.
        own_keys = {n: masked.seed(n, shares.get(n, {}), joiner) for n in masked.survivors}
        pairs = {n: masked.key_pair(n, shares.get(n, {}), joiner) for n in masked.dropped}
        total = masked.total.copy()
        add: list[bytes] = []
        subtract = list(own_keys.values())
        for node, pair in pairs.items():
            for peer in masked.surviving_peers(node):
                label = plan.bound_session.pair_label("mask", node, peer)
                # The survivor added it where its own id is the larger one.
                (subtract if peer > node else add).append(
                    pair.agree(masked.keys[peer].mask_key, label)
                )
        apply_masks(total, add=add, subtract=subtract)
        signed = plan.encoding.signed(total)[: plan.width]
        if plan.largest is not None:
            # A node that masks with another key than it advertised leaves a mask in the sum.
            most = plan.largest * len(masked.survivors)
            if signed.min() < -most or signed.max() > most:
                raise RoundAbandoned("the sum is larger than its vectors can give: a mask is left")
        return SecureSum(signed, masked.survivors)
