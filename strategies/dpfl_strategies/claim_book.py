"""What each node has claimed to have spent so far, over rounds and restarts.

>>> book = ClaimBook()
>>> print(book.report, book.largest)
no node made a privacy claim 0.0
"""

from collections.abc import Mapping
from typing import Any

from flwr.app import ConfigRecord, Message

from dpfl_flower import records
from dpfl_flower.accounting import Event
from dpfl_flower.accounting.events import count_events
from dpfl_flower.wire import config_record
from dpfl_strategies.node_privacy import NodeClaim, NodePrivacyReport, read_claim

__all__ = ["ClaimBook"]


class ClaimBook:
    """The newest claim of each node, with all that it claimed before it forgot.

    A node without a ledger file forgets when the server's run, or its own process, begins anew: a
    claim of no more releases than the one before is then added to what was claimed until then.

    Parameters
    ----------
    earlier : mapping of str to JSON-able data
        What `to_json` returned, of the part of the run before this one.
    """

    def __init__(self, earlier: Mapping[str, Any] | None = None) -> None:
        self._earlier = {
            int(node): NodeClaim.from_record(ConfigRecord(claim))
            for node, claim in (earlier or {}).items()
        }
        self._claims = dict(self._earlier)
        self._last: dict[int, NodeClaim] = {}

    @property
    def report(self) -> NodePrivacyReport:
        """The claims so far."""
        return NodePrivacyReport(dict(self._claims))

    @property
    def largest(self) -> float:
        """The largest epsilon that a node wrote, 0 where none did."""
        return max((claim.claimed for claim in self._claims.values()), default=0.0)

    @property
    def cryptographic(self) -> bool:
        """Whether every node says that all of its noise came from a cryptographic generator."""
        return all(claim.cryptographic for claim in self._claims.values())

    def read(self, reply: Message) -> NodeClaim | None:
        """Take in a reply's claim and return it; None where it holds none that can be read."""
        node = reply.metadata.src_node_id
        claim = read_claim(node, config_record(reply.content, records.PRIVACY))
        if claim is None:
            return None
        last = self._last.get(node)
        if last is not None and not claim.durable and _releases(claim) <= _releases(last):
            self._earlier[node] = self._claims[node]
        self._claims[node] = claim.after(self._earlier.get(node))
        self._last[node] = claim
        return claim

    def durably_released(self, node: int, event: Event) -> int:
        """Return how many releases of ``event`` the ledger file of a node is known to hold."""
        claim = self._last.get(node, self._earlier.get(node))
        if claim is None or not claim.durable:
            return 0
        return count_events(claim.events).get(event, 0)

    def to_json(self) -> dict[str, Any]:
        """Return the claims for a checkpoint."""
        return {str(node): claim.to_json() for node, claim in self._claims.items()}


def _releases(claim: NodeClaim) -> int:
    return sum(count_events(claim.events).values())
