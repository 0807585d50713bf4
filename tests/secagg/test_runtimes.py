"""The same secure run on Flower's own runtimes, to the last bit."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dpfl_flower.simulation.processes import MARK, new_mark, stop_marked
from tests.support.secagg_on_virtual_engine import NODES, ROUNDS
from tests.support.secure_run import in_process

ROOT = Path(__file__).parents[2]


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
    np.testing.assert_array_equal(np.load(out), in_process(nodes=NODES, rounds=ROUNDS))
