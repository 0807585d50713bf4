"""What a node checks before it goes on with a round.

>>> check_cohort(NodeRules(min_cohort=3), members=(1,))
Traceback (most recent call last):
    ...
dpfl_flower.secagg.errors.Refused: too-few-nodes: 2 nodes with this one, this node's own \
secagg-min-cohort=3 must be there
"""

from collections.abc import Collection, Iterable

from dpfl_flower import records
from dpfl_flower.secagg.errors import Refusal, Refused
from dpfl_flower.secagg.messages import PeerKeys, SignedSurvivors
from dpfl_flower.secagg.node_state import NodeRules, NodeState
from dpfl_flower.secagg.roster import Roster
from dpfl_flower.secagg.session import node_bytes
from dpfl_flower.secagg.statements import keys_statement, survivors_statement


def check_keys(state: NodeState, peers: Iterable[PeerKeys]) -> None:
    """Refuse a peer that is named twice, or has a key that is another's, or this node's own."""
    seen_ids, seen_keys = {state.node_id}, {state.mask_public, state.seal_public}
    identities: set[bytes] = set()
    for peer in peers:
        if peer.node_id in seen_ids:
            raise Refused(Refusal.PEER_KEY_CHANGED, f"node {peer.node_id} is named twice")
        keys = {peer.mask_key, peer.seal_key}
        if len(keys) != 2 or keys & seen_keys or (peer.identity and peer.identity in identities):
            raise Refused(Refusal.PEER_KEY_CHANGED, f"node {peer.node_id} shares another's key")
        seen_ids.add(peer.node_id)
        seen_keys |= keys
        identities.add(peer.identity)


def roster_members(
    state: NodeState, peers: Iterable[PeerKeys], rules: NodeRules
) -> tuple[int, ...]:
    """Return the peers whose keys a member of the roster signed; without a roster, all."""
    if rules.roster is None or rules.identity is None:
        return tuple(peer.node_id for peer in peers)
    return tuple(
        peer.node_id
        for peer in peers
        if peer.identity != rules.identity.public
        and rules.roster.vouches(
            peer.identity,
            peer.signature,
            keys_statement(state.session, peer.node_id, peer.mask_key, peer.seal_key),
        )
    )


def check_cohort(rules: NodeRules, members: Collection[int], *, counted_on: int = 0) -> None:
    """Refuse fewer nodes than ``min_cohort``, or than are counted on, this one included."""
    there = 1 + len(members)
    own = f"this node's own {records.SECAGG_MIN_COHORT}"
    for name, least in ((own, rules.min_cohort), ("the plan's survivors", counted_on)):
        if there < least:
            raise Refused(
                Refusal.TOO_FEW_NODES,
                f"{there} nodes with this one, {name}={least} must be there",
            )


def check_named(named: tuple[int, ...], known: Collection[int]) -> None:
    """Refuse a list that names a node twice, or one that is not ``known``."""
    if len(set(named)) != len(named) or not set(named) <= set(known):
        raise Refused(Refusal.MALFORMED, "a node is named twice, or is no neighbour")


def check_survivors(state: NodeState, survivors: tuple[int, ...], rules: NodeRules) -> None:
    """Refuse survivors that are no sharers, too few to unmask, or too few to hide among."""
    check_named(survivors, state.sharers)
    if len(survivors) < state.threshold:
        raise Refused(
            Refusal.TOO_FEW_NODES,
            f"{len(survivors)} peers survive, threshold={state.threshold} must be there",
        )
    check_cohort(rules, those(survivors, state.members), counted_on=state.counted_on)


def check_confirmed(
    state: NodeState, acknowledgements: tuple[SignedSurvivors, ...], roster: Roster
) -> None:
    """Require ``threshold`` members that signed a list of survivors with this node on it."""
    identities = {peer.node_id: peer.identity for peer in state.peers}  # none if none signs
    own = node_bytes(state.node_id)
    confirming = set()
    for item in acknowledgements:
        if item.node_id not in state.survivors or item.node_id not in state.members:
            continue
        listed = {item.survivors[i : i + 8] for i in range(0, len(item.survivors), 8)}
        statement = survivors_statement(state.session, item.node_id, item.survivors)
        identity = identities.get(item.node_id, b"")
        if own in listed and roster.vouches(identity, item.signature, statement):
            confirming.add(item.node_id)
    if len(confirming) < state.threshold:
        raise Refused(
            Refusal.UNCONFIRMED,
            f"{len(confirming)} peers on the roster confirm that this node survived, "
            f"threshold={state.threshold} must",
        )


def certain_vectors(state: NodeState) -> int:
    """Return how many vectors are in any sum with this node's, its own and colluders' included.

    Only with a roster, and whatever the server says: whoever puts the seed together has shares of
    ``threshold`` neighbours, and the vectors of those that are on the roster are in the same sum
    (docs/threat-model.md). The server makes up all others.
    """
    strangers = len(state.peers) - len(state.members)
    return 1 + max(0, state.threshold - strangers)


def those(nodes: tuple[int, ...], members: tuple[int, ...]) -> tuple[int, ...]:
    """Return the ``nodes`` that are ``members``, in order."""
    return tuple(node for node in nodes if node in members)


def joined_ids(nodes: tuple[int, ...]) -> bytes:
    """Return the ids as bytes."""
    return b"".join(map(node_bytes, nodes))
