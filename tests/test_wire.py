import io

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.lib import format as npy

from dpfl_flower.wire import array_record, config_record, read_array, write_array


def serialized(array, version=None):
    stream = io.BytesIO()
    npy.write_array(stream, array, version=version, allow_pickle=True)
    return Array(str(array.dtype), tuple(array.shape), "numpy.ndarray", stream.getvalue())


every_layout = pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(12.0)[::3],
        np.array(2.5),
        np.zeros((0, 3), np.float16),
        np.array([True, False]),
        np.arange(3, dtype=">i8"),
    ],
    ids=["C", "Fortran", "strided", "0-d", "empty", "bool", "big endian"],
)


@every_layout
def test_it_reads_what_flower_reads(array):
    message = Array(array)
    ours, theirs = read_array(message), message.numpy()
    np.testing.assert_array_equal(ours, theirs)
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape


@every_layout
def test_flower_reads_what_it_writes(array):
    message, theirs = write_array(array), Array(array)
    np.testing.assert_array_equal(message.numpy(), array)
    assert message.numpy().dtype == array.dtype
    assert (message.dtype, message.shape, message.stype) == (
        theirs.dtype,
        theirs.shape,
        theirs.stype,
    )
    if array.flags.c_contiguous:
        assert message.data == theirs.data


def test_python_objects_are_not_written():
    with pytest.raises(ValueError, match="Python objects"):
        write_array(np.array([print, {}], dtype=object))


def test_the_view_shares_the_message_and_cannot_be_written():
    message = Array(np.arange(5.0))
    view = read_array(message)
    assert np.shares_memory(view, np.frombuffer(message.data, np.uint8))
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1.0


def test_a_later_version_of_the_header_is_read():
    array = np.arange(4.0)
    np.testing.assert_array_equal(read_array(serialized(array, (2, 0))), array)


def test_python_objects_are_never_unpickled():
    with pytest.raises(ValueError, match="Python objects"):
        read_array(serialized(np.array([print, {}], dtype=object)))


@pytest.mark.parametrize(
    "data", [b"", b"garbage" * 50, serialized(np.arange(100.0)).data[:-8]], ids=str
)
def test_bytes_that_are_no_array_are_refused(data):
    with pytest.raises(ValueError):
        read_array(Array("float64", (100,), "numpy.ndarray", data))


def test_a_header_longer_than_any_honest_one_is_refused():
    huge = b"\x93NUMPY\x02\x00" + (2**31).to_bytes(4, "little") + b" " * 64
    with pytest.raises(ValueError, match="header of"):
        read_array(Array("float64", (100,), "numpy.ndarray", huge))


def test_an_unknown_version_and_an_unknown_serialization_are_refused():
    good = serialized(np.arange(4.0)).data
    with pytest.raises(ValueError, match="version="):
        read_array(Array("float64", (4,), "numpy.ndarray", good[:6] + b"\x09" + good[7:]))
    with pytest.raises(TypeError, match="stype='torch'"):
        read_array(Array("float64", (4,), "torch", good))


@pytest.mark.parametrize("other", [ArrayRecord, ConfigRecord, MetricRecord, None])
def test_a_record_of_another_kind_is_none_as_in_flowers_views(other):
    content = RecordDict({} if other is None else {"it": other()})
    assert config_record(content, "it") is content.config_records.get("it")
    if other is ArrayRecord:
        assert array_record(content, "it") is content.array_records["it"]
    else:
        with pytest.raises(KeyError, match="it"):
            array_record(content, "it")
