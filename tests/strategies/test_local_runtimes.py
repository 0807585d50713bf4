"""Local noise on Flower's own engine: the nodes' states, claims and sums survive its transport."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dpfl_flower.accounting import Composed, Gaussian, epsilon
from dpfl_flower.simulation.processes import MARK, new_mark, stop_marked
from tests.support.local_on_virtual_engine import (
    NODES,
    NOISE_MULTIPLIER,
    ROUNDS,
    SIZE,
    STEP,
    USERS,
)

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_local_noise_runs_on_flowers_virtual_client_engine(tmp_path):
    mark, out = new_mark(), tmp_path / "found.json"
    try:
        subprocess.run(
            [sys.executable, "-m", "tests.support.local_on_virtual_engine", str(out)],
            cwd=ROOT,
            env={**os.environ, MARK: mark},
            timeout=500,
            check=True,
        )
    finally:
        stop_marked(mark)
    event = Composed(Gaussian(NOISE_MULTIPLIER), ROUNDS)
    for unit, relation in (("node", "replace-one"), ("user", "add-or-remove-one")):
        found = json.loads(out.read_text())[unit]
        # A mean over 5000 coordinates: 6 standard errors are a sixth of it for users; for nodes
        # it is lost in the noise, of which only that it is no larger shows.
        units = NODES if unit == "node" else NODES * USERS
        stddev = NOISE_MULTIPLIER * np.sqrt(NODES * ROUNDS) / units
        assert found["mean"] == pytest.approx(ROUNDS * STEP, abs=6.1 * stddev / np.sqrt(SIZE))
        assert found["units"] == [unit] * NODES
        assert found["releases"] == [ROUNDS] * NODES
        spent = epsilon([event], delta=1e-5, relation=relation)
        assert found["epsilons"] == pytest.approx([spent] * NODES, rel=1e-3)
