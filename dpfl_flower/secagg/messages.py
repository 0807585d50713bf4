"""What server and nodes say to each other, stage by stage.

Bonawitz et al., "Practical secure aggregation for privacy-preserving machine learning" (CCS 2017),
figure 4, on the graph of Bell et al. (CCS 2020): keys, shares, masked vectors, unmasking; and
between the last two, for nodes with a roster, what each counts as survivors (Bell et al., the
malicious setting).

>>> AdvertiseRequest(server_round=1, width=10, bits=32, seconds=60.0).stage
<Stage.ADVERTISE: 1>
"""

from dataclasses import dataclass, field
from enum import IntEnum
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "AcknowledgeRequest",
    "Acknowledged",
    "AdvertiseRequest",
    "Advertised",
    "MaskRequest",
    "Masked",
    "PeerKeys",
    "Reply",
    "Request",
    "Sealed",
    "Share",
    "ShareRequest",
    "SharedKeys",
    "SignedSurvivors",
    "Stage",
    "Token",
    "UnmaskRequest",
    "Unmasked",
]


class Stage(IntEnum):
    """The stages of a round, in order."""

    ADVERTISE = 1
    SHARE = 2
    MASK = 3
    ACKNOWLEDGE = 4
    UNMASK = 5


@dataclass(frozen=True, kw_only=True)
class AdvertiseRequest:
    """Begin a round: make keys.

    Attributes
    ----------
    server_round : int
    width, bits : int
        The vector to come has ``width`` entries and is summed mod 2^bits.
    lanes : int
        Entries that are packed together under a mask; see `encoding_of`.
    seconds : float
        After so long a node forgets the round.
    terms : bytes
        A digest of what the vector will be made by; see `terms_of`.
    """

    stage: ClassVar[Stage] = Stage.ADVERTISE
    server_round: int
    width: int
    bits: int
    lanes: int = 1
    seconds: float
    terms: bytes = b""


@dataclass(frozen=True, kw_only=True)
class Advertised:
    """A node's public keys for the round, signed where it has an identity (else two times b"")."""

    stage: ClassVar[Stage] = Stage.ADVERTISE
    mask_key: bytes
    seal_key: bytes
    identity: bytes = b""
    signature: bytes = b""


@dataclass(frozen=True)
class PeerKeys:
    """What a neighbour advertised."""

    node_id: int
    mask_key: bytes
    seal_key: bytes
    identity: bytes = b""
    signature: bytes = b""


@dataclass(frozen=True, kw_only=True)
class ShareRequest:
    """Share your secrets among these peers, so that ``threshold`` of them can put one together."""

    stage: ClassVar[Stage] = Stage.SHARE
    server_round: int
    threshold: int
    peers: tuple[PeerKeys, ...]


@dataclass(frozen=True)
class Sealed:
    """A pair of shares that only one node can open; ``node_id`` is the other end."""

    node_id: int
    sealed: bytes


@dataclass(frozen=True, kw_only=True)
class SharedKeys:
    """A node's sealed shares, one pair for each peer, and the commitment to its seed."""

    stage: ClassVar[Stage] = Stage.SHARE
    commitment: bytes
    sealed: tuple[Sealed, ...]


@dataclass(frozen=True)
class Token:
    """What only two nodes know: shown by one of them once it has masked with ``node_id``."""

    node_id: int
    token: bytes = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class MaskRequest:
    """Mask your vector: these are the peers that shared, and what they sealed for you."""

    stage: ClassVar[Stage] = Stage.MASK
    server_round: int
    sealed: tuple[Sealed, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Masked:
    """A masked vector as `Encoding.pack` packs it.

    ``tokens``, of a node with a roster, prove to each peer that the mask they share is in it.
    """

    stage: ClassVar[Stage] = Stage.MASK
    vector: NDArray[np.uint8] = field(repr=False)
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True, kw_only=True)
class AcknowledgeRequest:
    """Sign that these of your peers sent a vector masked with you: the tokens prove it."""

    stage: ClassVar[Stage] = Stage.ACKNOWLEDGE
    server_round: int
    survivors: tuple[Token, ...]


@dataclass(frozen=True, kw_only=True)
class Acknowledged:
    """The signature of a node under the list of its surviving peers."""

    stage: ClassVar[Stage] = Stage.ACKNOWLEDGE
    signature: bytes


@dataclass(frozen=True)
class SignedSurvivors:
    """What a peer signed: ``survivors`` are ids of 8 bytes each, ascending."""

    node_id: int
    survivors: bytes
    signature: bytes


@dataclass(frozen=True, kw_only=True)
class UnmaskRequest:
    """Hand out your share of each survivor's seed and of each dropped peer's mask key.

    ``acknowledgements`` is empty where there is no roster.
    """

    stage: ClassVar[Stage] = Stage.UNMASK
    server_round: int
    survivors: tuple[int, ...]
    dropped: tuple[int, ...]
    acknowledgements: tuple[SignedSurvivors, ...] = ()


@dataclass(frozen=True)
class Share:
    """One share of a secret that belongs to ``node_id``."""

    node_id: int
    share: bytes = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Unmasked:
    """Shares of the survivors' seeds and of the dropped nodes' mask keys."""

    stage: ClassVar[Stage] = Stage.UNMASK
    seed_shares: tuple[Share, ...]
    key_shares: tuple[Share, ...]


Request = AdvertiseRequest | ShareRequest | MaskRequest | AcknowledgeRequest | UnmaskRequest
Reply = Advertised | SharedKeys | Masked | Acknowledged | Unmasked
