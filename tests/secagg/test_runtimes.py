"""The same secure run on the in-process runtime, to the last bit, with dropouts at every stage.

On Flower's own engine: tests/simulation/test_virtual_engine.py.
"""

from flwr.clientapp import ClientApp

from dpfl_flower.client import secure_aggregation_mod
from dpfl_flower.secagg import SecAggPlus
from dpfl_flower.simulation import InProcessGrid
from tests.support.secure_run import dropping, require_plain_sums, run, train

NODES = 6
ROUNDS = 5


def test_the_in_process_runtime_gives_the_same_model_as_no_masks_at_all():
    app = ClientApp()
    app.train(mods=[dropping, secure_aggregation_mod])(train)
    with InProcessGrid(app, num_supernodes=NODES) as grid:
        # Two neighbours of five may drop out: t = 3, and 2 t > 5.
        protocol = SecAggPlus(threshold=0.6)
        model = run(grid, nodes=NODES, rounds=ROUNDS, secure_aggregation=protocol)
    require_plain_sums(model, nodes=NODES, rounds=ROUNDS)
