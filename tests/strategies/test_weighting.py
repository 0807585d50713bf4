import math

import pytest

from dpfl_strategies import NumExamplesWeighting, UniformWeighting


@pytest.mark.parametrize("reported", [math.nan, -1, 0, 5, 1e300, math.inf])
def test_weights_stay_within_zero_and_one_whatever_a_client_reports(reported):
    assert 0 <= NumExamplesWeighting(w_max=10).weigh(reported) <= 1
    assert UniformWeighting().weigh(reported) == 1


def test_weights_grow_linearly_up_to_w_max():
    weighting = NumExamplesWeighting(w_max=200, mean_weight=0.5)
    assert [weighting.weigh(n) for n in (0, 50, 200, 400)] == [0, 0.25, 1, 1]
    assert weighting.mean_weight == 0.5
    assert UniformWeighting().mean_weight == 1


def test_bad_constants_are_refused():
    with pytest.raises(ValueError, match="w_max=0"):
        NumExamplesWeighting(w_max=0)
    with pytest.raises(ValueError, match=r"mean_weight=1\.5"):
        NumExamplesWeighting(w_max=1, mean_weight=1.5)
