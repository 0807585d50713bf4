"""Progress is what the strategies log, on every engine."""

import logging

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from dpfl_flower import EveryoneSampling, FixedClipping, PrivacyBudget
from dpfl_flower.cli.listener import LogLine
from dpfl_flower.cli.progress import RoundProgress
from dpfl_flower.simulation import InProcessGrid
from dpfl_strategies import DPFedAvg


def test_what_a_strategy_logs_is_understood(caplog: pytest.LogCaptureFixture) -> None:
    client = ClientApp()

    @client.train()
    def train(message: Message, context: object) -> Message:
        record = message.content.array_records["arrays"]
        content = {"arrays": record, "metrics": MetricRecord({"num-examples": 1})}
        return Message(RecordDict(content), reply_to=message)

    strategy = DPFedAvg(
        budget=PrivacyBudget(epsilon=8.0, delta=1e-3),
        sampling=EveryoneSampling(3),
        clipping=FixedClipping(1.0),
    )
    with (
        caplog.at_level(logging.INFO, logger="flwr.dpfl"),
        InProcessGrid(client, num_supernodes=3) as grid,
    ):
        strategy.start(grid, ArrayRecord([np.zeros(4, np.float32)]), num_rounds=2)
    seen = {p.server_round: p for m in caplog.messages if (p := RoundProgress.parse(m))}
    assert sorted(seen) == [1, 2]
    last = seen[2].after(seen[1])
    assert last.num_rounds == 2
    assert last.epsilon == pytest.approx(8, abs=0.01)
    assert last.budget == 8
    assert last.seconds_left == 0


@pytest.mark.parametrize(
    ("line", "epsilon", "budget"),
    [
        ("[ROUND 1/9] worst node at epsilon 0.301, about 4 s left", 0.301, None),
        ("[ROUND 1/9] epsilon inf of 8, about 4 s left", float("inf"), 8.0),
        ("[ROUND 1/9] 1 releases charged, about 4 s left", None, None),
        ("[ROUND 1/9] no epsilon: the noise is seeded, about 4 s left", None, None),
        ("\n[ROUND 1/9]", None, None),
    ],
)
def test_every_form_of_the_line_is_understood(
    line: str, epsilon: float | None, budget: float | None
) -> None:
    progress = RoundProgress.parse(line)
    assert progress is not None
    assert (progress.server_round, progress.num_rounds) == (1, 9)
    assert (progress.epsilon, progress.budget) == (epsilon, budget)
    assert progress.metrics == {}


def test_what_a_round_does_not_say_is_kept_from_before() -> None:
    first = RoundProgress(1, 3, epsilon=0.5, budget=1.0, metrics={"rmse": 2.0})
    second = RoundProgress(2, 3, metrics={"mae": 1.0}).after(first)
    assert str(second) == "round 2/3, epsilon 0.5 of 1, rmse 2, mae 1"


def test_a_noised_metric_is_shown_with_its_deviation_and_read_as_the_metric() -> None:
    line = "[ROUND 2/3] epsilon 0.5, accuracy 0.954 ± 0.05, loss 1e-05 ± 2.1e-06, rmse 2"
    progress = RoundProgress.parse(line)
    assert progress is not None
    assert progress.metrics == {"accuracy": 0.954, "loss": 1e-5, "rmse": 2.0}
    assert progress.metric_noise == {"accuracy": 0.05, "loss": 2.1e-6}
    assert str(progress) == line.replace("[ROUND 2/3]", "round 2/3,")
    later = RoundProgress(3, 3).after(progress)
    assert str(later).endswith("accuracy 0.954 ± 0.05, loss 1e-05 ± 2.1e-06, rmse 2")


def test_log_lines_lose_the_runtimes_decoration() -> None:
    assert LogLine.parse("INFO :      [ROUND 1/2]") == LogLine("INFO", "[ROUND 1/2]")
    assert LogLine.parse("hospital | epsilon") == LogLine("", "hospital | epsilon")
