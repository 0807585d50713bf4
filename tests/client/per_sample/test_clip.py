"""Which records a clip norm drops, however large it is."""

import math

import pytest
import torch

from dpfl_flower.client.clip_style import ClipStyle
from dpfl_flower.client.per_sample.clip import Clip


@pytest.mark.parametrize("style", ClipStyle)
@pytest.mark.parametrize("norm", [1e-10, 1.0, 1e300, 1.7e308])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_norm_that_is_not_finite_is_dropped_whatever_the_clip_norm(style, norm, value):
    squares = torch.tensor([(norm / 4) ** 2 if norm < 1e100 else 1.0, value], dtype=torch.float64)
    scaling = Clip(norm, style).scaling([squares])
    assert scaling.dropped is not None
    assert scaling.dropped.tolist() == [False, True]
    assert scaling.factors[0][1] == 0.0
    assert 0.0 < scaling.factors[0][0] < math.inf
