"""Charge before release: whenever the power goes, what is out is paid for.

A run whose process is killed at a chosen moment of a write, an fsync, a replacement or a push, and
resumed. The Grid notes each model that leaves, with the length that the ledger had just then, in a
file that it syncs itself.
"""

import hashlib
import json
import os
import random
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord

from dpfl_flower.accounting import (
    EveryoneSampling,
    LedgerError,
    PrivacyBudget,
)
from dpfl_strategies import CheckpointError, PrivateStrategy
from tests.support.contracts.strategy import DELTA, StrategySubject, quiet, run_until
from tests.support.forked import fork_and_wait, run_forked
from tests.support.kill_points import KillPoints
from tests.support.recording_grid import RecordingGrid, adding, record

NODES = 3
ROUNDS = 3
DIMENSION = 8
KILLS = 50
SEED_VARIABLE = "DPFL_KILL_SEED"

_fsync = os.fsync  # the releases are noted by calls that do not count as the run's own


class ChargeBeforeRelease(StrategySubject):
    """Never more distinct models out than charges in, and a ledger that lost charges is refused.

    Attributes
    ----------
    kills : int
        How many runs are killed, each at another moment.
    """

    kills = KILLS

    def test_killed_at_any_moment_never_more_models_are_out_than_charged(self, tmp_path):
        seed = int(os.environ.get(SEED_VARIABLE) or secrets.randbelow(10**6))
        print(f"{SEED_VARIABLE}={seed} repeats these kills")
        run_forked(kill_and_resume, type(self), tmp_path, seed)

    def test_killed_again_and_again_never_more_models_are_out_than_charged(self, tmp_path):
        run_forked(kill_again_and_again, type(self), tmp_path)

    def test_killed_at_any_moment_the_budget_is_kept(self, tmp_path):
        run_forked(kill_under_a_budget, type(self), tmp_path)

    @pytest.mark.parametrize("rounds_before", [0, 1, 2])
    @pytest.mark.parametrize(
        "damage",
        [
            "last line removed",
            "last line and sidecar removed",
            "last line removed, sidecar to match",
            "yesterday's copy",
            "yesterday's copy with its sidecar",
            "yesterday's copy without a sidecar",
            "ledger and sidecar removed",
            "a charge edited away",
        ],
    )
    def test_a_ledger_that_lost_charges_is_refused(self, tmp_path, damage, rounds_before):
        rounds = rounds_before + 2
        self._run(tmp_path, max(rounds_before, 1))
        ledger = tmp_path / "run" / "ledger.jsonl"
        sidecar = ledger.with_name(ledger.name + ".head")
        yesterday = ledger.read_bytes(), sidecar.read_bytes()
        self._run(tmp_path, rounds)
        damaged(damage, ledger, sidecar, yesterday)
        before = releases(tmp_path)
        with pytest.raises((LedgerError, CheckpointError)):
            self._run(tmp_path, rounds + 1)
        assert releases(tmp_path) == before, "a model left after the ledger was damaged"

    def test_a_copy_from_before_a_run_began_is_refused_before_its_first_release(self, tmp_path):
        ledger = tmp_path / "run" / "ledger.jsonl"
        sidecar = ledger.with_name(ledger.name + ".head")
        self._run(tmp_path, 1)
        yesterday = ledger.read_bytes(), sidecar.read_bytes()
        self._run(tmp_path, 3)

        def power_goes(*_: object) -> None:
            raise KeyboardInterrupt

        def another_run():
            return contract_strategy(self, tmp_path / "another", ledger=ledger)

        with quiet(), pytest.raises(KeyboardInterrupt):
            another_run().start(_grid(tmp_path), start_arrays(), 1, evaluate_fn=power_goes)
        damaged("yesterday's copy with its sidecar", ledger, sidecar, yesterday)
        with quiet(), pytest.raises((LedgerError, CheckpointError)):
            another_run().start(_grid(tmp_path), start_arrays(), 1)

    def test_a_second_run_on_the_same_ledger_is_refused_while_the_first_goes_on(self, tmp_path):
        refused = []

        def second(_round: int, _arrays: ArrayRecord) -> None:
            with pytest.raises(LedgerError):
                self._run(tmp_path, 1)
            refused.append(True)

        first = contract_strategy(self, tmp_path / "run")
        with quiet():
            first.start(_grid(tmp_path), start_arrays(), num_rounds=2, evaluate_fn=second)
        assert len(refused) == 3

    # --- inside -------------------------------------------------------------------------------

    def _run(self, directory: Path, rounds: int) -> None:
        with quiet():
            run_until(
                contract_strategy(self, directory / "run"),
                _grid(directory),
                start_arrays(),
                rounds=rounds,
                planned=self.planned_rounds(rounds),
            )


def contract_strategy(
    subject: StrategySubject,
    run: Path,
    *,
    ledger: Path | None = None,
    budget: PrivacyBudget | None = None,
) -> PrivateStrategy:
    """Return the subject's strategy with its checkpoint, and its ledger, in ``run``."""
    return subject.strategy(
        noise_multiplier=1.0,
        budget=budget,
        delta=DELTA,
        sampling=EveryoneSampling(NODES),
        checkpoint_dir=run,
        ledger=ledger or run / "ledger.jsonl",
        wait_seconds=0.0,
    )


def start_arrays() -> ArrayRecord:
    """Return the public model that every run begins with."""
    return record(np.zeros((2, 3), np.float32), np.zeros(2))


def kill_and_resume(subject: type[StrategySubject], directory: Path, seed: int) -> None:
    """Kill ``kills`` runs, each at another moment, some twice, and resume each to its end."""
    coins = random.Random(seed)
    whole = directory / "whole"
    fork_and_wait(run_until_killed, subject, whole, 0)
    moments = int((whole / "moments").read_text())
    assert moments > 20 * ROUNDS, "the kill points do not see the run's writes"
    require_paid(whole)
    assert len(distinct_models(whole)) == ROUNDS
    for stop in coins.sample(range(1, moments + 1), subject.kills):
        again = coins.choice([0, 0, coins.randint(1, moments)])
        note = f"{SEED_VARIABLE}={seed}, killed at {stop}, then {again or 'not'}, of {moments}"
        run = directory / f"killed-at-{stop}"
        kills = 0
        for at in (stop, again, 0):
            before = releases(run)
            killed = fork_and_wait(run_until_killed, subject, run, at) != 0
            kills += killed
            require_paid(run, note)
            require_same_bytes_or_a_new_charge(run, before, note)
            if not killed:
                break
        charged = charges((run / "run" / "ledger.jsonl").read_bytes())
        finished = json.loads((run / "finished").read_text())
        assert (finished["rounds"], finished["releases"]) == (ROUNDS, charged), note
        assert charged <= ROUNDS + kills, f"a kill cost more than one charge: {note}"
        shutil.rmtree(run)


def kill_under_a_budget(subject: type[StrategySubject], directory: Path) -> None:
    """Kill one run so often that its budget cannot pay for all of its rounds."""
    releases_paid = ROUNDS + 1
    budget = subject().budget_for(releases_paid, nodes=NODES, dimension=DIMENSION)
    kills = 0
    for at in range(60, 140, 7):
        kills += fork_and_wait(run_until_killed, subject, directory, at, budget) != 0
        require_paid(directory)
        assert charges((directory / "run" / "ledger.jsonl").read_bytes()) <= releases_paid
    assert kills, "no kill came late enough"
    fork_and_wait(run_until_killed, subject, directory, 0, budget)
    finished = json.loads((directory / "finished").read_text())
    assert finished["releases"] <= releases_paid
    assert finished["epsilon"] <= budget.epsilon


def kill_again_and_again(subject: type[StrategySubject], directory: Path) -> None:
    """Kill one run at a later moment each time, until it gets through."""
    for at in range(5, 400, 19):
        if fork_and_wait(run_until_killed, subject, directory, at) == 0:
            break
        require_paid(directory)
    fork_and_wait(run_until_killed, subject, directory, 0)
    require_paid(directory)


def run_until_killed(
    subject: type[StrategySubject],
    directory: Path,
    at: int,
    budget: PrivacyBudget | None = None,
) -> None:
    """Begin or resume the run in ``directory`` and die at moment ``at`` of this process."""
    directory.mkdir(exist_ok=True)
    points = KillPoints(at)
    grid = _grid(directory)
    grid.push_messages = points.around(grid.push_messages)
    strategy = contract_strategy(subject(), directory / "run", budget=budget)
    points.install()
    result = strategy.start(
        grid,
        start_arrays(),
        num_rounds=ROUNDS,
        evaluate_fn=lambda _, arrays: _note(directory, arrays),
    )
    _note(directory, result.arrays)
    (directory / "moments").write_text(str(points.count))
    finished = {
        "rounds": result.rounds,
        "releases": result.privacy.releases,
        "epsilon": result.privacy.epsilon,
    }
    (directory / "finished").write_text(json.dumps(finished))


def _grid(directory: Path) -> RecordingGrid:
    answer = adding(0.1)

    def client(message):
        _note(directory, message.content["arrays"])
        return answer(message)

    return RecordingGrid(client, NODES)


def _note(directory: Path, arrays: ArrayRecord) -> None:
    """Write down, durably, that ``arrays`` left, and how long the ledger was by then."""
    model = digest(arrays)
    if model == digest(start_arrays()):
        return
    ledger = directory / "run" / "ledger.jsonl"
    line = json.dumps({"model": model, "ledger": ledger.stat().st_size}) + "\n"
    with (directory / "releases").open("a") as file:
        file.write(line)
        file.flush()
        _fsync(file.fileno())


def digest(arrays: ArrayRecord) -> str:
    """Return the SHA-256 of a model: its names, dtypes and bytes."""
    parts = [
        f"{name} {array.dtype} {array.shape}".encode() + array.data
        for name, array in arrays.items()
    ]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def releases(directory: Path) -> list[dict]:
    """Return what has left, in order."""
    path = directory / "releases"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def distinct_models(directory: Path) -> set[str]:
    """Return the models that have left, the public initial one apart."""
    return {release["model"] for release in releases(directory)}


def charges(ledger: bytes) -> int:
    """Return how many releases the lines of a ledger pay for.

    A torn line pays for one where there is a plan, without which nothing can be charged.
    """
    paid, planned = 0, False
    for line in ledger.split(b"\n"):
        if not line:
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            paid += planned
            continue
        planned |= entry["kind"] == "plan"
        paid += entry["count"] if entry["kind"] == "charge" else 0
    return paid


def require_paid(directory: Path, note: str = "") -> None:
    """Require, at each moment something left, at least as many charges as distinct models out."""
    path = directory / "run" / "ledger.jsonl"
    ledger = path.read_bytes() if path.exists() else b""
    out: set[str] = set()
    for release in releases(directory):
        out.add(release["model"])
        paid = charges(ledger[: release["ledger"]])
        assert len(out) <= paid, f"{len(out)} models were out when {paid} were charged; {note}"


def require_same_bytes_or_a_new_charge(directory: Path, before: list[dict], note: str) -> None:
    """Require that what a resumed run releases is what was out already, or newly paid for."""
    known = {release["model"] for release in before}
    paid_before = charges_at(directory, before[-1]["ledger"]) if before else 0
    for release in releases(directory)[len(before) :]:
        if release["model"] not in known:
            known.add(release["model"])
            paid = charges_at(directory, release["ledger"])
            assert paid > paid_before, f"a resumed run released a new model for free; {note}"
            paid_before = paid


def charges_at(directory: Path, length: int) -> int:
    """Return the charges in the first ``length`` bytes of the ledger."""
    return charges((directory / "run" / "ledger.jsonl").read_bytes()[:length])


def damaged(damage: str, ledger: Path, sidecar: Path, yesterday: tuple[bytes, bytes]) -> None:
    """Do ``damage`` to a ledger and its sidecar."""
    lines = ledger.read_bytes().splitlines(keepends=True)
    shorter = b"".join(lines[:-1])
    match damage:
        case "last line removed":
            ledger.write_bytes(shorter)
        case "last line and sidecar removed":
            ledger.write_bytes(shorter)
            sidecar.unlink()
        case "last line removed, sidecar to match":
            ledger.write_bytes(shorter)
            head = {"length": len(shorter), "head": hashlib.sha256(shorter).hexdigest()}
            sidecar.write_text(json.dumps(head) + "\n")
        case "yesterday's copy":
            ledger.write_bytes(yesterday[0])
        case "yesterday's copy with its sidecar":
            ledger.write_bytes(yesterday[0])
            sidecar.write_bytes(yesterday[1])
        case "yesterday's copy without a sidecar":
            ledger.write_bytes(yesterday[0])
            sidecar.unlink()
        case "ledger and sidecar removed":
            ledger.unlink()
            sidecar.unlink()
        case "a charge edited away":
            ledger.write_bytes(b"".join(_without_a_charge(lines)))
        case _:
            raise ValueError(damage)


def _without_a_charge(lines: list[bytes]) -> Iterator[bytes]:
    removed = False
    for line in lines:
        if not removed and b'"charge"' in line:
            removed = True
            continue
        yield line
