"""The public constants of a round, and its outcome.

>>> plan = RoundPlan(session=Session(1, 1), nodes=(1, 2, 3, 4), width=2, bits=32, colluders=1)
>>> plan.threshold_of(3)
3
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral

import numpy as np
from numpy.typing import NDArray

from dpfl_flower import checks
from dpfl_flower.secagg.encoding import Encoding
from dpfl_flower.secagg.errors import RoundAbandoned
from dpfl_flower.secagg.lanes import encoding_of
from dpfl_flower.secagg.session import Session

__all__ = ["RoundPlan", "SecureSum", "Session", "check_threshold", "is_count", "t_of"]


def is_count(threshold: object) -> bool:
    """Return whether a threshold is a number of neighbours, not a share of them."""
    return isinstance(threshold, Integral) and int(threshold) > 1  # True is 1


def t_of(threshold: float, count: int, *, colluders: int) -> int:
    """Return t for k neighbours: what is asked for, and at least what ``2 t > k + c`` needs."""
    asked = int(threshold) if is_count(threshold) else math.ceil(threshold * count - 1e-9)
    return max(asked, _least(count, colluders))


def _least(count: int, colluders: int) -> int:
    return (count + colluders) // 2 + 1


def check_threshold(threshold: float) -> None:
    """Raise ValueError unless a threshold is a share above one half, or a number of neighbours.

    >>> check_threshold(4)
    >>> check_threshold(0.5)
    Traceback (most recent call last):
        ...
    ValueError: threshold=0.5 must be > 0.5: half of the neighbours could otherwise put a node's \
seed together, and the other half its mask key
    """
    if is_count(threshold):
        return
    try:
        checks.fraction(threshold=threshold)
    except ValueError as error:
        raise ValueError(f"{error}, or an integer >= 2: a number of neighbours") from None
    if not threshold > 0.5:
        raise ValueError(
            f"threshold={threshold!r} must be > 0.5: half of the neighbours could otherwise put a "
            "node's seed together, and the other half its mask key"
        )


@dataclass(frozen=True, kw_only=True)
class RoundPlan:
    """The public constants of a round.

    Parameters
    ----------
    session : Session
    nodes : tuple of int
        Who is asked.
    width, bits : int
        Vectors of ``width`` entries are summed mod 2^bits.
    lanes : int
        Entries that are packed together under a mask; see `encoding_of`.
    threshold : float or int
        How many of a node's k neighbours can put its secrets together: a share of them, ``t`` being
        ``ceil(threshold * k)``, or t itself, an integer of 2 or more; and at least what
        ``2 t > k + colluders`` needs.
    neighbours : int or None
        k, even; None: everyone.
    min_cohort : int
        The fewest vectors in a sum.
    colluders : int
        How many neighbours of a node may work with the server.
    rosters : bool
        Whether the nodes have rosters, and so sign who survived.
    seconds : float
        After so long nodes forget the round.
    largest : int or None
        Where given, no entry of an honest vector is larger in absolute value. A sum that is larger
        than its vectors can give holds a mask that nobody can take off: it is given up.
    """

    session: Session
    nodes: tuple[int, ...]
    width: int
    bits: int
    threshold: float | int = 2 / 3
    neighbours: int | None = None
    min_cohort: int = 3
    colluders: int = 0
    rosters: bool = False
    seconds: float = 3600.0
    largest: int | None = None
    lanes: int = 1

    def __post_init__(self) -> None:
        checks.positive_int(width=self.width, min_cohort=self.min_cohort)
        check_threshold(self.threshold)
        checks.non_negative_int(colluders=self.colluders)
        checks.positive(seconds=self.seconds)
        if self.neighbours is not None:
            checks.positive_int(neighbours=self.neighbours)
            if self.neighbours % 2:
                raise ValueError(f"neighbours={self.neighbours!r} must be even, or None")

    @property
    def encoding(self) -> Encoding:
        """How the vectors become words."""
        return encoding_of(self.bits, self.lanes)

    @cached_property
    def bound_session(self) -> Session:
        """What labels hold: the session, bound to how the vectors become words."""
        return self.session.of_words(self.width, self.bits, self.lanes)

    def threshold_of(self, count: int) -> int:
        """Return t for nodes of ``count`` neighbours.

        Raises
        ------
        RoundAbandoned
            If no t <= count fulfils ``2 t > count + colluders``.
        """
        threshold = t_of(self.threshold, count, colluders=self.colluders)
        if _least(count, self.colluders) <= count < threshold:
            raise RoundAbandoned(
                f"{count} neighbours have {count} shares, threshold={self.threshold} are needed"
            )
        if threshold > count:
            raise RoundAbandoned(
                f"{count} neighbours cannot outvote colluders={self.colluders}: "
                f"{threshold} shares would be needed"
            )
        return threshold

    def require(self, nodes: Iterable[int], what: str, hint: str = "") -> None:
        """Raise RoundAbandoned, with a ``hint``, unless at least ``min_cohort`` nodes are left."""
        count = len(set(nodes))
        if count < self.min_cohort:
            raise RoundAbandoned(
                f"{count} of {len(self.nodes)} nodes {what}, min_cohort={self.min_cohort} must"
                f"{hint}"
            )


@dataclass(frozen=True)
class SecureSum:
    """What the server learns: the sum, and whose vectors are in it.

    Attributes
    ----------
    total : int64 array, shape (width,)
        In ``[-2^(bits-1), 2^(bits-1))``.
    survivors : tuple of int
    """

    total: NDArray[np.int64]
    survivors: tuple[int, ...]
