"""A sample's sum is as exact as float64, however many records it has."""

import pytest
import torch

from dpfl_flower.client.sample_sum import SampleSum

LARGE, SMALL = 2.0**24, 0.5
BATCHES = 4096


class Scripted:
    """A clipper that answers a sum of its own for each physical batch."""

    norms = None

    def zeros(self):
        return [torch.zeros(3), torch.zeros(1, dtype=torch.bfloat16)]

    def clipped_sum(self, batch):
        value = float(batch)
        return [torch.full((3,), value), torch.full((1,), value, dtype=torch.bfloat16)]


def total_of(values):
    sample = SampleSum(Scripted(), lambda indices: values[indices[0]])
    for index in range(len(values)):
        sample.add([index])
    return sample.total


def test_a_total_of_many_batches_loses_nothing_that_float64_holds():
    # In float32 2^24 + 1/2 is 2^24 again, so that all of the small ones would be lost, 2048 in all.
    small = [SMALL] * BATCHES
    for total in total_of([LARGE, *small]):
        assert total.dtype is torch.float64
        assert (total == LARGE + SMALL * BATCHES).all()


def test_a_record_more_moves_a_total_by_that_record_alone():
    # What was lost to rounding would depend on all others: 1/2 beside 2^24 is 0 or 1 in float32.
    others = [LARGE, *[SMALL] * 7]
    for with_it, without in zip(total_of([*others, 0.5]), total_of(others), strict=True):
        assert (with_it - without == 0.5).all()


@pytest.mark.parametrize("n", [1, 1000])
def test_the_indicators_are_summed_exactly_too(n):
    class Norms(Scripted):
        norms = torch.tensor([0.5, 2.0, float("nan")])
        clip = type("Clip", (), {"norm": 1.0})

    sample = SampleSum(Norms(), lambda indices: 0.0)
    for _ in range(n):
        sample.add([0])
    assert sample.fitting().dtype is torch.float64
    assert float(sample.fitting()) == 0.0
