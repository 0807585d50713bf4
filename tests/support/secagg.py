"""Nodes of the secure aggregation protocol without Flower, as many as a test wants."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from dpfl_flower.secagg import Identity, Roster, SecureSum, Session, node
from dpfl_flower.secagg.messages import Stage
from dpfl_flower.secagg.node_state import NodeRules, NodeState, Party
from dpfl_flower.secagg.round_plan import RoundPlan
from dpfl_flower.secagg.server import Advertising, ServerStage

RUN = 77


def plan(nodes, *, width=3, bits=32, server_round=1, **changes):
    """Return the plan of a round; the majority as threshold."""
    settings = {"threshold": 0.51} | changes
    return RoundPlan(
        session=Session(RUN, server_round), nodes=tuple(nodes), width=width, bits=bits, **settings
    )


def with_rosters(nodes, *, strangers=(), **rules):
    """Return rules for each node that know each other's identity, but not the strangers'."""
    identities = {n: Identity(Ed25519PrivateKey.generate()) for n in nodes}
    roster = Roster(frozenset(identities[n].public for n in nodes if n not in strangers))
    return {
        n: NodeRules()
        if n in strangers
        else NodeRules(identity=identities[n], roster=roster, **rules)
        for n in nodes
    }


@dataclass
class Cast:
    """Nodes with a vector each; they answer one stage after the other.

    Attributes
    ----------
    vectors : mapping of node id to int64 array
    rules : mapping of node id to NodeRules
    states : dict of node id to NodeState
        Between stages. A node that dropped out or refused is in it no more.
    """

    vectors: Mapping[int, np.ndarray]
    rules: Mapping[int, NodeRules] = field(default_factory=dict)
    states: dict[int, NodeState] = field(default_factory=dict)

    def answer(self, node_id, request):
        """Return the state after a request and the reply to it; neither is kept."""
        rules = self.rules.get(node_id, NodeRules())
        if request.stage is Stage.ADVERTISE:
            return node.advertise(request, Party(RUN, node_id), rules, now=0.0)
        state = self.states[node_id]
        if request.stage is Stage.SHARE:
            return node.share_keys(state, request, rules)
        if request.stage is Stage.MASK:
            return node.mask(node.accept_shares(state, request, rules), self.vectors[node_id])
        if request.stage is Stage.ACKNOWLEDGE:
            return node.acknowledge(state, request, rules)
        return state, node.unmask(state, request, rules)

    def answer_all(self, stage: ServerStage, *, but=()):
        """Let every node that is asked answer, but some."""
        replies = {}
        for node_id, request in stage.requests.items():
            if node_id in but or (
                request.stage is not Stage.ADVERTISE and node_id not in self.states
            ):
                self.states.pop(node_id, None)
                continue
            self.states[node_id], replies[node_id] = self.answer(node_id, request)
        return replies

    def run(
        self,
        plan_,
        *,
        dropping: Mapping[int, Stage] | None = None,
        watch: Callable[[ServerStage, dict], None] | None = None,
    ) -> SecureSum:
        """Carry a round out; ``dropping`` says who answers no more from which stage on."""
        stage: ServerStage | SecureSum = Advertising(plan_)
        while isinstance(stage, ServerStage):
            number = next(iter(stage.requests.values())).stage
            gone = {n for n, first in (dropping or {}).items() if first <= number}
            replies = self.answer_all(stage, but=gone)
            if watch is not None:
                watch(stage, replies)
            stage = stage.receive(replies)
        return stage


def vectors(nodes, *, width=3, most=1000, seed=0):
    """Return a vector for each node, of integers within ``most``."""
    rng = np.random.default_rng(seed)
    return {n: rng.integers(-most, most + 1, width, dtype=np.int64) for n in nodes}


def plain_sum(vectors_, survivors):
    """Return what the masked sum must be."""
    return np.sum([vectors_[n] for n in survivors], axis=0)
