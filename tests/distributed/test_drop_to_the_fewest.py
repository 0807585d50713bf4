"""Whoever drops out when, and whoever leaves its share out: the sum is as noisy as was planned."""

import numpy as np
import pytest

from dpfl_flower.distributed import design
from dpfl_flower.quantize import centred, reduced
from dpfl_flower.rng import SeededRandom
from dpfl_flower.secagg import RoundAbandoned
from dpfl_flower.secagg.messages import Stage
from tests.support.secagg import Cast, plan, with_rosters

NODES = (1, 2, 3, 4, 5, 6)
COLLUDERS = 2
WIDTH = 1 << 20


@pytest.mark.parametrize("noise", ["discrete-gaussian", "skellam"])
@pytest.mark.parametrize("stage", Stage)
def test_a_sum_of_the_fewest_survivors_with_colluders_is_as_noisy_as_planned(noise, stage):
    it = design(
        noise_multiplier=2.0,
        rounds=1,
        dimension=WIDTH,
        clip_norm=1.0,
        num_nodes=len(NODES),
        min_survivors=5,
        max_units=len(NODES),
        colluders=COLLUDERS,
        noise=noise,
        unit="node",
        relation="zero-out",
    )
    parts = {n: np.zeros(WIDTH, np.int64) for n in NODES}
    for n in NODES[COLLUDERS:]:
        parts[n] = reduced(it.share.sample(WIDTH, SeededRandom(n)), bits=it.grid.bits)
    settings = {"min_cohort": it.min_survivors, "colluders": it.colluders, "rosters": True}
    masked = plan(NODES, width=WIDTH, bits=it.grid.bits, **settings)
    rules = with_rosters(NODES, min_cohort=it.min_survivors, colluders=it.colluders)
    summed = Cast(parts, rules).run(masked, dropping={6: stage})
    assert len(summed.survivors) == (5 if stage <= Stage.MASK else 6)
    planned = (it.noise_multiplier * it.grid.sensitivity_units) ** 2
    # A million squares: a standard error of 0.14 %, so that 1 % is seven of them. One share more
    # in what the plan counts on, 4 where there are 3, would be a third too little.
    seen = centred(summed.total, bits=it.grid.bits).astype(float).var()
    assert seen > 0.99 * planned
    if stage <= Stage.MASK:
        assert seen < 1.01 * planned
        with pytest.raises(RoundAbandoned):
            Cast(parts, rules).run(masked, dropping={6: stage, 3: stage})
