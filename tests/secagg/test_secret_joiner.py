"""Secrets come together whatever a few wrong shares are, and liars do not hold the server up."""

import dataclasses

import numpy as np
import pytest

from dpfl_flower.rng import SeededRandom
from dpfl_flower.secagg import RoundAbandoned, shamir
from dpfl_flower.secagg.messages import Share
from dpfl_flower.secagg.secret_joiner import SecretJoiner
from dpfl_flower.secagg.server import Advertising
from tests.support.secagg import Cast, plain_sum, plan, vectors

SECRET = bytes(range(32))
WRONG = b"\0" * shamir.SHARE_BYTES


@pytest.fixture
def combined(monkeypatch):
    """Count how often shares are put together."""
    calls, combine = [], shamir.combine
    monkeypatch.setattr(shamir, "combine", lambda shares: calls.append(1) or combine(shares))
    return calls


def shares_of(secret, holders, *, threshold, seed=0):
    places = {holder: x for x, holder in enumerate(holders, start=1)}
    split = shamir.split(secret, threshold=threshold, count=len(holders), rng=SeededRandom(seed))
    return dict(zip(holders, split, strict=True)), places


def join(joiner, shares, places, secret=SECRET):
    return joiner.join(shares, places, is_right=lambda found: found == secret, what="are wrong")


@pytest.mark.parametrize("liars", [(), (10,), (10, 19), (12, 17, 21)])
def test_wrong_shares_are_got_past_and_their_holders_named(liars):
    holders = range(10, 30)
    shares, places = shares_of(SECRET, holders, threshold=13)
    joiner = SecretJoiner(13, SeededRandom(1))
    assert join(joiner, shares | dict.fromkeys(liars, WRONG), places) == SECRET
    # The first 13 are tried first; whose shares were not needed were not looked at.
    asked = any(liar < 23 for liar in liars)
    assert joiner.wrong == (dict.fromkeys(liars, 1) if asked else {})


def test_shares_that_are_no_field_elements_are_wrong_ones():
    shares, places = shares_of(SECRET, range(5), threshold=3)
    joiner = SecretJoiner(3, SeededRandom(1))
    assert join(joiner, shares | {0: b"\xff" * shamir.SHARE_BYTES}, places) == SECRET
    assert joiner.wrong == {0: 1}


def test_a_holder_that_always_lies_costs_no_more_than_the_first_time(combined):
    joiner = SecretJoiner(40, SeededRandom(1))
    for count in range(30):
        secret = bytes([count]) * 32
        shares, places = shares_of(secret, range(60), threshold=40, seed=count)
        assert join(joiner, shares | {0: WRONG}, places, secret) == secret
    first = len(combined) - 29
    assert first <= 1 + 200 + 20
    assert joiner.wrong == {0: 1}


def test_an_owner_that_makes_others_look_like_liars_does_not_shut_them_out():
    joiner = SecretJoiner(3, SeededRandom(1))
    shares, places = shares_of(SECRET, range(5), threshold=3)
    assert join(joiner, shares | {0: WRONG, 1: WRONG}, places) == SECRET
    assert joiner.wrong == {0: 1, 1: 1}
    # Without those two there are not enough.
    other = b"o" * 32
    shares, places = shares_of(other, (0, 1, 2), threshold=3)
    assert join(joiner, shares, places, other) == other


def test_too_few_or_too_many_wrong_shares_end_the_round():
    shares, places = shares_of(SECRET, range(5), threshold=3)
    with pytest.raises(RoundAbandoned, match="2 shares"):
        join(SecretJoiner(3), {0: shares[0], 1: shares[1]}, places)
    with pytest.raises(RoundAbandoned, match="are wrong"):
        join(SecretJoiner(3), shares | dict.fromkeys((0, 1, 2), WRONG), places)


def unmasking(nodes):
    cast = Cast(vectors(nodes))
    stage = Advertising(plan(nodes, threshold=2 / 3))
    for _ in range(3):
        stage = stage.receive(cast.answer_all(stage))
    return cast, stage, cast.answer_all(stage)


def test_two_peers_that_hand_out_wrong_shares_of_every_seed_do_not_end_the_round(combined):
    nodes = tuple(range(1, 21))
    cast, stage, replies = unmasking(nodes)
    for liar in (3, 12):
        wrong = tuple(Share(item.node_id, WRONG) for item in replies[liar].seed_shares)
        replies[liar] = dataclasses.replace(replies[liar], seed_shares=wrong)
    found = stage.receive(replies)
    assert found.survivors == nodes
    np.testing.assert_array_equal(found.total, plain_sum(cast.vectors, nodes))
    # Windows that slide over the shares of each secret would take many times 20.
    assert len(combined) < 20 + 2 * (200 + 7)
