import numpy as np
import pytest
import torch

from dpfl_flower.layout import ArrayLayout, ArraySpec, as_numpy, is_floating

MODEL = {
    "weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "scale": np.array(0.5, dtype=np.float64),
    "steps": np.array(7, dtype=np.int64),
    "mask": np.array([True, False]),
    "bias": np.array([1.0, 2.0], dtype=np.float16),
    "nothing": np.zeros((0, 3), dtype=np.float32),
}
LAYOUT = ArrayLayout.of(MODEL)


def test_floating_arrays_are_released_in_order_and_a_0d_array_counts_one():
    assert LAYOUT.released_names == ("weight", "scale", "bias", "nothing")
    assert LAYOUT.dimension == 6 + 1 + 2
    np.testing.assert_array_equal(LAYOUT.flatten(MODEL), [0, 1, 2, 3, 4, 5, 0.5, 1, 2])


@pytest.mark.parametrize("dtype", ["int8", "int64", "uint8", "uint64", "bool"])
def test_integers_and_booleans_are_never_released(dtype):
    layout = ArrayLayout.of({"a": np.zeros(2), "count": np.ones(3, dtype)})
    assert layout.released_names == ("a",)
    restored = layout.restore(np.full(2, 9.0), {"a": np.zeros(2), "count": np.ones(3, dtype)})
    np.testing.assert_array_equal(restored["count"], np.ones(3, dtype))
    assert restored["count"].dtype == dtype


@pytest.mark.parametrize(
    "arrays", [{}, {"steps": np.array(3)}, {"a": np.zeros(0)}], ids=["none", "integer", "no entry"]
)
def test_an_empty_model_is_refused(arrays):
    with pytest.raises(ValueError, match="empty model"):
        ArrayLayout.of(arrays)


@pytest.mark.parametrize(
    "array",
    [np.zeros(2, complex), np.array(["a"]), np.array([None]), torch.zeros(2, dtype=torch.cfloat)],
    ids=["complex", "text", "objects", "torch complex"],
)
def test_an_unknown_dtype_is_refused_by_name(array):
    with pytest.raises(ValueError, match="array 'odd' has dtype"):
        ArrayLayout.of({"a": np.zeros(1), "odd": array})


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4", ">f8"])
def test_floating_dtypes_are_interchangeable(dtype):
    LAYOUT.check({**MODEL, "weight": np.zeros((2, 3), dtype)})
    LAYOUT.check({**MODEL, "steps": np.array(7, np.int32)})


def test_torch_and_numpy_have_the_same_layout():
    tensors = {name: torch.from_numpy(array) for name, array in MODEL.items()}
    assert ArrayLayout.of(tensors) == LAYOUT
    LAYOUT.check({**MODEL, "weight": torch.zeros(2, 3, dtype=torch.bfloat16, requires_grad=True)})


def test_the_order_of_keys_does_not_matter():
    shuffled = dict(reversed(MODEL.items()))
    LAYOUT.check(shuffled)
    assert LAYOUT.released(shuffled)[0] is MODEL["weight"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"weight": np.zeros((3, 2))}, r"'weight' has shape \(3, 2\), must be \(2, 3\)"),
        ({"scale": np.zeros(1)}, r"'scale' has shape \(1,\), must be \(\)"),
        ({"weight": np.zeros((2, 3), int)}, "'weight' has dtype int64, must be a floating dtype"),
        ({"steps": np.array(7.0)}, "'steps' has dtype float64, must be an integer"),
        ({"extra": np.zeros(1)}, r"missing \[\] and have extra \['extra'\]"),
    ],
)
def test_what_does_not_fit_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        LAYOUT.check({**MODEL, **wrong})


def test_a_missing_array_is_named():
    with pytest.raises(ValueError, match=r"missing \['bias'\]"):
        LAYOUT.check({name: array for name, array in MODEL.items() if name != "bias"})


def test_restore_is_the_inverse_of_flatten():
    restored = LAYOUT.restore(LAYOUT.flatten(MODEL), MODEL)
    assert list(restored) == list(MODEL)
    for name, array in MODEL.items():
        assert isinstance(restored[name], np.ndarray)
        assert restored[name].dtype == array.dtype
        np.testing.assert_array_equal(restored[name], array)
        assert array.size == 0 or not np.shares_memory(restored[name], array)


def test_restore_saturates_instead_of_overflowing():
    restored = LAYOUT.restore(np.full(9, 1e300), MODEL)
    assert restored["bias"].max() == np.finfo(np.float16).max
    assert restored["weight"].max() == np.finfo(np.float32).max
    assert restored["scale"] == 1e300


def test_restore_widens_bfloat16_because_numpy_lacks_it():
    model = {"a": torch.zeros(2, dtype=torch.bfloat16)}
    restored = ArrayLayout.of(model).restore(np.array([1.5, 2.5]), model)
    assert restored["a"].dtype == np.float32


@pytest.mark.parametrize("shape", [(8,), (10,), (3, 3)])
def test_a_vector_of_the_wrong_shape_is_refused(shape):
    with pytest.raises(ValueError, match="vector has shape"):
        LAYOUT.restore(np.zeros(shape), MODEL)


def test_arrays_become_numpy_without_a_copy_where_possible():
    array, tensor = np.zeros(3), torch.zeros(3, requires_grad=True)
    assert as_numpy(array) is array
    assert np.shares_memory(as_numpy(tensor), tensor.detach().numpy())
    assert as_numpy(torch.ones(2, dtype=torch.bfloat16)).dtype == np.float32
    assert is_floating(torch.ones(2, dtype=torch.bfloat16))
    assert not is_floating(torch.ones(2, dtype=torch.int8))


def test_a_spec_knows_its_size():
    assert ArraySpec.of("a", np.zeros(())).size == 1
    assert ArraySpec.of("a", np.zeros((2, 0))).size == 0
