import re
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord

from dpfl_flower.client import DPSGDClient
from dpfl_flower.secagg import SecAggPlus
from dpfl_flower.simulation import InProcessGrid
from dpfl_strategies import DPFedAvg
from tests.support.node import context
from tests.support.recording_grid import RecordingGrid, adding, record

README = Path(__file__).parent.parent / "README.md"


def code_after(marker):
    return re.search(re.escape(marker) + r"\n```python\n(.*?)```", README.read_text(), re.S)[1]


def test_the_readmes_subclass_runs_as_written():
    code = code_after("<!-- executed by tests/test_readme.py -->")
    body = [line for line in code.splitlines() if line.strip()]
    assert len(body) <= 16
    names = {}
    exec(code, names)
    strategy = names["strategy"]
    assert isinstance(strategy, DPFedAvg)
    grid = RecordingGrid(adding(0.1), 10)
    result = strategy.start(grid, record(np.zeros(4, np.float32)), num_rounds=4)
    assert result.rounds == 4
    assert 0 < result.privacy.epsilon <= 4.0


def test_the_readmes_one_changed_line_is_a_strategy():
    code = code_after("## Change one line\n")
    names = {}
    exec(code, names)
    assert isinstance(names["strategy"], DPFedAvg)


def test_the_readmes_dp_sgd_client_trains_and_says_what_it_spent():
    names = {}
    exec(code_after("<!-- DP-SGD, executed by tests/test_readme.py -->"), names)
    client = names["client_fn"](context())
    assert isinstance(client, DPSGDClient)
    client.fit(client.get_parameters({}), {})
    assert 0 < client.privacy_claim()["epsilon"] <= 3.0


def test_the_readmes_users_train_inside_their_nodes():
    names = {}
    exec(code_after("<!-- users, executed by tests/test_readme.py -->"), names)
    start = [np.zeros((2, 13), np.float32), np.zeros(2, np.float32)]
    arrays = ArrayRecord(dict(zip(("weight", "bias"), map(Array, start), strict=True)))
    with InProcessGrid(names["app"], num_supernodes=4) as grid:
        result = names["strategy"].start(grid, arrays, num_rounds=2)
    assert result.privacy.unit == "user" and 0 < result.privacy.epsilon <= 8.0
    assert all(np.any(array.numpy()) for array in result.arrays.values())


def test_the_readmes_dp_sgd_nodes_are_averaged_under_masks():
    names = {}
    for marker in ("DP-SGD", "secure", "masked DP-SGD"):
        exec(code_after(f"<!-- {marker}, executed by tests/test_readme.py -->"), names)
    start = names["client_fn"](context()).get_parameters({})
    with InProcessGrid(names["app"], num_supernodes=4) as grid:
        result = names["strategy"].start(grid, record(*start), num_rounds=1)
    assert 0 < result.node_privacy.worst.epsilon <= 3.0 and len(result.node_privacy.claims) == 4
    assert np.any(result.arrays["a0"].numpy() != start[0])


def test_the_readmes_secure_strategy_is_one():
    names = {}
    exec(code_after("<!-- secure, executed by tests/test_readme.py -->"), names)
    assert isinstance(names["strategy"], DPFedAvg)
    assert isinstance(names["SecAggPlus"](), SecAggPlus)
