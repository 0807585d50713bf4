"""Secure aggregation on a SuperLink and three SuperNodes, whoever of them drops out, and when.

Three nodes that insist on three allow none to drop out, as the README's hospitals do. These insist
on two, so that a round can do without a node: without one that has not advertised keys, since a
majority of two neighbours is both of them.
"""

from pathlib import Path

import numpy as np
import pytest
from flwr.clientapp import ClientApp

from dpfl_flower.secagg.messages import Stage
from dpfl_flower.simulation import InProcessGrid, run_on_connection
from tests.support import integer_sums
from tests.support.deployment import free_prefix, host_in, shell, write_app
from tests.support.dropouts import TWO_OF_THREE, WITH_ABANDONED, dropping
from tests.support.secure_run import run_units

NODES = 3

CLIENT = """
from flwr.clientapp import ClientApp
from dpfl_flower.client import secure_aggregation_mod
from tests.support.dropouts import WITH_ABANDONED, dropping
from tests.support.integer_sums import train

app = ClientApp()
app.train(mods=[dropping(WITH_ABANDONED), secure_aggregation_mod])(train)
"""
SERVER = """
import numpy as np
from flwr.serverapp import ServerApp
from dpfl_flower.secagg import SecAggPlus
from tests.support.dropouts import WITH_ABANDONED
from tests.support.secure_run import run_units

app = ServerApp()

@app.main()
def main(grid, context):
    protocol = SecAggPlus(threshold=0.6, min_cohort=2)
    model = run_units(grid, nodes=3, rounds=len(WITH_ABANDONED), secure_aggregation=protocol)
    np.save(context.run_config["out"], model)
"""
HOSTS = """
set -eu
flower-superlink --insecure --port {prefix}3 --disable-runtime-dependency-installation &
mkdir -p "$FLWR_HOME"
cat >> "$FLWR_HOME/config.toml" <<END
[superlink.loopback]
address = "127.0.0.1:{prefix}3"
insecure = true
END
until : < /dev/tcp/127.0.0.1/{prefix}3; do kill -0 $!; sleep 0.2; done
for n in 0 1 2; do
  flower-supernode --insecure --superlink 127.0.0.1:{prefix}3 --port {prefix}$n \
    --node-config "partition-id=$n secagg-min-cohort=2" &
done
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_sums_of_three_supernodes_are_exact_for_every_way_to_drop_out_and_no_other_is_released(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [{n: Stage.ADVERTISE} for n in range(NODES)] + [{}] == TWO_OF_THREE
    with host_in(tmp_path, monkeypatch) as host:
        shell(host, HOSTS.format(prefix=free_prefix(NODES + 1)))
        run = run_on_connection(
            write_app(host, client=CLIENT, server=SERVER),
            "loopback",
            log_path=host / "run.log",
            run_config={"out": str(host / "model.npy")},
            timeout_seconds=600,
        )
        said = (host / "run.log").read_text()
        assert run.completed, said + (host / "log").read_text()
        model = np.load(host / "model.npy")
    assert said.count("abandoned") == len(WITH_ABANDONED) - len(TWO_OF_THREE), said
    app = ClientApp()
    app.train(mods=[dropping(TWO_OF_THREE)])(integer_sums.train)
    with InProcessGrid(app, num_supernodes=NODES) as grid:
        plain = run_units(grid, nodes=NODES, rounds=len(TWO_OF_THREE), secure_aggregation=None)
    np.testing.assert_array_equal(model, plain)
