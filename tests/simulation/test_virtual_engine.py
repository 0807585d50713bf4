"""What has to survive Flower's virtual client engine: its processes, its transport, its states."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dpfl_flower.accounting import Composed, Gaussian, Ledger, epsilon
from dpfl_flower.simulation.processes import MARK, new_mark, stop_marked
from tests.support import sums_clients
from tests.support import virtual_engine as engine
from tests.support.dropouts import EVERY_WAY
from tests.support.secure_run import require_plain_sums

ROOT = Path(__file__).parents[2]

# All ways to drop out take four minutes, mostly of waiting, and the first test waits for them.
pytestmark = [pytest.mark.slow, pytest.mark.slowest, pytest.mark.timeout(1600)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where one run of the engine left what came of all that it ran."""
    mark, out = new_mark(), tmp_path_factory.mktemp("engine")
    said = out / "said.txt"  # megabytes: a traceback for each node that drops out
    try:
        with said.open("w") as log:
            done = subprocess.run(
                [sys.executable, "-m", "tests.support.virtual_engine", str(out)],
                cwd=ROOT,
                env={**os.environ, MARK: mark},
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=1500,
                check=False,
            )
    finally:
        stop_marked(mark)
    assert done.returncode == 0, said.read_text()[-5000:]
    return out


def test_secure_aggregation_gives_the_model_of_no_masks_whichever_nodes_drop_out_at_which_stage(
    folder: Path,
) -> None:
    model = np.load(folder / engine.SECURE_MODEL)
    assert len(EVERY_WAY) == 465
    require_plain_sums(model, EVERY_WAY)


def test_dp_sgd_nodes_are_averaged_under_masks_with_their_claims(folder: Path) -> None:
    found = json.loads((folder / engine.MASKED_RESULTS).read_text())
    assert found["releases"] == [sums_clients.STEPS] * engine.NODES
    assert found["durable"] == [True] * engine.NODES
    # Three noisy steps of the mean of six nodes from zero towards weights of 1.
    weight = np.array(found["weight"])
    assert np.all(weight != 0) and np.linalg.norm(weight) < engine.MAX_UPDATE_NORM
    for node in range(engine.NODES):
        path = folder / engine.MASKED_LEDGERS / f"{node}.jsonl"
        with Ledger.open(path, dataset="sums", delta=sums_clients.DELTA, unit="example") as ledger:
            assert ledger.releases == sums_clients.STEPS


def test_local_noise_is_what_the_nodes_say_that_it_is(folder: Path) -> None:
    event = Composed(Gaussian(engine.NOISE_MULTIPLIER), engine.LOCAL_ROUNDS)
    results = json.loads((folder / engine.LOCAL_RESULTS).read_text())
    for unit, relation in (("node", "replace-one"), ("user", "add-or-remove-one")):
        found = results[unit]
        # A mean over 5000 coordinates: 6 standard errors are an eighth of it for users; for nodes
        # it is lost in the noise, of which only that it is no larger shows.
        units = engine.NODES if unit == "node" else engine.NODES * engine.USERS
        stddev = engine.NOISE_MULTIPLIER * np.sqrt(engine.NODES * engine.LOCAL_ROUNDS) / units
        expected = engine.LOCAL_ROUNDS * engine.STEP
        assert found["mean"] == pytest.approx(expected, abs=6.1 * stddev / np.sqrt(engine.SIZE))
        assert found["units"] == [unit] * engine.NODES
        assert found["releases"] == [engine.LOCAL_ROUNDS] * engine.NODES
        spent = epsilon([event], delta=1e-5, relation=relation)
        assert found["epsilons"] == pytest.approx([spent] * engine.NODES, rel=1e-3)


def test_flowers_fedavg_trains_dp_sgd_clients(folder: Path) -> None:
    models = np.load(folder / engine.SUMS_MODELS)
    assert models["names"].tolist() == ["weight", "bias"]
    assert not np.array_equal(models["before"], models["after"])
    for node in range(engine.NODES):
        path = folder / f"{node}.jsonl"
        with Ledger.open(path, dataset="sums", delta=sums_clients.DELTA, unit="example") as ledger:
            assert ledger.releases == sums_clients.STEPS * sums_clients.ROUNDS
