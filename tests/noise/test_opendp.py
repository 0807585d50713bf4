"""OpenDP's exact sampler as the oracle of the discrete Gaussian: independent code, the same law."""

import functools

import numpy as np
import opendp.prelude as opendp
from scipy import stats

from dpfl_flower.noise import DiscreteGaussian, RoundedGaussian
from dpfl_flower.rng import secure
from tests.support.goodness import ACCEPT, REJECT

DRAWS = 150_000


@functools.cache  # 16 microseconds a draw
def oracle(scale):
    opendp.enable_features("contrib")
    space = opendp.vector_domain(opendp.atom_domain(T=int)), opendp.l2_distance(T=int)
    return np.array(opendp.m.make_gaussian(*space, scale=scale)([0] * DRAWS))


def p_value(ours, theirs):
    """Two samples of integers, cell by cell; what is far out in one cell at each end."""
    end = int(4 * theirs.std())
    counts = [
        np.bincount(np.clip(x, -end, end) + end, minlength=2 * end + 1) for x in (ours, theirs)
    ]
    return stats.chi2_contingency(counts).pvalue


def test_our_discrete_gaussian_is_opendps():
    assert p_value(DiscreteGaussian(9).sample(DRAWS, secure()), oracle(3.0)) > ACCEPT


def test_another_scale_and_the_rounded_law_are_told_apart_from_it():
    # 11 % and 8 % of variance more, where two samples tell 0.5 % apart: 16 standard errors.
    assert p_value(DiscreteGaussian(10).sample(DRAWS, secure()), oracle(3.0)) < REJECT
    assert p_value(RoundedGaussian(1).sample(DRAWS, secure()), oracle(1.0)) < REJECT
