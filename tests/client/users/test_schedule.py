"""A stack's schedule gives every user its own batches, whoever shares the stack."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpfl_flower.client.users.schedule import Schedule


@settings(deadline=None, max_examples=60)
@given(
    records=st.lists(st.integers(1, 23), min_size=1, max_size=6),
    batch_size=st.integers(1, 9),
    epochs=st.integers(1, 3),
    shuffled=st.booleans(),
    spare=st.integers(0, 3),
)
def test_each_user_trains_on_its_own_batches(records, batch_size, epochs, shuffled, spare):
    records = sorted(records, reverse=True)
    orders = None
    if shuffled:
        orders = [[torch.randperm(n) for _ in range(epochs)] for n in records]
    schedule = Schedule(
        records,
        batch_size=batch_size,
        epochs=epochs,
        orders=orders,
        slots=len(records) + spare,
    )
    firsts = np.cumsum(records) - records
    steps = list(schedule)
    assert len(steps) == max(schedule.steps)
    for user, n in enumerate(records):
        assert schedule.steps[user] == epochs * -(-n // batch_size)
        expected = []
        for epoch in range(epochs):
            order = orders[user][epoch] if shuffled else torch.arange(n)
            expected += [part.tolist() for part in torch.split(order, batch_size)]
        for (picks, weights), batch in zip(steps, expected, strict=False):
            mine = picks.view(len(records) + spare, batch_size)[user] - firsts[user]
            real = weights[user] > 0
            assert mine[real].tolist() == batch
            assert weights[user][real].tolist() == pytest.approx([1 / len(batch)] * len(batch))
            assert (weights[user][~real] == 0).all()
            assert set(mine.tolist()) <= set(batch)  # padding is this batch's own


def test_a_long_schedule_is_made_block_by_block():
    schedule = Schedule([500, 3], batch_size=1, epochs=1, orders=None)
    picks = torch.stack([picks for picks, _ in schedule])
    assert picks[:, 0].tolist() == list(range(500))
    assert picks[:, 1].tolist() == ([500, 501, 502] * 167)[:500]
