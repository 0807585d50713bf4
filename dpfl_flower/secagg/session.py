"""What binds every key, share and signature to one round of one run.

>>> session = Session(run_id=7, server_round=3)
>>> session.label("mask", 1, 2) == session.label("mask", 2, 1)
False
"""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

from dpfl_flower import checks

__all__ = ["LONGEST_SECONDS", "Session", "node_bytes"]

LONGEST_SECONDS: Final = 7 * 24 * 3600.0
"""No round may take longer: nodes refuse one that says so, and forget what they keep of it."""

_PROTOCOL = b"dpfl-flower secagg 3\0"
_MAX_ID = 2**64 - 1


def node_bytes(node_id: int) -> bytes:
    """Return a node's id in 8 bytes."""
    return node_id.to_bytes(8, "big")


@dataclass(frozen=True)
class Session:
    """One round of one run.

    Parameters
    ----------
    run_id : int
        The id that Flower gave the run, the same at the server and at every node.
    server_round : int
        From 1 on.
    terms : bytes
        What the round's nodes agree on; see `terms_of`.
    """

    run_id: int
    server_round: int
    terms: bytes = b""

    def __post_init__(self) -> None:
        checks.non_negative_int(run_id=self.run_id)
        checks.positive_int(server_round=self.server_round)
        if self.run_id > _MAX_ID or self.server_round > _MAX_ID:
            raise ValueError(f"{self!r} must hold integers of 64 bits")

    def of_words(self, width: int, bits: int, lanes: int) -> "Session":
        """Return the session, bound to how its vectors become words as well.

        A keystream cut into 64-bit words and the same one cut into others cancel but for carries,
        though their words hold other entries: nodes that are told different packings must have no
        mask in common, or one node's entries come out of the sum where the others' are small.

        >>> Session(7, 3).of_words(4, 32, 1) == Session(7, 3).of_words(4, 64, 1)
        False
        """
        packing = b"".join(map(node_bytes, (width, bits, lanes)))
        return replace(self, terms=hashlib.sha256(self.terms).digest() + packing)

    def label(self, purpose: str, *parties: int) -> bytes:
        """Return bytes that no other purpose, round, run or parties have."""
        if purpose not in self._beginnings:
            self._beginnings[purpose] = self._beginning(purpose)
        return self._beginnings[purpose] + b"".join(map(node_bytes, parties))

    @cached_property
    def _beginnings(self) -> dict[str, bytes]:
        """How labels begin, by purpose: a node makes four for each neighbour."""
        return {}

    def _beginning(self, purpose: str) -> bytes:
        run = node_bytes(self.run_id) + node_bytes(self.server_round)
        terms = hashlib.sha256(self.terms).digest()
        return _PROTOCOL + purpose.encode().ljust(16, b"\0") + run + terms

    def pair_label(self, purpose: str, node_id: int, peer: int) -> bytes:
        """Return the label of what two nodes have in common, the same for both."""
        return self.label(purpose, *sorted((node_id, peer)))
