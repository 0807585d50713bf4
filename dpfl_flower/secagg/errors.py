"""Why a node refuses a stage, and why a server gives a round up."""

from enum import StrEnum

__all__ = ["Refusal", "Refused", "RoundAbandoned"]


class Refusal(StrEnum):
    """What a node found wrong with a request. None of it depends on what the node holds."""

    MALFORMED = "malformed"
    """A field is missing, of another type, or out of range."""
    TOO_FEW_NODES = "too-few-nodes"
    """Fewer nodes than the node's own minimum cohort; roster members only, with a roster."""
    THRESHOLD_TOO_LOW = "threshold-too-low"
    """``2 t > k + c`` does not hold: two secrets of one node could both be put together."""
    PEER_KEY_CHANGED = "peer-key-changed"
    """A peer has two keys within a round, two peers have one, or a peer has this node's own."""
    SURVIVOR_AND_DROPPED = "survivor-and-dropped"
    """One node is named as both, or in two ways within a round."""
    ALREADY_UNMASKED = "already-unmasked"
    """A second unmask request for a round."""
    REPLAYED = "replayed"
    """A stage that this node has been through, or a round not later than its last one."""
    OUT_OF_ORDER = "out-of-order"
    """A stage whose predecessor this node has not been through, or whose time is up."""
    UNCONFIRMED = "unconfirmed"
    """With a roster: too few peers confirm that this node counts as a survivor."""
    JOURNAL = "journal"
    """The node's own file could not be read or written."""


class Refused(Exception):
    """A node does not take part in this stage, and leaves the round.

    Parameters
    ----------
    reason : Refusal
        What the server may be told.
    detail : str
        For the node's own log.
    """

    def __init__(self, reason: Refusal, detail: str) -> None:
        super().__init__(f"{reason.value}: {detail}")
        self.reason = Refusal(reason)


class RoundAbandoned(Exception):
    """Too few nodes are left for the sum to be unmasked: nothing of the round is released."""
