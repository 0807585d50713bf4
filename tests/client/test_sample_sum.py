"""A sample's sum is as exact as float64, however many records it has."""

import pytest
import torch

from dpfl_flower.client.sample_sum import SampleSum

LARGE, SMALL = 2.0**24, 0.5
BATCHES = 4096


class Scripted:
    """A clipper that answers a sum of its own for each physical batch, of at least float32."""

    norms = None

    def __init__(self, *dtypes):
        self.parameters = [torch.zeros(3, dtype=dtype) for dtype in dtypes or (torch.float32,)]

    def zeros(self):
        return self.clipped_sum(0)

    def clipped_sum(self, batch):
        wide = [torch.promote_types(p.dtype, torch.float32) for p in self.parameters]
        return [torch.full((3,), float(batch), dtype=dtype) for dtype in wide]


def total_of(values, *dtypes):
    sample = SampleSum(Scripted(*dtypes), lambda indices: values[indices[0]])
    for index in range(len(values)):
        sample.add([index])
    return sample.total


def test_a_total_of_many_batches_loses_nothing_that_float64_holds():
    # In float32 2^24 + 1/2 is 2^24 again, so that all of the small ones would be lost, 2048 in all.
    small = [SMALL] * BATCHES
    for total in total_of([LARGE, *small], torch.float32, torch.bfloat16, torch.float64):
        assert total.dtype is torch.float64
        assert (total == LARGE + SMALL * BATCHES).all()


def test_a_record_more_moves_a_total_by_that_record_alone():
    # What was lost to rounding would depend on all others: 1/2 beside 2^24 is 0 or 1 in float32.
    others = [LARGE, *[SMALL] * 7]
    for with_it, without in zip(total_of([*others, 0.5]), total_of(others), strict=True):
        assert (with_it - without == 0.5).all()


@pytest.mark.parametrize("values", [[], [0.5], [0.5, 0.25]])
def test_no_dtype_tells_how_many_batches_a_sample_had(values):
    """A number that goes to bfloat16 by float32 may be rounded twice, from float64 it is once."""
    half, full = total_of(values, torch.bfloat16, torch.float32)
    assert half.dtype is torch.float64
    released = [(total.double() / 3).to(total.dtype).to(torch.float32) for total in (half, full)]
    assert torch.equal(*released)
    several = len(values) > 1
    assert full.dtype is (torch.float64 if several else torch.float32)  # saved where nothing shows
    assert float(half.sum()) == float(full.sum()) == 3 * sum(values)


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
