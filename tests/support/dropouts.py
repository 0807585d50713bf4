"""The ways of six nodes to drop out of a round that leave its sum to be had."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

from flwr.app import Context, Message
from flwr.clientapp.typing import ClientAppCallable, Mod

from dpfl_flower.secagg.messages import Stage
from dpfl_flower.secagg.wire import decode_request

NODES: Final = 6
STAGES: Final = (Stage.ADVERTISE, Stage.SHARE, Stage.MASK, Stage.UNMASK)

Way = Mapping[int, Stage]
"""Which nodes drop out, by index, and at which stage: they answer those before it."""


def survives(answered: Sequence[Sequence[int]], *, least: int = 3) -> bool:
    """Whether a round of a complete graph ends well, given who answered at each stage.

    Of so many nodes at least, and of a majority of each node's neighbours.
    """
    advertised, shared, masked, unmasked = map(len, answered)
    if min(advertised, shared, masked) < least:
        return False
    threshold = (advertised - 1) // 2 + 1
    return min(shared, masked, unmasked) - 1 >= threshold


def ways(nodes: int, *, least: int = 3) -> list[Way]:
    """Return every way that leaves the sum to be had."""
    found = []
    for leaving in itertools.product((*STAGES, None), repeat=nodes):
        stays = [[n for n, at in enumerate(leaving) if at is None or at > s] for s in STAGES]
        if survives(stays, least=least):
            found.append({n: at for n, at in enumerate(leaving) if at is not None})
    return found


EVERY_WAY: Final[Sequence[Way]] = ways(NODES)

KINDS: Final[Sequence[Way]] = list(
    {tuple(sorted(Counter(way.values()).items())): way for way in EVERY_WAY}.values()
)
"""One way for each number of nodes that drop out at each stage."""


TWO_OF_THREE: Final[Sequence[Way]] = ways(3, least=2)
"""Of three nodes that insist on two: without one that has not advertised, or with all."""

WITH_ABANDONED: Final[Sequence[Way]] = [TWO_OF_THREE[0], {2: Stage.MASK}, *TWO_OF_THREE[1:]]
"""The same, and in between one that leaves no majority of two neighbours."""


def dropping(ways: Sequence[Way]) -> Mod:
    """Return a mod that drops out in round r as the way r - 1 says.

    Outside of secure aggregation a node drops out unless its vector would have been sent.
    """

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        config = message.content.config_records
        node = int(context.node_config["partition-id"])
        if "secagg" in config:
            request = decode_request(message.content)
            drops = ways[request.server_round - 1].get(node) is request.stage
        else:
            way = ways[int(config["config"]["server-round"]) - 1]
            drops = way.get(node, Stage.UNMASK) != Stage.UNMASK
        if drops:
            raise RuntimeError("planted")
        return call_next(message, context)

    return mod
