"""What a run says of itself while it runs."""

import logging
import re

import numpy as np
import pytest

from dpfl_flower.accounting import EveryoneSampling
from dpfl_flower.clipping import FixedClipping
from dpfl_strategies import DPFedAvg, round_loop
from tests.support.recording_grid import RecordingGrid, adding, record


def test_the_start_up_in_the_first_round_is_not_taken_for_the_time_of_a_round(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = iter([50.0, 52.0, 56.0, 59.0])  # 50 s until the first round was done
    strategy = DPFedAvg(
        noise_multiplier=1.0,
        sampling=EveryoneSampling(2),
        clipping=FixedClipping(1.0),
        wait_seconds=0.0,
    )

    class Clock:
        monotonic = staticmethod(lambda: next(ends))

    monkeypatch.setattr(round_loop, "time", Clock)
    with caplog.at_level(logging.INFO, logger="flwr.dpfl"):
        strategy.start(RecordingGrid(adding(0.1), 2), record(np.zeros(3, np.float32)), 4)
    lines = [line for line in caplog.messages if line.startswith("[ROUND")]
    left = [re.findall(r"about (\d+) s left", line) for line in lines]
    assert left == [[], ["4"], ["3"], ["0"]]
