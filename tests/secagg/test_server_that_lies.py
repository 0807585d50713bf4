"""Servers that tell each node something else, each time something that this node accepts."""

import dataclasses

import numpy as np
import pytest

from dpfl_flower.secagg import Refused, encoding_of
from dpfl_flower.secagg.masks import apply_masks
from dpfl_flower.secagg.messages import Masked, Stage
from dpfl_flower.secagg.server import Advertising
from tests.support.secagg import Cast, plan, vectors, with_rosters

NODES = (1, 2, 3, 4, 5)
WIDTH = 64
LARGEST = 1 << 14


def tell_apart(victims, others):
    """Ask node 1 for words of one kind and all others for another; return what comes of it.

    Every node unmasks, and the server adds up the 64-bit words that it got.
    """
    parts = vectors(NODES, width=WIDTH, most=LARGEST)
    cast = Cast(parts, with_rosters(NODES))
    stage = Advertising(plan(NODES, width=WIDTH, rosters=True, bits=others[0], lanes=others[1]))
    sent, seeds = {}, {}
    while True:
        number = stage.requests[1].stage
        replies = {}
        for n, request in stage.requests.items():
            if number is Stage.ADVERTISE and n == 1:
                request = dataclasses.replace(request, bits=victims[0], lanes=victims[1])
            cast.states[n], replies[n] = cast.answer(n, request)
        if number is Stage.SHARE:
            seeds = {n: cast.states[n].seed for n in NODES}
        if number is Stage.MASK:
            sent = {n: reply.vector.view("<u8") for n, reply in replies.items()}
            # What the server's own code takes, so that it goes on.
            room = stage.plan.encoding.packed_bytes(WIDTH)
            for n, reply in replies.items():
                replies[n] = Masked(vector=np.zeros(room, np.uint8), tokens=reply.tokens)
        if number is Stage.UNMASK:
            # Shares of all seeds were handed out: the server takes all their masks off.
            assert all(len(reply.seed_shares) == len(NODES) - 1 for reply in replies.values())
            break
        stage = stage.receive(replies)
    size = min(words.size for words in sent.values())
    total = np.zeros(size, "<u8")
    for n, words in sent.items():
        own = words.copy()
        apply_masks(own.view("<u4") if n == 1 and victims == (32, 1) else own, subtract=[seeds[n]])
        total += own[:size]
    return parts[1], total


@pytest.mark.parametrize("victims", [(32, 1), (21, 3)])
def test_words_of_another_kind_take_no_entry_of_a_node_out_of_the_sum(victims, monkeypatch):
    """Masks are the same bits whatever words they are cut into, so they would still cancel."""
    # This server does not mind that node 1 signed keys for words of another kind.
    monkeypatch.setattr(Advertising, "_signed", lambda *_: True)
    try:
        own, total = tell_apart(victims, (64, 1))
    except Refused:
        return
    if victims == (32, 1):
        alone, truth = total.view("<i4")[1::2], own[1::2]
    else:
        alone = encoding_of(*victims).signed(total)[-total.size :]
        truth = own[-total.size :]
    # The others' entries are far below this node's: what is left of them are carries.
    assert not np.all(np.abs(alone[: truth.size] - truth) <= len(NODES))
