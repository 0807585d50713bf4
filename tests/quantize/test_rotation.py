import numpy as np
import pytest
from scipy import linalg

from dpfl_flower.quantize import Rotation, centred, reduced
from dpfl_flower.quantize.rotation import hadamard, padded_length


@pytest.mark.parametrize("size", [1, 2, 8, 64, 128, 2048])
def test_the_transform_is_hadamards_matrix(size):
    vector = np.random.default_rng(size).normal(size=size)
    expected = linalg.hadamard(size) @ vector
    hadamard(vector)
    np.testing.assert_allclose(vector, expected, atol=1e-10)


@pytest.mark.parametrize("size", [2**14, 2**15, 2**17])
def test_a_long_transform_is_its_own_inverse_and_has_the_rows_of_the_matrix(size):
    rng = np.random.default_rng(1)
    vector = rng.normal(size=size)
    twice = vector.copy()
    hadamard(twice)
    for row in (0, 1, size // 2 + 3, size - 1):
        # Sylvester's: the sign is the parity of the bits that both indices have.
        signs = np.array([(-1.0) ** (index & row).bit_count() for index in range(size)])
        assert twice[row] == pytest.approx(signs @ vector, abs=1e-8)
    hadamard(twice)
    np.testing.assert_allclose(twice / size, vector, atol=1e-10)


@pytest.mark.parametrize("dimension", [1, 3, 16, 17, 5000])
def test_rotating_keeps_norms_and_undoing_gives_the_vector_back(dimension):
    rotation = Rotation(dimension, b"seed")
    vector = np.random.default_rng(2).normal(size=dimension)
    rotated = rotation.apply(vector)
    assert rotated.shape == (padded_length(dimension),)
    assert np.linalg.norm(rotated) == pytest.approx(np.linalg.norm(vector), rel=1e-12)
    np.testing.assert_allclose(rotation.undo(rotated), vector, atol=1e-12)


def test_it_is_linear_so_that_a_sum_may_be_undone():
    rotation = Rotation(100, b"seed")
    a, b = np.random.default_rng(3).normal(size=(2, 100))
    summed = rotation.apply(a) + rotation.apply(b)
    np.testing.assert_allclose(rotation.undo(summed), a + b, atol=1e-12)


def test_noise_in_rotated_coordinates_stays_as_strong_in_each_coordinate():
    rotation = Rotation(600, b"seed")
    noise = np.random.default_rng(4).normal(size=(500, 1024))
    undone = np.array([rotation.undo(row) for row in noise])
    # 300,000 squares: the standard error is 0.26 %.
    assert undone.var() == pytest.approx(1, abs=0.015)


def test_a_spike_is_spread_over_all_coordinates_by_a_seed_and_otherwise_by_another():
    spike = np.zeros(1000)
    spike[17] = 32.0
    one, other = (Rotation(1000, seed).apply(spike) for seed in (b"a", b"b"))
    np.testing.assert_allclose(np.abs(one), 1.0)
    many = np.ones(1024)
    first, second = (Rotation(1024, seed).apply(many) for seed in (b"a", b"b"))
    assert np.abs(first).max() < 7  # subgaussian, and not 32 in one coordinate
    assert not np.allclose(np.abs(first), np.abs(second))
    assert np.array_equal(Rotation(1000, b"a").apply(spike), one)
    assert other.shape == one.shape


@pytest.mark.parametrize("seed", [b"", "text", None, 3])
def test_a_seed_must_be_bytes(seed):
    with pytest.raises(ValueError, match="rotation_seed="):
        Rotation(4, seed)


def test_shapes_must_fit():
    rotation = Rotation(5, b"seed")
    with pytest.raises(ValueError, match=r"shape=\(8,\) must be \(5,\)"):
        rotation.apply(np.zeros(8))
    with pytest.raises(ValueError, match=r"shape=\(5,\) must be \(8,\)"):
        rotation.undo(np.zeros(5))


# --- modular integers ------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 16, 20, 32, 47, 62])
def test_centred_residues_are_the_integers_wherever_these_fit(bits):
    half = 1 << (bits - 1)
    values = np.array([0, 1, -1, half - 1, -half, 17 - half])
    residues = reduced(values, bits=bits)
    assert residues.min() >= 0 and residues.max() < 2 * half
    np.testing.assert_array_equal(centred(residues, bits=bits), values)
    assert centred(np.array([half]), bits=bits)[0] == -half  # wraps


def test_a_sum_of_residues_is_the_residue_of_the_sum():
    values = np.random.default_rng(5).integers(-1000, 1000, size=(50, 30))
    modular = reduced(reduced(values, bits=24).sum(axis=0), bits=24)
    np.testing.assert_array_equal(centred(modular, bits=24), values.sum(axis=0))


def test_more_bits_than_int64_holds_and_other_types_are_refused():
    with pytest.raises(ValueError, match="bits=63"):
        reduced(np.zeros(1, np.int64), bits=63)
    with pytest.raises(ValueError, match="dtype=float64"):
        centred(np.zeros(1), bits=16)
