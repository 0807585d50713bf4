"""Distributed noise obeys what noise that a server adds does, and more: nodes hide from it.

The node is the unit, under zero-out or replace-one: a unit without data is a node that answers the
model as it was sent, and adds its share of the noise all the same.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from dp_accounting.rdp import compute_epsilon
from flwr.app import ArrayRecord, Message
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dpfl_flower import records
from dpfl_flower.accounting import EveryoneSampling
from dpfl_flower.client.errors import NODE_LOGGER
from dpfl_flower.client.noise_share import NoiseShare
from dpfl_flower.noise import DiscreteGaussian
from dpfl_flower.quantize import distributed_sum
from dpfl_flower.quantize.rotation import Rotation
from dpfl_flower.rng import SeededRandom
from dpfl_strategies import distributed_run
from tests.support.contracts import sentinel, statistics
from tests.support.contracts.charging import ChargeBeforeRelease
from tests.support.contracts.freshness import FreshNoise
from tests.support.contracts.isolation import CLAIMS, COUNTS, answers
from tests.support.contracts.leakage import NODES as WATCHED_NODES
from tests.support.contracts.leakage import PLACES
from tests.support.contracts.leakage import start_arrays as watched_arrays
from tests.support.contracts.nodes_with_shares import DistributedSubject, NodesWithShares
from tests.support.contracts.strategy import flat, quiet
from tests.support.node import all_bytes
from tests.support.recording_grid import RecordingGrid, adding, record
from tests.support.scripted_grid import ScriptedGrid

WELL_FORMED = (
    "honest",
    "zero update",
    "features of 1e5",
    "1e300",
    "1e-310",
    "all missing",
    "one missing",
    "infinite",
    "float16",
    "no metrics",
    "another counter",
)
"""What a node's data may make of an answer; an app that breaks the protocol has no such excuse."""
REFUSED = ("complex", "missing array", "bytes of no array", "no array record", "empty arrays")


# --- charge before release, and noise -----------------------------------------------------------


class TestTheLedgerOfDistributedNoise(DistributedSubject, ChargeBeforeRelease):
    bits = 16


class FreshShares(DistributedSubject, FreshNoise):
    """Fresh noise, under one public rotation for all rounds: a fresh one would hide a repeat."""

    def noise_of(self, *arguments, **settings):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(distributed_run, "secure", lambda: SeededRandom(3))
            return super().noise_of(*arguments, **settings)


class TestSharesOfDiscreteGaussianNoise(FreshShares):
    pass


class TestSharesOfSkellamNoise(FreshShares):
    bits = 16
    share_noise = "skellam"

    # The others do not depend on the law.
    test_no_coordinate_is_constant_or_a_copy_of_another = None
    test_rounds_and_runs_are_uncorrelated = None
    test_forked_workers_and_restarts_are_uncorrelated = None
    test_two_runs_resumed_from_one_checkpoint_draw_their_own_noise = None


# --- isolation and sensitivity ------------------------------------------------------------------

NODES = 4


@dataclass(frozen=True)
class Data:
    """What a node's app makes of its data; "zero update" is a unit that is zeroed out."""

    kind: str
    seed: int = 0


data = st.builds(Data, kind=st.sampled_from(WELL_FORMED), seed=st.integers(0, 2**16))
FEW_CLAIMS = hypothesis_settings(CLAIMS, max_examples=25)


class TestIsolationUnderDistributedNoise(DistributedSubject):
    """The sum of the nodes' integers moves by at most what the shares are accounted for."""

    bits = 32

    @FEW_CLAIMS
    @given(
        others=st.lists(data, min_size=NODES - 1, max_size=NODES - 1),
        unit=data,
        noise_multiplier=st.sampled_from([0.3, 1.0, 2.0]),
    )
    def test_zeroing_one_unit_moves_the_sum_by_at_most_the_bound(
        self, others, unit, noise_multiplier
    ):
        self._require_within([*others, unit], [*others, Data("zero update")], noise_multiplier)

    @FEW_CLAIMS
    @given(others=st.lists(data, min_size=NODES - 1, max_size=NODES - 1), unit=data, other=data)
    def test_replacing_one_unit_moves_the_sum_by_at_most_twice_the_bound(self, others, unit, other):
        self._require_within([*others, unit], [*others, other], 1.0, units=2)

    @pytest.mark.parametrize("kind", WELL_FORMED)
    def test_what_a_unit_adds_does_not_depend_on_the_others(self, kind):
        nobody = [Data("zero update")] * (NODES - 1)
        others = [Data("honest", seed) for seed in range(NODES - 1)]
        unit = Data(kind, 5)
        both, _ = self._sum([*others, unit])
        rest, _ = self._sum([*others, Data("zero update")])
        alone, _ = self._sum([*nobody, unit])
        np.testing.assert_array_equal(both - rest, alone)

    @pytest.mark.parametrize("kind", ["features of 1e5", "1e300"])
    def test_the_bound_is_one_that_units_come_up_to(self, kind):
        sums, plan = self._sum([Data("zero update")] * (NODES - 1) + [Data(kind)])
        assert 0.99 * plan.grid.sensitivity_units < np.linalg.norm(sums)

    @pytest.mark.parametrize("kind", ["all missing", "one missing", "infinite"])
    def test_what_is_no_number_adds_nothing_and_its_node_stays(self, kind):
        honest = [Data("honest", seed) for seed in range(NODES - 1)]
        with_it, _ = self._sum([*honest, Data(kind)])
        np.testing.assert_array_equal(with_it, self._sum([*honest, Data("zero update")])[0])

    @pytest.mark.parametrize("kind", REFUSED)
    def test_an_app_that_breaks_the_protocol_costs_its_node_the_round_and_moves_nothing(self, kind):
        honest = [Data("honest", seed) for seed in range(NODES - 1)]
        with_it, _ = self._sum([*honest, Data(kind)], spare=1)
        zeroed, _ = self._sum([*honest, Data("zero update")], spare=1)
        np.testing.assert_array_equal(with_it, zeroed)

    # --- inside ---------------------------------------------------------------------------------

    def _sum(self, nodes: Sequence[Data], noise_multiplier: float = 1.0, *, spare: int = 0):
        """Return the exact sum of a round whose noise is zero, in grid units, and its plan."""
        subject = type(self)()
        subject.spare = spare
        seen = {}

        def script(question: Message):
            node = nodes[question.metadata.dst_node_id - 100]
            return answers(node.kind, np.random.default_rng(node.seed), COUNTS[0], question)

        grid = ScriptedGrid(script, len(nodes))
        strategy = subject.strategy(
            sampling=EveryoneSampling(len(nodes)),
            noise_multiplier=noise_multiplier,
            wait_seconds=0.0,
        )

        def look(server_round: int, arrays: ArrayRecord) -> None:
            if server_round:
                seen.update(model=flat(arrays), plan=strategy.plan)

        with quiet(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(DiscreteGaussian, "sample", lambda *_: np.zeros(16, np.int64))
            # The public rotation and each node's coins of rounding: the same with and without.
            patch.setattr(distributed_sum, "secure", lambda: SeededRandom(7))
            patch.setattr(distributed_run, "secure", lambda: SeededRandom(3))
            strategy.start(grid, isolation_arrays(), num_rounds=1, evaluate_fn=look)
        plan = seen["plan"]
        asked = [m.content.config_records.get(records.DISTRIBUTED) for m in grid.pushed]
        [seed] = {found["rotation-seed"] for found in asked if found is not None}
        mean = seen["model"]
        assert plan.grid.padded == mean.size, "no entry of the rotated sum may be cut off"
        in_units = Rotation(mean.size, seed).apply(
            mean * (len(nodes) / plan.grid.unit_size(plan.clip_norm))
        )
        sums = in_units.round()
        np.testing.assert_allclose(in_units, sums, atol=1e-3)
        return sums.astype(np.int64), plan

    def _require_within(self, nodes, neighbours, noise_multiplier, *, units: int = 1) -> None:
        (a, plan), (b, _) = (
            self._sum(nodes, noise_multiplier),
            self._sum(neighbours, noise_multiplier),
        )
        moved = [int(q) for q in a - b]
        certain = plan.squared_scale * (plan.min_survivors - plan.colluders)
        l2, l1 = plan.event.l2_sensitivity, plan.event.l1_sensitivity
        assert sum(q * q for q in moved) <= (units * l2) ** 2
        assert sum(map(abs, moved)) <= units * l1
        assert l2**2 * noise_multiplier**2 <= certain, "less noise than was asked for"


def isolation_arrays() -> ArrayRecord:
    """Return a model of 16 released entries, so that a rotated sum can be read off it whole."""
    return record(
        np.zeros((4, 2)),
        np.zeros(()),
        np.array(3, np.int64),
        np.zeros(7),
        np.array([True, False]),
        names=["weight", "scale", "counter", "bias", "mask"],
    )


# --- who takes part -----------------------------------------------------------------------------

MANY_NODES = 8
DROPOUT_ROUNDS = 12
DROPOUT_DIMENSION = 16_384
STAGES = ("advertise", "share", "mask", "unmask")


class TestWhoTakesPartUnderDistributedNoise(DistributedSubject):
    """Everyone is asked once, nobody again, and the ledger pays for what was released."""

    spare = 3

    def test_everyone_is_asked_once_a_round_and_each_release_is_paid_for(self):
        run = self._run_with_dropouts()
        released = 0
        for server_round, dropped in enumerate(run.dropped, start=1):
            asked = run.asked[server_round]
            everyone = set(range(100, 100 + MANY_NODES))
            assert asked["advertise"] == sorted(everyone)
            answering = sorted(everyone - dropped)
            if len(answering) >= MANY_NODES - self.spare:
                released += 1
                for stage in STAGES[1:]:
                    assert asked[stage] == answering, "a node that dropped out was asked again"
        assert 0 < released < DROPOUT_ROUNDS, "no round was abandoned, or none was not"
        assert run.releases == released
        assert run.epsilon == pytest.approx(_epsilon(run.plan, released), rel=1e-6)

    def test_fewer_survivors_carry_less_noise_and_never_less_than_is_charged(self):
        run = self._run_with_dropouts()
        checked = set()
        for dropped, noise in zip(run.dropped, np.diff(run.models, axis=0), strict=True):
            survivors = MANY_NODES - len(dropped)
            if survivors < MANY_NODES - self.spare:
                assert not noise.any(), "an abandoned round released something"
                continue
            in_units = noise * MANY_NODES / run.plan.grid.unit_size(run.plan.clip_norm)
            stated = math.sqrt(survivors * run.plan.squared_scale)
            # 16,384 draws of one round see 8 %, and there is a seventh between 5 and 6 survivors.
            statistics.require_scale(in_units, stated, off=1.08, shape=False)
            assert stated >= run.plan.noise_multiplier * run.plan.grid.sensitivity_units * 0.999999
            checked.add(survivors)
        assert checked == {8, 7, 6, 5}

    def test_nobody_who_joins_later_is_asked(self):
        grid = RecordingGrid(adding(0.0), MANY_NODES)
        strategy = self.strategy(
            sampling=EveryoneSampling(MANY_NODES), noise_multiplier=1.0, wait_seconds=0.0
        )

        def join(server_round: int, _) -> None:
            if server_round:  # before the first round there is nobody to come late
                grid.node_ids.append(10_000 + server_round)

        with quiet():
            strategy.start(grid, record(np.zeros(8)), num_rounds=2, evaluate_fn=join)
        assert {m.metadata.dst_node_id for m in grid.pushed} == set(range(100, 100 + MANY_NODES))

    # --- inside ---------------------------------------------------------------------------------

    def _run_with_dropouts(self) -> "RecordedRun":
        grid = RecordingGrid(adding(0.0), MANY_NODES)
        strategy = self.strategy(
            sampling=EveryoneSampling(MANY_NODES),
            noise_multiplier=1.0,
            give_up_after=None,
            wait_seconds=0.0,
        )
        # As many dropouts as rounds before, and one more than may be missing.
        dropped = [{100 + (r + i) % MANY_NODES for i in range(r % 5)} for r in range(12)]
        nodes = NodesWithShares(grid, min_cohort=MANY_NODES - self.spare)
        models, plans = [], []

        def look(server_round: int, arrays: ArrayRecord) -> None:
            models.append(flat(arrays))
            plans.append(strategy.plan)
            nodes.late = dropped[server_round] if server_round < len(dropped) else set()

        with quiet():
            result = strategy.start_on(
                nodes, record(np.zeros(DROPOUT_DIMENSION)), DROPOUT_ROUNDS, evaluate_fn=look
            )
        asked: dict[int, dict[str, list[int]]] = {}
        for message in grid.pushed:
            server_round, stage = message.metadata.group_id.split("/")
            of_stage = asked.setdefault(int(server_round), {}).setdefault(stage, [])
            of_stage.append(message.metadata.dst_node_id)
        return RecordedRun(
            asked={r: {s: sorted(n) for s, n in stages.items()} for r, stages in asked.items()},
            dropped=dropped,
            models=np.array(models),
            plan=plans[-1],
            releases=result.privacy.releases,
            epsilon=result.privacy.epsilon,
        )


@dataclass(frozen=True)
class RecordedRun:
    """What was seen of a run from outside; ``asked`` is by round and stage."""

    asked: dict[int, dict[str, list[int]]]
    dropped: list[set[int]]
    models: NDArray[np.float64]
    plan: object
    releases: int
    epsilon: float


def _epsilon(plan, rounds: int) -> float:
    """Return epsilon of arXiv 2102.06387, Theorem 1 with Proposition 14, by dp-accounting's RDP."""
    orders = np.array([1 + x / 10 for x in range(1, 100)] + list(range(11, 512)))
    shares, scale = plan.min_survivors - plan.colluders, math.sqrt(plan.squared_scale)
    d, total = plan.grid.padded, math.sqrt(shares) * scale
    tau = 10 * sum(
        math.exp(-2 * math.pi**2 * plan.squared_scale * k / (k + 1)) for k in range(1, shares)
    )
    l2, l1 = plan.event.l2_sensitivity / total, plan.event.l1_sensitivity / total
    rdp = np.minimum.reduce(
        [
            orders * l2**2 / 2 + tau * d,
            orders / 2 * (l2**2 + 2 * l1 * tau + tau**2 * d),
            orders / 2 * (l2 + math.sqrt(d) * tau) ** 2,
        ]
    )
    return compute_epsilon(orders, rounds * rdp, 1e-5)[0]


# --- nothing un-noised leaves -------------------------------------------------------------------


class TestNothingUnnoisedLeavesUnderDistributedNoise(DistributedSubject):
    """What a node's app writes is in nothing that the node sends, nor in what the run gives out."""

    bits = 16

    @pytest.mark.parametrize("place", list(PLACES))
    def test_a_sentinel_leaves_no_node_and_is_found_nowhere(self, place, tmp_path, caplog, capfd):
        caplog.set_level(0)
        honest = adding(0.01)

        def script(message: Message):
            writes = message.metadata.dst_node_id in {100, 99 + WATCHED_NODES}
            return PLACES[place](message) if writes else honest(message)

        grid = ScriptedGrid(script, WATCHED_NODES)
        result = self._watched(tmp_path).start(grid, watched_arrays(), num_rounds=2)
        assert len(grid.replied) >= 2 * 3 * WATCHED_NODES, "the nodes did not get to their vectors"
        sentinel.require_absent_from_messages(grid.replied, "an answer")
        sentinel.require_absent_from_messages(grid.pushed, "a message")
        sentinel.require_absent_from_logs(caplog, but_for=(NODE_LOGGER,))
        sentinel.require_absent("".join(capfd.readouterr()), "what was printed")
        sentinel.require_absent_from_directory(tmp_path)
        sentinel.require_absent(repr(vars(result)), "the result")
        sentinel.require_absent(all_bytes(result.arrays), "the model")

    def test_neither_a_sum_without_noise_nor_one_without_masks_leaves_a_node(
        self, tmp_path, monkeypatch
    ):
        bare, noised = [], []
        added = NoiseShare.added

        def spied(share, request, total):
            residues = added(share, request, total)
            bare.append(total)
            noised.append(residues)
            return residues

        monkeypatch.setattr(NoiseShare, "added", spied)
        grid = RecordingGrid(adding(0.123), WATCHED_NODES)
        with quiet():
            self._watched(tmp_path).start(grid, watched_arrays(), num_rounds=2)
        assert len(bare) == 2 * WATCHED_NODES
        modulus = 1 << self.bits
        private = [*bare, *(total % modulus for total in bare), *noised]
        private += [np.sum(bare[i : i + WATCHED_NODES], axis=0) for i in (0, WATCHED_NODES)]
        out = [all_bytes(message.content) for message in [*grid.pushed, *grid.replied]]
        out += [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
        for vector in private:
            for needle in _as_bytes(vector):
                assert not any(needle in data for data in out)
        # The search finds a vector that leaves as it is.
        plain = all_bytes(record(noised[0].astype(np.int64)))
        assert any(needle in plain for needle in _as_bytes(noised[0]))

    # --- inside ---------------------------------------------------------------------------------

    def _watched(self, directory):
        return self.strategy(
            noise_multiplier=1.0,
            sampling=EveryoneSampling(WATCHED_NODES),
            checkpoint_dir=directory / "run",
            ledger=directory / "ledger.jsonl",
            give_up_after=None,
            wait_seconds=0.0,
        )


def _as_bytes(vector: NDArray[np.int64]) -> list[bytes]:
    """Return a vector as it would be written, in any width that may be used.

    All of it: a few entries of a coarse grid may all be 0, which is found anywhere.
    """
    return [vector.astype(dtype).tobytes() for dtype in ("<i8", ">i8", "<u2", "<i4", "<f8")]
