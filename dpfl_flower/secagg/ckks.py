"""Secure aggregation by homomorphic encryption: nodes share a key that the server does not have.

A second protocol behind `SecureAggregation`, of two stages: nodes answer their vectors encrypted,
the server adds the ciphertexts, and nodes decrypt the sum. `dpfl_flower.secagg.ckks_key` says how
the key is made and handed out; `dpfl_flower.client.ckks_mod` is the nodes' side. CKKS is
approximate; `dpfl_flower.secagg.digits` says why the integers come back exact.

>>> import tempfile
>>> from pathlib import Path
>>> from dpfl_flower.secagg.ckks_key import make_key
>>> with tempfile.TemporaryDirectory() as directory:
...     key = PublicKey.load(make_key(Path(directory)).server)
>>> CKKS(key=key).begin(
...     SumRequest(session=Session(1, 1), nodes=(1, 2, 3), width=5, bits=32, seconds=60.0)
... ).stage
'encrypt'
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from flwr.app import RecordDict
from numpy.typing import NDArray

from dpfl_flower import checks, records
from dpfl_flower.secagg.aggregation import SecureAggregation, SecureExchange, SumRequest
from dpfl_flower.secagg.ckks_key import PublicKey
from dpfl_flower.secagg.ckks_messages import (
    DecryptRequest,
    EncryptRequest,
    decode_encrypted,
    encode,
)
from dpfl_flower.secagg.digits import LARGEST_ERROR, MOST_PARTIES, DigitCode, error_bound
from dpfl_flower.secagg.errors import RoundAbandoned
from dpfl_flower.secagg.round_plan import SecureSum
from dpfl_flower.secagg.session import Session
from dpfl_flower.wire import array_record, read_array

__all__ = ["CKKS", "Session", "SumRequest"]

log = logging.getLogger("flwr.dpfl")


@final
@dataclass(frozen=True, kw_only=True)
class CKKS(SecureAggregation):
    """Sums ciphertexts under one key that all nodes share (Cheon et al., ASIACRYPT 2017).

    Weaker than `SecAggPlus`, and meant for nodes that trust each other. An honest but curious
    server learns the exact sum and whose vectors are in it. But it learns *every* vector if one
    node works with it, or if it lies: a node that is handed one node's ciphertext cannot tell it
    from a sum. And the nodes that decrypt learn the exact sum before any noise is on it, so epsilon
    counts on them too; docs/threat-model.md has the whole list. Distributed noise is refused.

    A vector takes at least 64 bytes an entry on the wire, where a masked one takes 3 to 8.

    Parameters
    ----------
    key : PublicKey
        The server's half of the key.
    min_cohort : int
        The fewest vectors in a sum; with fewer the round is abandoned. Nodes have their own.
    max_cohort : int or None
        The most nodes in a round. None: the population.
    decryptors : int
        How many of the surviving nodes are asked to decrypt, in turn over the rounds. All that
        answer must answer the same, else the round is abandoned; one is enough.

    Raises
    ------
    ValueError
        Naming the argument, its value and the bound.
    """

    key: PublicKey
    min_cohort: int = 3
    max_cohort: int | None = None
    decryptors: int = 2

    def __post_init__(self) -> None:
        checks.instance(PublicKey, key=self.key)
        checks.positive_int(min_cohort=self.min_cohort, decryptors=self.decryptors)
        if self.min_cohort < 2:
            raise ValueError(f"min_cohort={self.min_cohort!r} must be >= 2: a sum of one is no sum")
        if self.max_cohort is not None:
            checks.positive_int(max_cohort=self.max_cohort)
            if self.max_cohort < self.min_cohort:
                raise ValueError(
                    f"max_cohort={self.max_cohort!r} must be >= min_cohort={self.min_cohort!r}"
                )
            _exact(max_cohort=self.max_cohort)

    @property
    def colluders(self) -> int:
        """None: each node has the key to every other node's vector."""
        return 0

    @property
    def nodes_learn_sum(self) -> bool:
        """Those that decrypt do, and the sums of its digits too."""
        return True

    def check_population(self, population: int) -> None:
        """Raise ValueError where no round could ever end well, or sums might not be exact."""
        if population < self.min_cohort:
            raise ValueError(
                f"min_cohort={self.min_cohort!r} must be <= {population}, the nodes that there are"
            )
        if self.max_cohort is None:
            _exact(nodes=population)

    def begin(self, request: SumRequest) -> SecureExchange:
        """Return the first stage of a round; RoundAbandoned if there are too few nodes."""
        count = len(set(request.nodes))
        self.require(count, count)
        _exact(nodes=count)
        return _Encrypting(self, request)

    def require(self, count: int, asked: int, hint: str = "") -> None:
        """Raise RoundAbandoned, with a ``hint``, unless ``min_cohort`` nodes are left."""
        if count < self.min_cohort:
            raise RoundAbandoned(
                f"{count} of {asked} nodes are left, min_cohort={self.min_cohort} must be{hint}"
            )


def _exact(**counts: int) -> None:
    """Refuse more summands than come back exact."""
    checks.at_most(MOST_PARTIES, **counts)
    for name, count in counts.items():
        if not error_bound(count) < LARGEST_ERROR:
            raise ValueError(f"{name}={count!r} is too many for an exact sum")


@final
class _Encrypting(SecureExchange):
    """Nodes are asked for their vectors."""

    def __init__(self, secure: CKKS, request: SumRequest) -> None:
        self._secure = secure
        self._request = request
        self._code = DigitCode(
            width=request.width, bits=request.bits, parties=len(set(request.nodes))
        )

    @property
    def stage(self) -> str:
        """The stage's name."""
        return "encrypt"

    @property
    def carries_task(self) -> bool:
        """Nodes compute now."""
        return True

    @property
    def requests(self) -> Mapping[int, RecordDict]:
        """One request for everybody."""
        request = EncryptRequest(
            server_round=self._request.session.server_round,
            width=self._request.width,
            bits=self._request.bits,
            parties=self._code.parties,
            seconds=float(self._request.seconds),
            key=self._secure.key.fingerprint,
        )
        return {node: encode(request) for node in self._request.nodes}

    def receive(self, replies: Mapping[int, RecordDict]) -> SecureExchange | SecureSum:
        """Add what came, and ask for the sum to be decrypted."""
        totals = self._secure.key.zeros(self._code.chunks)
        survivors = []
        for node in dict.fromkeys(self._request.nodes):
            if node not in replies:
                continue
            try:
                totals = self._added(totals, replies[node])
            except Exception as malformed:  # whatever a node wrote must not end the run
                log.warning(
                    "A malformed ciphertext of node %d counts as a dropout (%s)",
                    node,
                    type(malformed).__name__,
                )
                continue
            survivors.append(node)
        # Of nobody at all the likeliest cause is an app that has never heard of the protocol.
        hint = "" if survivors else ": do the apps have mods=[ckks_mod]?"
        self._secure.require(len(survivors), self._code.parties, hint)
        return _Decrypting(
            self._secure,
            self._request,
            tuple(survivors),
            [bytes(total.serialize()) for total in totals],
        )

    def _added(self, totals: Sequence[Any], reply: RecordDict) -> list[Any]:
        encrypted, ciphertexts = decode_encrypted(reply)
        if encrypted.key != self._secure.key.fingerprint:
            raise ValueError("the vector is encrypted under another key")
        if len(ciphertexts) != len(totals):
            raise ValueError(f"{len(ciphertexts)} ciphertexts must be {len(totals)}")
        read = self._secure.key.read
        return [total + read(data) for total, data in zip(totals, ciphertexts, strict=True)]


@final
class _Decrypting(SecureExchange):
    """Some survivors are asked to decrypt the sum."""

    def __init__(
        self,
        secure: CKKS,
        request: SumRequest,
        survivors: tuple[int, ...],
        ciphertexts: Sequence[bytes],
    ) -> None:
        self._request = request
        self._survivors = survivors
        server_round = request.session.server_round
        asked = min(secure.decryptors, len(survivors))
        self._asked = tuple(
            survivors[(server_round * asked + place) % len(survivors)] for place in range(asked)
        )
        self._content = encode(
            DecryptRequest(server_round=server_round, survivors=survivors), ciphertexts
        )

    @property
    def stage(self) -> str:
        """The stage's name."""
        return "decrypt"

    @property
    def carries_task(self) -> bool:
        """Nothing is computed."""
        return False

    @property
    def requests(self) -> Mapping[int, RecordDict]:
        """The sum, for those that are asked."""
        return {node: RecordDict(dict(self._content)) for node in self._asked}

    def receive(self, replies: Mapping[int, RecordDict]) -> SecureExchange | SecureSum:
        """Return the sum that all who answer agree on."""
        totals: list[NDArray[np.int64]] = []
        for node in self._asked:
            if node not in replies:
                continue
            try:
                totals.append(self._checked(replies[node]))
            except Exception as malformed:  # whatever a node wrote must not end the run
                log.warning(
                    "A malformed sum of node %d counts as a dropout (%s)",
                    node,
                    type(malformed).__name__,
                )
        if not totals:
            raise RoundAbandoned(f"none of {len(self._asked)} nodes decrypted the sum")
        if any(not np.array_equal(totals[0], other) for other in totals[1:]):
            raise RoundAbandoned("the nodes that decrypted do not agree on the sum")
        return SecureSum(totals[0], self._survivors)

    def _checked(self, reply: RecordDict) -> NDArray[np.int64]:
        total = read_array(array_record(reply, records.MASKED)[records.SUM])
        if total.dtype != np.int64 or total.shape != (self._request.width,):
            raise ValueError(f"sum={total.dtype}{list(total.shape)} must be an int64 vector")
        most = 1 << (self._request.bits - 1)
        low, high = int(total.min()), int(total.max())
        if not (-most <= low and high < most):
            raise ValueError(f"sum in [{low}, {high}] must fit {self._request.bits} bits")
        if self._request.largest is not None:
            bound = self._request.largest * len(self._survivors)
            if max(-low, high) > bound:
                raise ValueError(f"sum in [{low}, {high}] must be at most {bound}")
        return total.astype(np.int64)
