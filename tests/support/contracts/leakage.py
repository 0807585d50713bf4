"""Nothing un-noised leaves a strategy: a sentinel goes in wherever a client can write.

It is looked for in all that a run sends, logs, prints, writes and returns, or raises.
"""

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)

from dpfl_flower.accounting import EveryoneSampling
from dpfl_strategies import AllClientsFailed, NumExamplesWeighting
from tests.support.contracts import sentinel
from tests.support.contracts.sentinel import COUNT, NUMBER, WORD
from tests.support.contracts.strategy import StrategySubject, flat
from tests.support.node import all_bytes
from tests.support.recording_grid import adding, record, reply
from tests.support.scripted_grid import Answer, ScriptedGrid

NODES = 3
ROUNDS = 2
Place = Callable[[Message], Answer]


def _arrays(question: Message, **changes: np.ndarray) -> ArrayRecord:
    sent = {name: array.numpy() for name, array in question.content["arrays"].items()}
    return ArrayRecord({name: Array(np.asarray(a)) for name, a in (sent | changes).items()})


def _update(question: Message) -> Answer:
    return reply(_arrays(question, a0=np.full((2, 3), NUMBER, np.float32), a1=np.full(2, NUMBER)))


def _one_entry(question: Message) -> Answer:
    return reply(_arrays(question, a1=np.array([0.0, NUMBER])))


def _beside_a_missing_value(question: Message) -> Answer:
    return reply(_arrays(question, a1=np.array([np.nan, NUMBER])))


def _integer_array(question: Message) -> Answer:
    return reply(_arrays(question, a2=np.array(COUNT)))


def _array_name(question: Message) -> Answer:
    return reply(_arrays(question, **{WORD: np.zeros(1)}))


def _shape(question: Message) -> Answer:
    return reply(_arrays(question, a1=np.zeros((COUNT, 0))))


def _dtype(question: Message) -> Answer:
    arrays = _arrays(question)
    arrays["a1"] = Array(WORD, (2,), "numpy.ndarray", WORD.encode())
    return reply(arrays)


def _no_array(question: Message) -> Answer:
    arrays = _arrays(question)
    arrays["a1"].data = f"{WORD} {NUMBER}".encode()
    return reply(arrays)


def _exception(question: Message) -> Answer:
    # As Flower answers when a ClientApp raises.
    error = ValueError(f"{WORD} has a value of {NUMBER}")
    return Error(code=1, reason=f"ClientAppException: {error}\nTraceback: {error!r}")


def _metric(question: Message) -> Answer:
    return reply(_arrays(question), **{"loss": NUMBER, WORD: COUNT, "rows": [COUNT, COUNT]})


def _count(question: Message) -> Answer:
    return reply(_arrays(question), num_examples=COUNT)


def _count_of_another_type(question: Message) -> Answer:
    return reply(_arrays(question), num_examples=[COUNT, COUNT])


def _other_records(question: Message) -> Answer:
    content = reply(_arrays(question))
    content[WORD] = ConfigRecord({WORD: WORD, "privacy": NUMBER})
    content["privacy"] = ConfigRecord({"epsilon": NUMBER, "dataset": WORD, "events": WORD})
    content["more"] = MetricRecord({WORD: COUNT})
    return content


def _two_array_records(question: Message) -> Answer:
    return RecordDict({WORD: _arrays(question), f"{WORD}2": _arrays(question)})


PLACES: dict[str, Place] = {
    function.__name__.strip("_").replace("_", " "): function
    for function in (
        _update,
        _one_entry,
        _beside_a_missing_value,
        _integer_array,
        _array_name,
        _shape,
        _dtype,
        _no_array,
        _exception,
        _metric,
        _count,
        _count_of_another_type,
        _other_records,
        _two_array_records,
    )
}


class NothingUnnoisedLeaves(StrategySubject):
    """Whatever a client writes, wherever it can, is in nothing that a run gives out."""

    @pytest.mark.parametrize("weighting", [None, NumExamplesWeighting(w_max=10**8)])
    @pytest.mark.parametrize("place", list(PLACES))
    def test_a_sentinel_is_found_nowhere(self, place, weighting, tmp_path, caplog, capfd):
        caplog.set_level(0)
        grid = _grid(PLACES[place])
        strategy = self._watched_strategy(tmp_path, weighting=weighting)
        result = strategy.start(grid, start_arrays(), num_rounds=ROUNDS)
        assert len(grid.pushed) == NODES * ROUNDS
        self._require_absent(grid, tmp_path, caplog, capfd)
        sentinel.require_absent_from_object(result, "the result")
        sentinel.require_absent_from_object(result.arrays, "the model")
        sentinel.require_absent_from_object(vars(result), "the result's fields")

    @pytest.mark.parametrize("place", ["exception", "array name", "shape", "dtype", "no array"])
    def test_a_sentinel_is_not_in_what_a_failing_run_raises(self, place, tmp_path, caplog, capfd):
        caplog.set_level(0)
        grid = ScriptedGrid(PLACES[place], NODES)
        with pytest.raises(AllClientsFailed) as failure:
            self._watched_strategy(tmp_path, give_up_after=1).start(
                grid, start_arrays(), num_rounds=1
            )
        error: BaseException | None = failure.value
        while error is not None:
            sentinel.require_absent(repr(error), "what was raised")
            error = error.__cause__ or error.__context__
        self._require_absent(grid, tmp_path, caplog, capfd)

    def test_the_sum_without_noise_is_kept_nowhere(self, tmp_path, caplog, capfd):
        caplog.set_level(0)

        def run(directory: Path):
            strategy = self._watched_strategy(directory, weighting=None)
            grid = ScriptedGrid(adding(0.123), NODES)
            return grid, strategy.start(grid, start_arrays(), num_rounds=ROUNDS)

        with self.noise_replaced(lambda n: np.zeros(n, np.int64)):
            _, bare = run(tmp_path / "bare")
        with self.noise_replaced(lambda n: np.ones(n, np.int64)):
            _, one_more = run(tmp_path / "one more")
        unit = (flat(one_more.arrays) - flat(bare.arrays))[-1] / ROUNDS
        grid, result = run(tmp_path / "noisy")
        kept = [path.read_bytes() for path in (tmp_path / "noisy").rglob("*") if path.is_file()]
        sent = [all_bytes(message.content) for message in grid.pushed]
        returned = [pickle.dumps(result), *(array.data for array in result.arrays.values())]
        # A node moves each round by the same, so the sum of a round is the last one's half.
        for mean in (flat(bare.arrays), flat(bare.arrays) / ROUNDS):
            units = (mean / unit).round()
            for found in (mean, units, mean * NODES):
                for dtype in (np.float64, np.float32, np.int64):
                    pair = found[-2:].astype(dtype).tobytes()
                    if any(pair):
                        assert not any(pair in data for data in [*kept, *sent, *returned])

    def test_metrics_that_are_let_through_say_that_they_are_not_private(
        self, tmp_path, caplog, capfd
    ):
        caplog.set_level(0)
        grid = ScriptedGrid(_metric, NODES)
        strategy = self._watched_strategy(tmp_path, metrics="not_private")
        result = strategy.start(grid, start_arrays(), num_rounds=1)
        assert result.train_metrics_clientapp[1]["not_private/loss"] == NUMBER
        for line in [*caplog.text.splitlines(), *"".join(capfd.readouterr()).splitlines()]:
            if "not_private/" not in line:
                sentinel.require_absent(line, "a line that is not marked")
        sentinel.require_absent_from_messages(grid.pushed, "a message")
        sentinel.require_absent_from_directory(tmp_path)

    def test_the_search_finds_what_is_there(self, tmp_path, caplog):
        caplog.set_level(0)
        grid = _grid(_update)
        grid.send_and_receive([_question()])
        with pytest.raises(AssertionError, match="float"):
            sentinel.require_absent_from_messages(grid.replied, "a reply")
        (tmp_path / "f").write_bytes(np.full(3, NUMBER).tobytes())
        with pytest.raises(AssertionError, match="float64"):
            sentinel.require_absent_from_directory(tmp_path)
        grid = _grid(_count)
        grid.send_and_receive([_question()])
        with pytest.raises(AssertionError, match="varint"):
            sentinel.require_absent_from_messages(grid.replied, "a reply")
        with pytest.raises(AssertionError, match="word"):
            sentinel.require_absent_from_object({"a": [WORD]}, "an object")

    # --- inside -------------------------------------------------------------------------------

    def _watched_strategy(self, directory: Path, **settings):
        return self.strategy(
            noise_multiplier=1.0,
            sampling=EveryoneSampling(NODES),
            checkpoint_dir=directory / "run",
            ledger=directory / "ledger.jsonl",
            wait_seconds=0.0,
            **settings,
        )

    @staticmethod
    def _require_absent(grid: ScriptedGrid, directory: Path, caplog, capfd) -> None:
        sentinel.require_absent_from_messages(grid.pushed, "a message")
        sentinel.require_absent_from_logs(caplog)
        sentinel.require_absent("".join(capfd.readouterr()), "what was printed")
        sentinel.require_absent_from_directory(directory)


def start_arrays() -> ArrayRecord:
    """Return a public model with a buffer that is not released."""
    return record(np.zeros((2, 3), np.float32), np.zeros(2), np.array(3))


def _grid(place: Place) -> ScriptedGrid:
    """Return a Grid on which the first and the last node write the sentinel, others do not."""
    honest = adding(0.01)

    def script(message: Message) -> Answer:
        writes = message.metadata.dst_node_id in {100, 99 + NODES}
        return place(message) if writes else honest(message)

    return ScriptedGrid(script, NODES)


def _question() -> Message:
    return Message(RecordDict({"arrays": start_arrays()}), 100, "train", group_id="1")
