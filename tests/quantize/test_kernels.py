import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpfl_flower.clipping import Norm
from dpfl_flower.quantize import kernels


def squares_that_sum_to(total):
    """Greedily: a few integers whose squares sum to ``total`` exactly."""
    found = []
    while total:
        found.append(math.isqrt(total))
        total -= found[-1] ** 2
    return found


def excess(integers, bound, norm, dtype):
    work = kernels.Workspace(len(integers), np.dtype(dtype), None)
    work.values[:] = integers
    check = kernels.NormCheck(bound, norm, len(integers), quick=dtype == np.float32)
    for block in work.blocks:
        check.see(block)
    return check.excess(work.blocks)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    dimension=st.sampled_from([1, 5, 1023, 1024, 1025, 3000]),
    share=st.sampled_from([0.0, 0.5, 0.99, 1.0]),
    bound=st.sampled_from([1, 7, 5000, 2**20]),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_one_too_many_is_seen_and_just_enough_is_let_through(seed, dimension, share, bound, dtype):
    rng = np.random.default_rng(seed)
    direction = rng.standard_normal(dimension)
    integers = np.trunc(share * bound * direction / np.linalg.norm(direction)).astype(int).tolist()
    left = bound**2 - sum(q * q for q in integers)
    just = [*integers, *squares_that_sum_to(left)]
    assert excess(just, bound, Norm.L2, dtype) == 0
    assert excess([*just, 1], bound, Norm.L2, dtype) > 0
    left = bound - min(bound, sum(map(abs, integers)))
    if left:
        assert excess([*integers, -left], bound, Norm.L1, dtype) == 0
        assert excess([*integers, -left, 1], bound, Norm.L1, dtype) > 0


def test_the_largest_bound_is_checked_exactly_too():
    bound = 2**26
    just = squares_that_sum_to(bound**2)
    assert excess(just, bound, Norm.L2, np.float64) == 0
    assert excess([*just, 1], bound, Norm.L2, np.float64) > 0
    assert excess([2.0**27], bound, Norm.L2, np.float64) == pytest.approx(2)


@pytest.mark.parametrize("norm", list(Norm))
def test_the_excess_is_a_ratio_of_norms(norm):
    assert excess([6, -8] * 10, 5, norm, np.float32) == pytest.approx(
        math.sqrt(1000) / 5 if norm is Norm.L2 else 140 / 5, rel=1e-4
    )


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(1, 5000),
    spread=st.sampled_from([0.0, 1.0, 5.0]),
)
def test_a_quick_sum_is_within_its_stated_error(seed, size, spread):
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal(size) * np.exp(spread * rng.standard_normal(size))).astype("f4")
    quick = kernels.PowerSum(Norm.L2, size, quick=True)
    slow = kernels.PowerSum(Norm.L2, size, quick=False)
    for sums in (quick, slow):
        sums.see(kernels.Block(values))
    exact = math.fsum(float(v) ** 2 for v in values)
    assert abs(quick.value() - exact) <= quick.relative_error * exact
    assert slow.value() == pytest.approx(exact, rel=1e-14)
    assert slow.relative_error == 0


def test_arrays_are_joined_across_blocks():
    sizes = [3, 0, kernels.BLOCK, 5, 2 * kernels.BLOCK - 8, 1]
    values = [np.full(size, index + 1.0, np.float32) for index, size in enumerate(sizes)]
    reference = [np.full(size, 0.5, np.float32) for size in sizes]
    work = kernels.Workspace(sum(sizes), np.dtype(np.float32), None)
    lengths = [block.values.size for block in work.subtract(values, reference)]
    assert lengths == [kernels.BLOCK] * 3 + [1]
    np.testing.assert_array_equal(work.values, np.concatenate(values) - 0.5)
