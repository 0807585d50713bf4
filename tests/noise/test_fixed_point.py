from fractions import Fraction

import mpmath
import pytest

from dpfl_flower.noise import fixed_point


@pytest.mark.parametrize("bits", [64, 192, 500])
@pytest.mark.parametrize("x", ["0", "1/536870912", "1/3", "16383/16384", "1"])
def test_exp_minus_is_within_two_units(bits, x):
    with mpmath.workprec(bits + 100):
        fraction = Fraction(x)
        exact = mpmath.exp(-mpmath.mpf(fraction.numerator) / fraction.denominator) * 2**bits
        assert abs(fixed_point.exp_minus(fraction, bits=bits) - exact) <= 2


@pytest.mark.parametrize("bits", [64, 192, 500])
def test_inverse_sqrt_two_pi_is_within_two_units(bits):
    with mpmath.workprec(bits + 100):
        exact = 2**bits / mpmath.sqrt(2 * mpmath.pi)
        assert abs(fixed_point.inverse_sqrt_two_pi(bits=bits) - exact) <= 2


def test_rounding_goes_to_the_nearest():
    assert [fixed_point.nearest_shift(v, 2) for v in (0, 1, 2, 3, 5, 6, -1, -3)] == [
        0, 0, 1, 1, 1, 2, 0, -1,
    ]  # fmt: skip
    assert fixed_point.nearest(Fraction(-7, 3), bits=1) == -5
