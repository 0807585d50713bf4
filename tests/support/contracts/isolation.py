"""Isolation and sensitivity: what one unit can do to what a strategy releases.

Seen from outside. The noise is replaced by zeros, or by a one everywhere, which shows how far one
grid unit moves each released number; in those units the rounds with and without a unit are compared
exactly, against what the noise is accounted for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dpfl_flower.accounting import EveryoneSampling
from dpfl_flower.quantize import Rounding
from dpfl_flower.wire import read_array
from dpfl_strategies import NumExamplesWeighting, UniformWeighting
from tests.support.contracts.strategy import StrategySubject, quiet
from tests.support.recording_grid import record
from tests.support.scripted_grid import Answer, ScriptedGrid, answer_in_name_of

CLAIMS = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow],
)
NODES = 4
WEIGHTINGS = (UniformWeighting(), NumExamplesWeighting(w_max=10), NumExamplesWeighting(100, 0.1))

KINDS = (
    "honest",
    "zero update",
    "features of 1e5",
    "1e300",
    "1e-310",
    "all missing",
    "one missing",
    "infinite",
    "float16",
    "integers for floats",
    "floats for the counter",
    "complex",
    "wrong shape",
    "transposed",
    "a 1-d array for a 0-d one",
    "missing array",
    "another array more",
    "two array records",
    "no array record",
    "empty arrays",
    "bytes cut short",
    "bytes of no array",
    "no metrics",
    "five times",
    "error, then good",
    "in a stranger's name",
    "for another round",
    "another counter",
)
NO_ANSWER = (
    "all missing",
    "one missing",
    "infinite",
    "integers for floats",
    "floats for the counter",
    "complex",
    "wrong shape",
    "transposed",
    "a 1-d array for a 0-d one",
    "missing array",
    "another array more",
    "two array records",
    "no array record",
    "empty arrays",
    "bytes cut short",
    "bytes of no array",
    "error, then good",
    "in a stranger's name",
    "for another round",
)
COUNTS = (
    1,
    0,
    7,
    10**12,
    2**63 - 1,
    10**400,
    -5,
    -0.0,
    0.3,
    float("inf"),
    -float("inf"),
    float("nan"),
    [3, 4],
    None,
)


@dataclass(frozen=True)
class Reply:
    """One node's answer, or None for one that is not there."""

    kind: str
    seed: int
    count: int

    def __call__(self, question: Message) -> list[Answer]:
        return answers(self.kind, np.random.default_rng(self.seed), COUNTS[self.count], question)


replies = st.builds(
    Reply,
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**16),
    count=st.integers(0, len(COUNTS) - 1),
)


class Isolation(StrategySubject):
    """However hostile a unit, it moves the sum by at most what the noise is accounted for."""

    @CLAIMS
    @given(
        others=st.lists(st.none() | replies, min_size=NODES - 1, max_size=NODES - 1),
        unit=replies,
        noise_multiplier=st.sampled_from([0.3, 1.0, 2.0]),
        weighting=st.sampled_from(WEIGHTINGS),
        rounding=st.sampled_from(list(Rounding)),
        metrics=st.sampled_from(["none", "not_private"]),
    )
    def test_one_unit_moves_what_is_released_by_at_most_the_bound(
        self, others, unit, noise_multiplier, weighting, rounding, metrics
    ):
        common = {
            "noise_multiplier": noise_multiplier,
            "weighting": weighting,
            "rounding": rounding,
            "metrics": metrics,
        }
        unit_size, stddev = self._unit_size(common)
        moved = self._released([*others, unit], common) - self._released([*others, None], common)
        self._require_within(moved, unit_size, stddev, noise_multiplier, units=1)

    @CLAIMS
    @given(
        others=st.lists(st.none() | replies, min_size=NODES - 1, max_size=NODES - 1),
        unit=replies,
        other=replies,
        rounding=st.sampled_from(list(Rounding)),
    )
    def test_replacing_a_unit_moves_it_by_at_most_twice_the_bound(
        self, others, unit, other, rounding
    ):
        common = {"noise_multiplier": 1.0, "rounding": rounding}
        unit_size, stddev = self._unit_size(common)
        moved = self._released([*others, unit], common) - self._released([*others, other], common)
        self._require_within(moved, unit_size, stddev, 1.0, units=2)

    @pytest.mark.parametrize("kind", KINDS)
    def test_without_noise_a_unit_moves_the_mean_by_at_most_the_clip_norm(self, kind):
        common = {"noise_multiplier": 0.0}
        with_unit = self._released([None] * (NODES - 1) + [Reply(kind, 1, 2)], common)
        moved = with_unit - self._released([None] * NODES, common)
        dimension = moved.size - 1
        assert np.linalg.norm(moved[:dimension]) <= 1.0001 * self.clip_norm / NODES

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_unit_that_is_not_honest_does_not_change_what_others_add(self, kind):
        common = {"noise_multiplier": 1.0}
        honest = [Reply("honest", seed, 0) for seed in range(NODES - 1)]
        unit = Reply(kind, 5, 0)
        both = self._released([*honest, unit], common)
        alone = self._released([None] * (NODES - 1) + [unit], common)
        rest = self._released([*honest, None], common)
        nothing = self._released([None] * NODES, common)
        unit_size, _ = self._unit_size(common)
        sizes = np.where(unit_size > 0, unit_size, 1.0)
        np.testing.assert_allclose((both - rest) / sizes, (alone - nothing) / sizes, atol=1e-4)

    @pytest.mark.parametrize("kind", NO_ANSWER)
    def test_what_is_no_valid_answer_moves_nothing_at_all(self, kind):
        common = {"noise_multiplier": 1.0}
        honest = [Reply("honest", seed, 0) for seed in range(NODES - 1)]
        with_it = self._released([*honest, Reply(kind, 5, 0)], common)
        np.testing.assert_array_equal(with_it, self._released([*honest, None], common))

    # --- inside -------------------------------------------------------------------------------

    def _released(
        self, nodes: Sequence[Reply | None], common: dict, *, one: int = 0
    ) -> NDArray[np.float64]:
        """Return what a round releases when its noise is ``one`` everywhere."""
        grid = _grid_of(nodes)
        strategy = self.strategy(
            sampling=EveryoneSampling(NODES),
            noise_seed=7,  # the public dither is the same with and without the unit
            give_up_after=None,
            wait_seconds=0.0,
            **common,
        )
        seen = []
        with quiet(), self.noise_replaced(lambda n: np.full(n, one)) as scale:
            strategy.start(
                grid,
                start_arrays(),
                num_rounds=1,
                evaluate_fn=lambda _, arrays: seen.append(self.released_state(strategy, arrays)),
            )
        self._stddev = scale.get("stddev", 0.0)
        return seen[-1]

    def _unit_size(self, common: dict) -> tuple[NDArray[np.float64], float]:
        """Return how far one grid unit moves each released number, and the noise in grid units."""
        nobody = [None] * NODES
        size = self._released(nobody, common, one=1) - self._released(nobody, common)
        return np.abs(size), self._stddev

    @staticmethod
    def _require_within(moved, unit_size, stddev, noise_multiplier, *, units: int) -> None:
        assert stddev > 0
        fixed = unit_size == 0
        assert not moved[fixed].any(), "a number moved that carries no noise"
        in_units = moved[~fixed] / unit_size[~fixed]
        integers = in_units.round()
        np.testing.assert_allclose(in_units, integers, atol=1e-3)
        squares = sum(int(q) ** 2 for q in integers)
        assert squares * Fraction(noise_multiplier) ** 2 <= (units * Fraction(stddev)) ** 2


def start_arrays() -> ArrayRecord:
    """Return a model in float64, so that sums can be read off it exactly."""
    return record(
        np.zeros((3, 2)),
        np.zeros(()),
        np.array(3, np.int64),
        np.zeros(4),
        np.array([True, False]),
        names=["weight", "scale", "counter", "bias", "mask"],
    )


def _grid_of(nodes: Sequence[Reply | None]) -> ScriptedGrid:
    def script(question: Message) -> list[Answer] | None:
        reply = nodes[question.metadata.dst_node_id - 100]
        return None if reply is None else reply(question)

    return ScriptedGrid(script, len(nodes))


def answers(kind: str, rng: np.random.Generator, count: object, question: Message) -> list[Answer]:
    """Return what a node of this kind answers to ``question``."""
    sent = {name: read_array(array) for name, array in question.content["arrays"].items()}
    step = rng.choice([0.01, 1.0])
    honest = {
        name: np.asarray(array + step * rng.normal(size=array.shape))
        if array.dtype.kind == "f"
        else array
        for name, array in sent.items()
    }
    good = _content(honest, count)
    match kind:
        case "five times":
            return [_content({**honest, "scale": np.array(float(i))}, count) for i in range(5)]
        case "error, then good":
            return [Error(1, "failed"), good]
        case "in a stranger's name":
            group = question.metadata.group_id
            return [answer_in_name_of(node, good, group=group) for node in (7, 99, 2**62)]
        case "for another round":
            node = question.metadata.dst_node_id
            return [answer_in_name_of(node, good, group=group) for group in ("0", "2", "", "-1")]
        case "no metrics":
            return [RecordDict({"arrays": good["arrays"]})]
        case "two array records":
            return [RecordDict({"x": good["arrays"], "y": good["arrays"]})]
        case "no array record":
            return [RecordDict({"metrics": good["metrics"], "config": ConfigRecord({"a": "b"})})]
        case "bytes cut short" | "bytes of no array":
            array = Array(honest["weight"])
            array.data = array.data[:-3] if kind == "bytes cut short" else b"\x80\x04."
            arrays = ArrayRecord({n: Array(a) for n, a in honest.items()})
            arrays["weight"] = array
            return [RecordDict({"arrays": arrays, "metrics": good["metrics"]})]
        case _:
            return [_content(_hostile(kind, honest, rng), count)]


def _hostile(kind: str, honest: dict, rng: np.random.Generator) -> dict:
    floating = {name: array for name, array in honest.items() if array.dtype.kind == "f"}
    rest = {name: array for name, array in honest.items() if name not in floating}
    signs = rng.choice([-1.0, 1.0])
    constants = {
        "features of 1e5": 1e5,
        "1e300": 1e300,
        "1e-310": 1e-310,
        "all missing": np.nan,
        "zero update": 0.0,
    }
    if kind in constants:
        return {n: np.full(a.shape, signs * constants[kind]) for n, a in floating.items()} | rest
    match kind:
        case "honest":
            return honest
        case "one missing":
            return honest | {"scale": np.array(np.nan)}
        case "infinite":
            return honest | {"scale": np.array(signs * np.inf)}
        case "float16":
            return {n: np.full(a.shape, 6e4, np.float16) for n, a in floating.items()} | rest
        case "integers for floats":
            return honest | {"bias": np.full(4, 2**40)}
        case "floats for the counter":
            return honest | {"counter": np.array(1e9)}
        case "complex":
            return honest | {"bias": np.full(4, 1j)}
        case "wrong shape":
            return honest | {"bias": np.full(5, 1e5)}
        case "transposed":
            return honest | {"weight": honest["weight"].T.copy()}
        case "a 1-d array for a 0-d one":
            return honest | {"scale": np.full(1, 1e5)}
        case "missing array":
            return {n: a for n, a in honest.items() if n != "scale"}
        case "another array more":
            return honest | {"more": np.full(3, 1e5)}
        case "empty arrays":
            return {n: np.zeros((0,)) for n in honest}
        case "another counter":
            return honest | {"counter": np.array(10**15), "mask": np.array([False, True])}
        case _:
            raise ValueError(kind)


def _content(arrays: dict, count: object) -> RecordDict:
    metrics = MetricRecord({"loss": 1e9, "rows": [1, 2]})
    if count is not None:
        metrics["num-examples"] = count
    packed = ArrayRecord({name: Array(np.asarray(array)) for name, array in arrays.items()})
    return RecordDict({"arrays": packed, "metrics": metrics})
