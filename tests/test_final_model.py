"""The final model is written whole, to the directory that the run was given."""

from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from safetensors import safe_open

from dpfl_flower.final_model import MODEL, load_model, run_directory, save_model
from tests.support.recording_grid import RecordingGrid


def grid_with(**overrides: object) -> SimpleNamespace:
    return SimpleNamespace(run=SimpleNamespace(override_config=overrides))


def test_every_shape_and_order_comes_back(tmp_path):
    arrays = {
        "scalar": np.array(1.5, np.float32),
        "transposed": np.arange(6.0).reshape(2, 3).T,
        "count": np.array([3], np.int64),
        "none": np.zeros((0, 2), np.float32),
    }
    record = ArrayRecord({name: Array(array) for name, array in arrays.items()})
    path = save_model(record, tmp_path / "new", notes={"rounds": "3"})
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == [MODEL]
    found = load_model(path)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    with safe_open(path, "np") as file:
        assert file.metadata() == {"rounds": "3"}


def test_the_directory_is_the_runs_override_or_the_variable(tmp_path, monkeypatch):
    monkeypatch.delenv("DPFL_RUN_DIR", raising=False)
    assert run_directory(grid_with()) is None
    assert run_directory(grid_with(**{"run-dir": "relative"})) is None
    assert run_directory(grid_with(**{"run-dir": 3})) is None
    assert run_directory(grid_with(**{"run-dir": str(tmp_path)})) == tmp_path
    monkeypatch.setenv("DPFL_RUN_DIR", "/elsewhere")
    assert run_directory(grid_with(**{"run-dir": str(tmp_path)})) == tmp_path
    assert str(run_directory(grid_with())) == "/elsewhere"


@pytest.mark.parametrize("raised", [NotImplementedError, TypeError, AttributeError])
def test_a_grid_that_knows_no_run_has_no_directory(raised, monkeypatch):
    monkeypatch.delenv("DPFL_RUN_DIR", raising=False)

    class Without(RecordingGrid):
        @property
        def run(self):
            raise raised

    assert run_directory(Without(lambda message: None, 1)) is None
