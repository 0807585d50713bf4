"""The same secure run on the in-process runtime, to the last bit, whoever drops out at which stage.

On Flower's own engine: tests/simulation/test_virtual_engine.py.
"""

from flwr.clientapp import ClientApp

from dpfl_flower.client import secure_aggregation_mod
from dpfl_flower.secagg import SecAggPlus
from dpfl_flower.simulation import InProcessGrid
from tests.support.dropouts import EVERY_WAY, NODES, dropping
from tests.support.secure_run import require_plain_sums, run, train


def test_every_way_of_six_nodes_to_drop_out_gives_the_model_of_no_masks_at_all():
    app = ClientApp()
    app.train(mods=[dropping(EVERY_WAY), secure_aggregation_mod])(train)
    with InProcessGrid(app, num_supernodes=NODES) as grid:
        # A majority of the neighbours must stay: 0.6 of 5 is 3, of 4 is 3, of 3 and of 2 is 2.
        protocol = SecAggPlus(threshold=0.6)
        model = run(grid, nodes=NODES, rounds=len(EVERY_WAY), secure_aggregation=protocol)
    require_plain_sums(model, EVERY_WAY)
