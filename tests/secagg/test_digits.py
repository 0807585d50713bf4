"""Digits: their sums are the integers' sums, and stay where CKKS is exact."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpfl_flower.secagg.digits import (
    CAPACITY,
    LARGEST_ERROR,
    MOST_PARTIES,
    SLOTS,
    DigitCode,
    error_bound,
)


def signed(value, bits):
    """Return an integer of any size mod 2^bits, in Python's own arithmetic."""
    return (value + (1 << bits - 1)) % (1 << bits) - (1 << bits - 1)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 64), st.integers(1, 40), st.data())
def test_the_sum_of_digits_is_the_sum_modulo_two_to_the_bits(bits, parties, data):
    entry = st.integers(-(2**63), 2**63 - 1)
    vectors = data.draw(
        st.lists(st.lists(entry, min_size=3, max_size=3), min_size=parties, max_size=parties)
    )
    code = DigitCode(width=3, bits=bits, parties=parties + data.draw(st.integers(0, 1000)))
    slots = sum(code.encode(np.array(vector, np.int64)) for vector in vectors)
    expected = [signed(sum(column), bits) for column in zip(*vectors, strict=True)]
    assert code.decode(slots, parties=parties).tolist() == expected


def test_a_vector_of_half_the_bytes_has_the_same_digits():
    code = DigitCode(width=3, bits=40, parties=4)
    vector = np.array([-(2**26), 5, 2**26])
    np.testing.assert_array_equal(code.encode(vector.astype(np.int32)), code.encode(vector))


@pytest.mark.parametrize("parties", [1, 2, 3, 4, 1000, 2**16 - 1, 2**16, MOST_PARTIES])
@pytest.mark.parametrize("bits", [1, 8, 24, 32, 33, 64])
def test_no_sum_of_digits_exceeds_the_capacity(parties, bits):
    code = DigitCode(width=4, bits=bits, parties=parties)
    extremes = np.array([-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, -1, 0], np.int64)
    slots = np.abs(code.encode(extremes))
    assert slots.max() * parties < CAPACITY
    assert code.digits * code.digit_bits >= bits


def test_the_bound_on_the_error_leaves_room_for_the_most_parties_and_not_for_any():
    assert error_bound(1) < 0.01
    assert error_bound(MOST_PARTIES) < LARGEST_ERROR / 10
    assert error_bound(2**40) > LARGEST_ERROR
    with pytest.raises(ValueError, match="parties=1048577"):
        DigitCode(width=1, bits=8, parties=MOST_PARTIES + 1)


def summed(parties=3, **changes):
    code = DigitCode(width=5, bits=40, **({"parties": parties} | changes))
    return code, sum(code.encode(np.arange(5, dtype=np.int64) * 10**9) for _ in range(parties))


@pytest.mark.parametrize(
    ("slot", "value", "match"),
    [
        (0, 0.3, "further than 0.25"),
        (0, -0.3, "further than 0.25"),
        (0, 2.0**62, "larger than"),
        (0, np.nan, "larger than"),
        (0, -np.inf, "larger than"),
        (5, 1.0, "4 vectors are summed, parties=3"),
        (5, -1.0, "2 vectors are summed, parties=3"),
        (11, 1.0, "vectors are summed"),
        (12, 1.0, "beyond the vector"),
        (SLOTS - 1, 1.0, "beyond the vector"),
    ],
)
def test_what_is_no_sum_of_digits_is_refused(slot, value, match):
    code, slots = summed()
    code.decode(slots + 0.2, parties=3)
    slots[0, slot] += value
    with pytest.raises(ValueError, match=match):
        code.decode(slots, parties=3)


def test_shapes_are_checked():
    code, slots = summed()
    with pytest.raises(ValueError, match="slots="):
        code.decode(slots[:, :-1], parties=3)
    with pytest.raises(ValueError, match="vector="):
        code.encode(np.zeros(4, np.int64))
    with pytest.raises(ValueError, match="vector="):
        code.encode(np.zeros(5, np.int16))
