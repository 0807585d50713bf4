"""A node's side of a round, as pure functions from state and request to state and reply.

A node trusts neither the server nor, without a roster, that its peers exist. What it checks itself
is in `NodeRules` and in the errors named here; what that is worth is in docs/threat-model.md.

>>> from dpfl_flower.secagg.messages import AdvertiseRequest
>>> request = AdvertiseRequest(server_round=1, width=4, bits=32, seconds=60.0)
>>> state, reply = advertise(request, Party(run_id=5, node_id=42), NodeRules(), now=0.0)
>>> len(reply.mask_key), state.expires
(32, 60.0)
"""

import dataclasses
import hmac
from typing import Final

import numpy as np

from dpfl_flower.rng import RandomSource, secure
from dpfl_flower.secagg import shamir
from dpfl_flower.secagg.encoding import Integers
from dpfl_flower.secagg.errors import Refusal, Refused
from dpfl_flower.secagg.keys import KeyPair, commitment
from dpfl_flower.secagg.lanes import encoding_of
from dpfl_flower.secagg.masks import apply_masks
from dpfl_flower.secagg.messages import (
    Acknowledged,
    AcknowledgeRequest,
    Advertised,
    AdvertiseRequest,
    Masked,
    MaskRequest,
    PeerKeys,
    Sealed,
    Share,
    SharedKeys,
    ShareRequest,
    Token,
    Unmasked,
    UnmaskRequest,
)
from dpfl_flower.secagg.node_checks import (
    check_cohort,
    check_confirmed,
    check_keys,
    check_named,
    check_survivors,
    joined_ids,
    roster_members,
    those,
)
from dpfl_flower.secagg.node_state import HeldShares, NodeRules, NodeState, OpeningKey, Party
from dpfl_flower.secagg.sealing import seal, unseal
from dpfl_flower.secagg.session import LONGEST_SECONDS
from dpfl_flower.secagg.statements import keys_statement, survivors_statement

__all__ = [
    "NodeRules",
    "NodeState",
    "Party",
    "accept_shares",
    "acknowledge",
    "advertise",
    "count_on",
    "mask",
    "share_keys",
    "unmask",
]

_KEY: Final = 32  # bytes
_MOST_PEERS: Final = 4096  # what a node does for them grows with their square


def advertise(
    request: AdvertiseRequest,
    party: Party,
    rules: NodeRules,
    *,
    now: float,
    rng: RandomSource | None = None,
) -> tuple[NodeState, Advertised]:
    """Make fresh keys for a round and return them, signed with the node's identity if it has one.

    Parameters
    ----------
    now : float
        Seconds since the epoch.
    rng : RandomSource, optional
        `dpfl_flower.rng.secure` by default.

    Raises
    ------
    Refused
        MALFORMED.
    """
    rng = rng or secure()
    if request.server_round < 1 or request.width < 1:
        raise Refused(Refusal.MALFORMED, f"{request!r} must have positive round and width")
    if not 0 < request.seconds <= LONGEST_SECONDS:
        raise Refused(Refusal.MALFORMED, f"{request!r} has seconds out of range")
    try:
        encoding_of(request.bits, request.lanes)
    except ValueError as error:
        raise Refused(Refusal.MALFORMED, str(error)) from error
    masking, sealing = KeyPair.generate(rng), KeyPair.generate(rng)
    state = NodeState(
        run_id=party.run_id,
        node_id=party.node_id,
        server_round=request.server_round,
        width=request.width,
        bits=request.bits,
        lanes=request.lanes,
        terms=request.terms,
        expires=now + request.seconds,
        mask_private=masking.private,
        seal_private=sealing.private,
        mask_public=masking.public,
        seal_public=sealing.public,
    )
    identity, signature = b"", b""
    if rules.identity is not None:
        identity = rules.identity.public
        signature = rules.identity.sign(
            keys_statement(state.session, party.node_id, masking.public, sealing.public)
        )
    reply = Advertised(
        mask_key=masking.public, seal_key=sealing.public, identity=identity, signature=signature
    )
    return state, reply


def share_keys(
    state: NodeState, request: ShareRequest, rules: NodeRules, *, rng: RandomSource | None = None
) -> tuple[NodeState, SharedKeys]:
    """Check the neighbours, then share seed and mask key among them.

    Raises
    ------
    Refused
        MALFORMED, PEER_KEY_CHANGED, TOO_FEW_NODES, THRESHOLD_TOO_LOW.
    """
    rng = rng or secure()
    if len(request.peers) > _MOST_PEERS:
        raise Refused(
            Refusal.MALFORMED,
            f"{len(request.peers)} neighbours must be <= {_MOST_PEERS}: SecAggPlus(neighbours=...) "
            "at the server keeps them few however many nodes there are",
        )
    peers = tuple(sorted(request.peers, key=lambda peer: peer.node_id))
    check_keys(state, peers)
    members = roster_members(state, peers, rules)
    check_cohort(rules, members)
    threshold, count = request.threshold, len(peers)
    strangers = count - len(members)
    if threshold > count:
        raise Refused(Refusal.MALFORMED, f"threshold={threshold} must be <= {count} neighbours")
    if not 2 * threshold > count + strangers + rules.colluders:
        raise Refused(
            Refusal.THRESHOLD_TOO_LOW,
            f"threshold={threshold}: its double must be > {count} neighbours + {strangers} not on "
            f"the roster + {rules.colluders} colluders",
        )
    sealing = KeyPair(state.seal_private, state.seal_public)
    seed = rng.random_bytes(shamir.SECRET_BYTES)
    seed_shares = shamir.split(seed, threshold=threshold, count=count, rng=rng)
    key_shares = shamir.split(state.mask_private, threshold=threshold, count=count, rng=rng)
    sealed, opening, shown, expected = [], [], [], []
    no_roster = rules.roster is None
    for peer, seed_share, key_share in zip(peers, seed_shares, key_shares, strict=True):
        pair = state.session.pair_label("seal", state.node_id, peer.node_id)
        keys = _agree(sealing, peer.seal_key, pair, length=2 * _KEY if no_roster else 4 * _KEY)
        # Each direction, the one from the smaller id first, has a key to seal with; and a token to
        # prove later that this pair's mask is in a vector, which only a roster gives a meaning.
        out, into = (0, _KEY) if state.node_id < peer.node_id else (_KEY, 0)
        label = state.session.label("seal", state.node_id, peer.node_id)
        plain = seed_share + key_share
        sealed.append(
            Sealed(node_id=peer.node_id, sealed=seal(keys[out:][:_KEY], plain, label, rng))
        )
        opening.append(OpeningKey(node_id=peer.node_id, key=keys[into:][:_KEY]))
        if not no_roster:
            tokens = keys[2 * _KEY :]
            shown.append(Token(node_id=peer.node_id, token=tokens[out:][:_KEY]))
            expected.append(Token(node_id=peer.node_id, token=tokens[into:][:_KEY]))
    shared = dataclasses.replace(
        state,
        seed=seed,
        threshold=threshold,
        peers=peers,
        members=members,
        opening=tuple(opening),
        shown=tuple(shown),
        expected=tuple(expected),
        seal_private=b"",
    )
    seal_of_seed = commitment(seed, state.session.label("commit", state.node_id))
    return shared, SharedKeys(commitment=seal_of_seed, sealed=tuple(sealed))


def accept_shares(state: NodeState, request: MaskRequest, rules: NodeRules) -> NodeState:
    """Open what the peers sealed and fix with whom to mask; before anything is computed.

    A share that does not open is left out: it is missed only if too few others are left.

    Raises
    ------
    Refused
        MALFORMED, TOO_FEW_NODES.
    """
    keys = {item.node_id: item.key for item in state.opening}
    held = []
    senders = tuple(sorted(item.node_id for item in request.sealed))
    check_named(senders, keys)
    for item in request.sealed:
        label = state.session.label("seal", item.node_id, state.node_id)
        try:
            plain = unseal(keys[item.node_id], item.sealed, label)
        except ValueError:
            continue
        if len(plain) == 2 * shamir.SHARE_BYTES:
            seed_share, key_share = plain[: shamir.SHARE_BYTES], plain[shamir.SHARE_BYTES :]
            held.append(
                HeldShares(node_id=item.node_id, seed_share=seed_share, key_share=key_share)
            )
    if len(senders) < state.threshold:
        raise Refused(
            Refusal.TOO_FEW_NODES,
            f"{len(senders)} peers shared, threshold={state.threshold} must be there",
        )
    check_cohort(rules, those(senders, state.members))
    return dataclasses.replace(state, sharers=senders, held=tuple(held), opening=())


def count_on(state: NodeState, nodes: int, rules: NodeRules) -> NodeState:
    """Let no vector of this round be unmasked in a sum of fewer than so many, this one included.

    Raises
    ------
    Refused
        TOO_FEW_NODES where there are fewer already. With a roster only its members count.
    """
    check_cohort(rules, those(state.sharers, state.members), counted_on=nodes)
    return dataclasses.replace(state, counted_on=nodes)


def mask(state: NodeState, vector: Integers) -> tuple[NodeState, Masked]:
    """Return the vector under its own mask and one with each peer, packed.

    Parameters
    ----------
    state : NodeState
        As `accept_shares` left it.
    vector : int32 or int64 array, shape (width,)

    Raises
    ------
    ValueError
        If the vector is of another type or shape.
    """
    if vector.dtype not in (np.int32, np.int64) or vector.shape != (state.width,):
        raise ValueError(
            f"vector={vector.dtype}{list(vector.shape)} must be int32 or int64[{state.width}]"
        )
    encoding = encoding_of(state.bits, state.lanes)
    words = encoding.words(vector)
    masking = KeyPair(state.mask_private, state.mask_public)
    public = {peer.node_id: peer.mask_key for peer in state.peers}
    add, subtract = [state.seed], list[bytes]()
    for peer in state.sharers:
        label = state.session.pair_label("mask", state.node_id, peer)
        (subtract if state.node_id < peer else add).append(_agree(masking, public[peer], label))
    apply_masks(words, add=add, subtract=subtract)
    kept = dataclasses.replace(
        state, seed=b"", mask_private=b"", peers=_without_keys(state), shown=()
    )
    tokens = tuple(item for item in state.shown if item.node_id in state.sharers)
    return kept, Masked(vector=encoding.pack(words), tokens=tokens)


def acknowledge(
    state: NodeState, request: AcknowledgeRequest, rules: NodeRules
) -> tuple[NodeState, Acknowledged]:
    """Sign which peers survived; the node unmasks nothing else.

    Raises
    ------
    Refused
        MALFORMED, TOO_FEW_NODES, UNCONFIRMED where a peer does not prove that the mask it shares
        with this node is in its vector, or this node has no identity to sign with.
    """
    survivors = tuple(sorted(item.node_id for item in request.survivors))
    check_survivors(state, survivors, rules)
    if rules.identity is None:
        raise Refused(Refusal.UNCONFIRMED, "this node has no identity to sign with")
    expected = {item.node_id: item.token for item in state.expected}
    for item in request.survivors:
        known = expected.get(item.node_id)
        if known is None or not hmac.compare_digest(item.token, known):
            raise Refused(
                Refusal.UNCONFIRMED,
                f"node {item.node_id} does not prove that it masked its vector with this node",
            )
    statement = survivors_statement(state.session, state.node_id, joined_ids(survivors))
    signed = dataclasses.replace(state, survivors=survivors)
    return signed, Acknowledged(signature=rules.identity.sign(statement))


def unmask(state: NodeState, request: UnmaskRequest, rules: NodeRules) -> Unmasked:
    """Hand out one share for each peer that masked: of a survivor's seed or a dropped one's key.

    Never both of one peer, and never for a second request: the caller deletes the state first.

    Raises
    ------
    Refused
        MALFORMED, TOO_FEW_NODES, SURVIVOR_AND_DROPPED, UNCONFIRMED.
    """
    survivors, dropped = tuple(sorted(request.survivors)), tuple(sorted(request.dropped))
    if both := sorted({*survivors} & {*dropped}):
        raise Refused(Refusal.SURVIVOR_AND_DROPPED, f"peers {both} are named as both")
    check_named(dropped, state.sharers)
    check_survivors(state, survivors, rules)
    if {*survivors} | {*dropped} != {*state.sharers}:
        raise Refused(Refusal.MALFORMED, "each peer that shared must be a survivor or dropped")
    if rules.roster is not None:
        if not state.survivors:
            raise Refused(Refusal.UNCONFIRMED, "this node was not asked who survived")
        if survivors != state.survivors:
            raise Refused(
                Refusal.SURVIVOR_AND_DROPPED, "the survivors are not those that this node signed"
            )
        check_confirmed(state, request.acknowledgements, rules.roster)
    held = {item.node_id: item for item in state.held}
    return Unmasked(
        seed_shares=tuple(
            Share(node_id=peer, share=held[peer].seed_share) for peer in survivors if peer in held
        ),
        key_shares=tuple(
            Share(node_id=peer, share=held[peer].key_share) for peer in dropped if peer in held
        ),
    )


def _agree(own: KeyPair, public: bytes, label: bytes, *, length: int = _KEY) -> bytes:
    try:
        return own.agree(public, label, length=length)
    except ValueError as error:
        raise Refused(Refusal.MALFORMED, "a peer's key is no usable X25519 key") from error


def _without_keys(state: NodeState) -> tuple[PeerKeys, ...]:
    """Return who the peers are, without the keys that are of no more use; none if none signs."""
    if not any(peer.identity for peer in state.peers):
        return ()
    return tuple(
        PeerKeys(node_id=peer.node_id, mask_key=b"", seal_key=b"", identity=peer.identity)
        for peer in state.peers
    )
