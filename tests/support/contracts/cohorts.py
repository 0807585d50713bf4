"""Sampling that really happened: what a Grid recorded, against what the ledger was charged for.

Thousands of rounds on nodes that always fail or are late, so that whoever replaced, retried or
reweighted them would be seen in who is asked.
"""

from dataclasses import dataclass

import dp_accounting
import numpy as np
import pytest
from dp_accounting import pld, rdp
from flwr.app import Error, Message, MessageType
from numpy.typing import NDArray
from scipy import stats

from dpfl_flower.accounting import (
    CappedPoissonSampling,
    EveryoneSampling,
    FixedSizeSampling,
    PoissonSampling,
    Relation,
    Sampling,
)
from tests.support.contracts import statistics
from tests.support.contracts.strategy import StrategySubject, flat, quiet
from tests.support.recording_grid import config_of, record
from tests.support.scripted_grid import ScriptedGrid

ROUNDS = 5_000
POPULATION = 16
COHORT = 4
CAP = 5
NOISE_MULTIPLIER = 20.0
DIMENSION = 24  # 120,000 draws of noise in all: 3 % is missed once in 1e18


@dataclass(frozen=True)
class Stated:
    """A sampling, the cohort sizes that it promises, and the relation it is priced under."""

    sampling: Sampling
    size_probabilities: NDArray[np.float64]
    relation: Relation = Relation.ADD_OR_REMOVE_ONE

    @property
    def mean(self) -> float:
        """The expected size of a cohort."""
        return float(self.size_probabilities @ np.arange(POPULATION + 1))


def _stated() -> dict[str, Stated]:
    sizes = np.arange(POPULATION + 1)
    poisson = stats.binom.pmf(sizes, POPULATION, COHORT / POPULATION)
    capped = np.where(sizes < CAP, poisson, 0.0)
    capped[CAP] = poisson[CAP:].sum()
    return {
        "poisson": Stated(PoissonSampling(COHORT, POPULATION), poisson),
        "capped": Stated(CappedPoissonSampling(COHORT, POPULATION, CAP), capped),
        "fixed-size": Stated(
            FixedSizeSampling(COHORT, POPULATION),
            (sizes == COHORT).astype(float),
            Relation.REPLACE_ONE,
        ),
    }


STATED = _stated()


class SamplingThatHappened(StrategySubject):
    """Who is asked follows the stated coins and nothing else, and the ledger pays for all of it."""

    @pytest.mark.parametrize("kind", list(STATED))
    def test_cohorts_are_as_stated_and_the_ledger_pays_for_what_was_recorded(self, kind):
        stated = STATED[kind]
        run = self._rounds_of_failing_nodes(stated)
        assert len(run.asked) == ROUNDS
        sizes = run.asked.sum(axis=1)
        _require_sizes(sizes, stated)
        _require_inclusion(run.asked, stated)
        _require_no_memory(run.asked)
        # The noise found in what was released, and the epsilon of all that was recorded.
        found = np.diff(run.models, axis=0) * COHORT / run.clip_norms[:-1, None]
        update = self.update_noise_multiplier(run.noise_multiplier, COHORT)
        statistics.require_scale(found.ravel(), update, allowance=0.01, shape=False)
        assert run.releases == ROUNDS
        recomputed = _epsilon(stated, run.noise_multiplier, rounds=len(run.asked), delta=run.delta)
        assert recomputed * (1 - 1e-6) <= run.epsilon <= recomputed * 1.05

    def test_everyone_is_asked_once_a_round_when_everyone_is_stated(self):
        stated = Stated(EveryoneSampling(POPULATION), np.eye(POPULATION + 1)[POPULATION])
        run = self._rounds_of_failing_nodes(stated, rounds=20)
        assert run.asked.all()
        recomputed = _epsilon(stated, run.noise_multiplier, rounds=20, delta=run.delta)
        assert recomputed * (1 - 1e-6) <= run.epsilon <= recomputed * 1.05

    def test_nobody_who_joins_later_is_asked(self):
        grid = _failing_grid()
        strategy = self._failing_strategy(STATED["poisson"])

        def join(server_round: int, _) -> None:
            if server_round:  # before the first round there is nobody to come late
                grid.node_ids.append(10_000 + server_round)

        with quiet():
            strategy.start(grid, record(np.zeros(2)), num_rounds=100, evaluate_fn=join)
        assert {m.metadata.dst_node_id for m in grid.pushed} <= set(range(100, 100 + POPULATION))

    # --- inside -------------------------------------------------------------------------------

    def _failing_strategy(self, stated: Stated):
        return self.strategy(
            noise_multiplier=NOISE_MULTIPLIER,
            sampling=stated.sampling,
            relation=stated.relation,
            give_up_after=None,
            wait_seconds=0.0,
        )

    def _rounds_of_failing_nodes(self, stated: Stated, rounds: int = ROUNDS) -> "RecordedRun":
        grid = _failing_grid()
        strategy = self._failing_strategy(stated)
        models, clip_norms, noise_multipliers = [], [], set()

        def look(_: int, arrays) -> None:
            models.append(flat(arrays))
            clip_norms.append(strategy.clip_norm)
            noise_multipliers.add(strategy.noise_multiplier)

        with quiet():
            result = strategy.start(grid, record(np.zeros(DIMENSION)), rounds, evaluate_fn=look)
        (noise_multiplier,) = noise_multipliers
        return RecordedRun(
            asked=_who_was_asked(grid.batches),
            models=np.array(models),
            clip_norms=np.array(clip_norms),
            noise_multiplier=noise_multiplier,
            epsilon=result.privacy.epsilon,
            delta=result.privacy.delta,
            releases=result.privacy.releases,
        )


@dataclass(frozen=True)
class RecordedRun:
    """What was seen of a run from outside; ``asked`` has a row per round and a column per node."""

    asked: NDArray[np.bool_]
    models: NDArray[np.float64]
    clip_norms: NDArray[np.float64]
    noise_multiplier: float
    epsilon: float
    delta: float
    releases: int


def _failing_grid() -> ScriptedGrid:
    """Return a Grid whose nodes answer an error, or nothing, always or every other time."""
    turns: dict[int, int] = {}

    def script(message: Message) -> Error | None:
        node = message.metadata.dst_node_id
        turns[node] = turns.get(node, 0) + 1
        late = node % 3 == 0 or (node % 3 == 1 and turns[node] % 2)
        return None if late else Error(1, "failed")

    return ScriptedGrid(script, POPULATION)


def _who_was_asked(batches: list[list[Message]]) -> NDArray[np.bool_]:
    """Return the cohorts; each round must be one push of at most one message to each node."""
    asked = np.zeros((len(batches), POPULATION), dtype=bool)
    for row, batch in enumerate(batches):
        nodes = [message.metadata.dst_node_id - 100 for message in batch]
        assert len(set(nodes)) == len(nodes), "a node was asked twice in a round"
        assert all(message.metadata.message_type == MessageType.TRAIN for message in batch)
        rounds = {config_of(message)["server-round"] for message in batch}
        assert rounds <= {row + 1}, "a second push in one round, or none in another"
        asked[row, nodes] = True
    return asked


def _require_sizes(sizes: NDArray[np.int64], stated: Stated) -> None:
    """Require the stated law of sizes: how often each, the mean and the spread, all exactly.

    False alarm: 3e-8. Cohorts of a fixed size where coins are stated have no spread.
    """
    probabilities, possible = stated.size_probabilities, np.arange(POPULATION + 1)
    observed = np.bincount(sizes, minlength=POPULATION + 1)
    assert not observed[probabilities == 0].any(), "a cohort of a size that cannot be"
    assert statistics.counts_fit(observed, len(sizes), probabilities)
    # A mean 8 % off and a spread 20 % off are seen without fail.
    for values, seen in ((possible, 0.08), ((possible - COHORT) ** 2, 0.2)):
        expected = len(sizes) * float(values @ probabilities)
        law = statistics.law_of_sum(values, probabilities, len(sizes))
        assert statistics.sum_fits(int(values @ observed), law)
        for off in (1 - seen, 1 + seen):
            wrong = round(off * expected) if expected else 1
            assert not statistics.sum_fits(wrong, law)


def _require_inclusion(asked: NDArray[np.bool_], stated: Stated) -> None:
    """Require each node to be asked as often as stated. False alarm: 1e-8 for all 16, exactly."""
    assert statistics.counts_fit(asked.sum(axis=0), len(asked), stated.mean / POPULATION)


def _require_no_memory(asked: NDArray[np.bool_]) -> None:
    """Require that who was asked, and failed, says nothing about who is asked in later rounds.

    False alarm: 2e-8. The overlaps of 5,000 rounds are nearly symmetric (a skewness of 0.005 in
    the mean), so that the normal law is right within a fifth this far out.
    """
    centred = asked - asked.mean(axis=0)
    for lag in (1, 2):
        overlap = (centred[:-lag] * centred[lag:]).sum(axis=1)
        error = overlap.std() / np.sqrt(len(overlap))
        assert abs(overlap.mean()) <= statistics.STANDARD_ERRORS * error


def _epsilon(stated: Stated, noise_multiplier: float, *, rounds: int, delta: float) -> float:
    """Return epsilon by dp-accounting, straight from what was recorded."""
    gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
    match stated.sampling:
        case PoissonSampling():
            event = dp_accounting.PoissonSampledDpEvent(COHORT / POPULATION, gaussian)
        case CappedPoissonSampling():
            event = dp_accounting.dp_event.TruncatedSubsampledGaussianDpEvent(
                dataset_size=POPULATION,
                sampling_probability=COHORT / POPULATION,
                truncated_batch_size=CAP,
                noise_multiplier=noise_multiplier,
            )
        case FixedSizeSampling():
            # A sum moves by two clip norms under replace-one, which its RDP leaves to the caller.
            half = dp_accounting.GaussianDpEvent(noise_multiplier / 2)
            event = dp_accounting.SampledWithoutReplacementDpEvent(POPULATION, COHORT, half)
            accountant = rdp.RdpAccountant(
                neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE
            )
            return accountant.compose(event, rounds).get_epsilon(delta)
        case _:
            event = gaussian
    return pld.PLDAccountant().compose(event, rounds).get_epsilon(delta)
