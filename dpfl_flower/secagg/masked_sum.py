"""The sum under the masks that are still in it, and what it takes to get them off.

A secret is put together from the shares of ``threshold`` neighbours, and used only if it is the one
that its owner committed to: a wrong share costs the round at worst, and never makes a wrong sum.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from dpfl_flower.secagg.encoding import Words
from dpfl_flower.secagg.errors import RoundAbandoned
from dpfl_flower.secagg.keys import KeyPair, commitment
from dpfl_flower.secagg.messages import PeerKeys
from dpfl_flower.secagg.round_plan import RoundPlan
from dpfl_flower.secagg.secret_joiner import SecretJoiner

__all__ = ["Graph", "MaskedSum"]

Graph = Mapping[int, tuple[int, ...]]
"""The neighbours of each node."""


@dataclass(frozen=True)
class MaskedSum:
    """The sum under the masks that are still in it.

    ``peers`` holds, for each node that shared, the neighbours that did; ``places`` the x of each
    neighbour's share of its secrets.
    """

    plan: RoundPlan
    keys: Mapping[int, PeerKeys]
    peers: Graph
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

    def seed(self, node: int, shares: Mapping[int, bytes], joiner: SecretJoiner) -> bytes:
        """Return a survivor's seed, the one it committed to, given shares by holder."""
        label = self.plan.bound_session.label("commit", node)
        return joiner.join(
            shares,
            self.places[node],
            is_right=lambda seed: commitment(seed, label) == self.commitments[node],
            what="of a survivor's seed do not give what it committed to",
        )

    def key_pair(self, node: int, shares: Mapping[int, bytes], joiner: SecretJoiner) -> KeyPair:
        """Return a dropped node's mask key, the one it advertised, given shares by holder."""
        public = self.keys[node].mask_key
        private = joiner.join(
            shares,
            self.places[node],
            is_right=lambda key: KeyPair(key).public == public,
            what="of a dropped node's key do not give what it advertised",
        )
        return KeyPair(private, public)
