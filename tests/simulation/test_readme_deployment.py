"""The README's commands for real hosts, on the loopback interface: TLS, node keys, rosters."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from flwr.clientapp import ClientApp

from apps.medical.medical.report import Report
from dpfl_flower.simulation import InProcessGrid, run_on_connection
from tests.support import integer_sums
from tests.support.deployment import ROOT, free_prefix, host_in, shell, write_app
from tests.support.secure_run import run_units

README = ROOT / "README.md"
MARKER = "<!-- deployment, executed by tests/simulation/test_readme_deployment.py -->"
NODES = 3
SEPARATOR = "\0"

CLIENT = """
from flwr.clientapp import ClientApp
from dpfl_flower.client import secure_aggregation_mod
from tests.support.integer_sums import train

app = ClientApp()
app.train(mods=[secure_aggregation_mod])(train)
"""
SERVER = """
import numpy as np
from flwr.serverapp import ServerApp
from dpfl_flower.secagg import SecAggPlus
from tests.support.secure_run import run_units

app = ServerApp()

@app.main()
def main(grid, context):
    model = run_units(grid, nodes=3, secure_aggregation=SecAggPlus(rosters=True))
    np.save(context.run_config["out"], model)
"""


class Commands(NamedTuple):
    """The README's blocks, in its order."""

    superlink: str
    keys: str
    register: str
    supernodes: str
    run: str

    def script(self) -> str:
        """Return all of them as one script."""
        port = re.search(r"--port (\d+)", self.superlink)
        assert port is not None
        return "\n".join(
            [
                "set -eu",
                self.superlink,
                # A reader takes longer to get to the next block than the SuperLink to start.
                f"until : < /dev/tcp/localhost/{port[1]}; do kill -0 $!; sleep 0.2; done",
                self.keys,
                self.register,
                self.supernodes,
                self.run,
            ]
        )


def free_ports() -> dict[str, str]:
    """Return ports to take the place of the README's: the SuperLink's, and a prefix of three."""
    prefix = free_prefix(NODES + 1)
    return {"9092": f"{prefix}{NODES}", "910$n": f"{prefix}$n"}


def commands() -> Commands:
    """Return the README's commands, for one round and on free ports."""
    blocks = re.findall(re.escape(MARKER) + r"\n```bash\n(.*?)```", README.read_text(), re.S)
    assert len(blocks) == 5
    text = SEPARATOR.join(blocks)
    for old, new in {**free_ports(), "num-server-rounds=30": "num-server-rounds=1"}.items():
        assert old in text, f"{old} is no longer in the README"
        text = text.replace(old, new)
    return Commands(*text.split(SEPARATOR))


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a folder that stands for the repository's root; stop what was started in it."""
    with host_in(tmp_path, monkeypatch) as folder:
        yield folder


def stages(host: Path, node: int) -> dict[int, list[list[int]]]:
    """Return the (round, stage) pairs that a node's journal holds, by run."""
    found: dict[int, list[list[int]]] = {}
    for line in (host / f"hospital{node}" / "journal").read_text().splitlines():
        run_id, _, *progress = json.loads(line)
        found.setdefault(run_id, []).append(progress)
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_readmes_commands_run_three_hospitals_and_a_masked_sum_there_is_the_plain_one(
    host: Path,
) -> None:
    printed = shell(host, commands().script())
    assert "3 of 3 hospitals trained, 1 rounds" in printed
    report = Report.load(host / "runs" / "clinic")
    assert [hospital.dataset for hospital in report.hospitals] == [
        f"heart-disease/{name}" for name in ("Cleveland", "Hungary", "Switzerland")
    ]
    assert all(h.durable and 0.9 < h.epsilon <= 1.0 for h in report.hospitals)
    assert report.worst_epsilon < report.epsilon_everywhere < math.inf

    # The same three answer sums of units without noise of their own, which they insist on for
    # records only; the noise that the server adds is seeded, so that the sum shows.
    app_folder = write_app(host, client=CLIENT, server=SERVER)
    run = run_on_connection(
        app_folder,
        "clinic",
        log_path=host / "run.log",
        run_config={"out": str(host / "model.npy")},
        timeout_seconds=600,
    )
    assert run.completed, (host / "run.log").read_text() + (host / "log").read_text()
    app = ClientApp()
    app.train()(integer_sums.train)
    with InProcessGrid(app, num_supernodes=NODES) as grid:
        plain = run_units(grid, nodes=NODES, secure_aggregation=None)
    np.testing.assert_array_equal(np.load(host / "model.npy"), plain)
    for node in range(NODES):
        # Five stages, with the signatures that rosters add, in each of the two runs.
        assert list(stages(host, node).values()) == [[[1, stage] for stage in range(1, 6)]] * 2
