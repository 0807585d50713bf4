import numpy as np
import pytest
from scipy import stats

from dpfl_flower.quantize.dither import PERIOD, dither


def test_the_same_seed_gives_the_same_numbers_everywhere():
    np.testing.assert_array_equal(dither(b"a", 1000), dither(b"a", 1000))
    np.testing.assert_array_equal(dither(b"a", 10), dither(b"a", 1000)[:10])
    assert (dither(b"a", 1000) != dither(b"b", 1000)).mean() > 0.99
    # Fixed for ever: nodes of different versions must agree.
    assert dither(b"round 1", 2).tolist() == [-0.35346275568008423, -0.10766595602035522]


def test_it_is_uniform_and_symmetric_and_never_a_half():
    numbers = dither(b"public", PERIOD)
    assert numbers.dtype == np.float32
    numbers = numbers.astype(np.float64) + 0.5
    assert 0 < numbers.min() < 1e-3
    assert 1 - 1e-3 < numbers.max() < 1
    assert stats.kstest(numbers, "uniform").pvalue > 1e-6
    assert stats.kstest(numbers**1.05, "uniform").pvalue < 1e-6  # it would see 5 %
    np.testing.assert_array_equal((numbers * 2**24) % 2, 1)  # so -u is as likely as u


def test_long_vectors_use_the_numbers_again():
    assert dither(b"public", 10**7).size == PERIOD


@pytest.mark.parametrize("seed", [b"", "text", None, 5])
def test_a_seed_that_is_no_bytes_is_refused(seed):
    with pytest.raises(ValueError, match="dither_seed="):
        dither(seed, 10)
