"""The ways of six nodes to drop out of a round that leave its sum to be had."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

from dpfl_flower.secagg.messages import Stage

NODES: Final = 6
STAGES: Final = (Stage.ADVERTISE, Stage.SHARE, Stage.MASK, Stage.UNMASK)

Way = Mapping[int, Stage]
"""Which nodes drop out, by index, and at which stage: they answer those before it."""


def survives(answered: Sequence[Sequence[int]]) -> bool:
    """Whether a round of a complete graph ends well, given who answered at each stage.

    Of three nodes at least, and of a majority of each node's neighbours.
    """
    advertised, shared, masked, unmasked = map(len, answered)
    if min(advertised, shared, masked) < 3:
        return False
    threshold = (advertised - 1) // 2 + 1
    return min(shared, masked, unmasked) - 1 >= threshold


def _ways(nodes: int) -> list[Way]:
    found = []
    for leaving in itertools.product((*STAGES, None), repeat=nodes):
        stays = [[n for n, at in enumerate(leaving) if at is None or at > s] for s in STAGES]
        if survives(stays):
            found.append({n: at for n, at in enumerate(leaving) if at is not None})
    return found


EVERY_WAY: Final[Sequence[Way]] = _ways(NODES)

KINDS: Final[Sequence[Way]] = list(
    {tuple(sorted(Counter(way.values()).items())): way for way in EVERY_WAY}.values()
)
"""One way for each number of nodes that drop out at each stage."""
