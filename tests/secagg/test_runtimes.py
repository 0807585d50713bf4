"""The same secure run on Flower's own runtimes, to the last bit, with dropouts at every stage."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flwr.clientapp import ClientApp

from dpfl_flower.client import secure_aggregation_mod
from dpfl_flower.simulation import InProcessGrid
from dpfl_flower.simulation.processes import MARK, new_mark, stop_marked
from tests.support.secagg_on_virtual_engine import NODES, PROTOCOL, ROUNDS
from tests.support.secure_run import dropping, in_process, run, train

ROOT = Path(__file__).parents[2]


def require_plain_sums(model):
    """Require the model of the same survivors without masks, and that the dropouts count."""
    expected = in_process(nodes=NODES, rounds=ROUNDS, dropouts=True)
    np.testing.assert_array_equal(model, expected)
    assert np.any(model != in_process(nodes=NODES, rounds=ROUNDS))


def test_the_in_process_runtime_gives_the_same_model_as_no_masks_at_all():
    app = ClientApp()
    app.train(mods=[dropping, secure_aggregation_mod])(train)
    with InProcessGrid(app, num_supernodes=NODES) as grid:
        model = run(grid, nodes=NODES, rounds=ROUNDS, secure_aggregation=PROTOCOL)
    require_plain_sums(model)


@pytest.mark.slow
def test_flowers_virtual_client_engine_gives_the_same_model_as_no_masks_at_all(tmp_path):
    mark, out = new_mark(), tmp_path / "model.npy"
    try:
        subprocess.run(
            [sys.executable, "-m", "tests.support.secagg_on_virtual_engine", str(out)],
            cwd=ROOT,
            env={**os.environ, MARK: mark},
            timeout=500,
            check=True,
        )
    finally:
        stop_marked(mark)
    require_plain_sums(np.load(out))
