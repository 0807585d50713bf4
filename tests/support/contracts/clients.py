"""What a client that trains privately must obey; subclass `ClientContract`.

Everything is seen through the ClientApp: messages in, bytes out. The model is linear and starts at
zero, so that what a round adds to it can be read off the reply.
"""

import hashlib
import json
import os
import random
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from numpy.typing import NDArray
from torch.utils.data import Dataset, TensorDataset

from dpfl_flower import records
from dpfl_flower.client import NODE_LOGGER
from tests.support.contracts import sentinel, statistics
from tests.support.contracts.seeds import reseed
from tests.support.contracts.sentinel import COUNT, NUMBER, WORD
from tests.support.contracts.strategy import quiet
from tests.support.forked import fork_and_wait, run_forked
from tests.support.kill_points import KillPoints
from tests.support.node import all_bytes, context, message
from tests.support.recording_grid import record

_fsync = os.fsync  # replies are noted by calls that do not count as the client's own

HOSTILE = {
    "features of 1e5": (1e5, 1.0),
    "huge": (3e38, 1.0),
    "tiny": (1e-30, 1.0),
    "all missing": (np.nan, np.nan),
    "features missing": (np.nan, 1.0),
    "target missing": (0.5, np.nan),
    "infinite": (np.inf, 1.0),
    "huge target": (1.0, 1e30),
    "infinite target": (1.0, -np.inf),
}
"""Feature value and target of a record that no honest node holds."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a contract asks for: the public constants of one round of training.

    ``features`` is the model's number of weights; it has no bias. The loss of a record is the
    squared error, the step that of plain gradient descent with a learning rate of 1.
    """

    features: int
    noise_multiplier: float
    sampling_rate: float = 1.0
    steps: int = 1
    clip_norm: float = 0.5
    expected_batch_size: float = 10.0
    delta: float = 1e-5


class ClientSubject(ABC):
    """How a contract gets at the client under test."""

    @abstractmethod
    def app(self, training: Training, dataset: Dataset, *, ledger: Path | None = None) -> ClientApp:
        """Return the app of a node that holds ``dataset``: items ``(features, target)``."""

    def reply(self, app: ClientApp, training: Training, *, node_context=None) -> Message:
        """Return what a node answers to the request to train from a model of zeros."""
        arrays = record(np.zeros((1, training.features), np.float32), names=["weight"])
        content = RecordDict({records.ARRAYS: arrays, records.CONFIG: ConfigRecord()})
        reseed()
        return app(message("train", content), node_context or context())

    def moved(self, app: ClientApp, training: Training, **settings) -> NDArray[np.float64]:
        """Return what a round adds to the model, in clip norms before the division."""
        reply = self.reply(app, training, **settings)
        assert not reply.has_error(), reply.error
        (array,) = reply.content[records.ARRAYS].values()
        scale = training.expected_batch_size / training.clip_norm
        return array.numpy().astype(np.float64).ravel() * scale


class ClientIsolation(ClientSubject):
    """However hostile a record, it moves a step by at most the clip norm, and is found nowhere."""

    @pytest.mark.parametrize("kind", list(HOSTILE))
    def test_one_record_moves_a_step_by_at_most_the_clip_norm(self, kind):
        value, target = HOSTILE[kind]
        training = Training(features=3, noise_multiplier=0.0)
        others = honest_records(6, 3)
        hostile = (torch.full((1, 3), value), torch.full((1,), target))
        moved = {
            n: self.moved(self.app(training, joined(others, *[hostile] * n)), training)
            for n in (0, 1)
        }
        assert np.isfinite(moved[1]).all()
        assert np.linalg.norm(moved[1] - moved[0]) <= 1 + 1e-4
        assert np.linalg.norm(moved[0]) > 1, "the records do nothing, so nothing is shown"

    @pytest.mark.parametrize("kind", list(HOSTILE))
    def test_replacing_a_record_moves_a_step_by_at_most_twice_the_clip_norm(self, kind):
        value, target = HOSTILE[kind]
        training = Training(features=3, noise_multiplier=0.0)
        others = honest_records(6, 3)
        opposite = (torch.full((1, 3), -1e3), torch.full((1,), 1e3))
        hostile = (torch.full((1, 3), value), torch.full((1,), target))
        moved = [
            self.moved(self.app(training, joined(others, last)), training)
            for last in (hostile, opposite)
        ]
        assert np.linalg.norm(moved[1] - moved[0]) <= 2 + 1e-4

    def test_the_reply_does_not_tell_how_many_records_there_are(self):
        training = Training(features=3, noise_multiplier=1.0, sampling_rate=0.5)
        seen = set()
        for n in (0, 1, 7, 300):
            reply = self.reply(self.app(training, joined(honest_records(n, 3))), training)
            assert not reply.has_error()
            content = RecordDict(
                {name: r for name, r in reply.content.items() if name != records.ARRAYS}
            )
            seen.add(all_bytes(content))
        assert len(seen) == 1

    @pytest.mark.parametrize("place", ["feature", "target", "item", "index"])
    def test_a_sentinel_in_one_record_is_found_nowhere(self, place, tmp_path, caplog, capfd):
        caplog.set_level(0)
        training = Training(features=3, noise_multiplier=1.0)
        app = self.app(training, WithSentinel(place), ledger=tmp_path / "ledger.jsonl")
        reply = self.reply(app, training)
        assert not reply.has_error(), reply.error
        sentinel.require_absent_from_messages([reply], "the reply")
        sentinel.require_absent_from_directory(tmp_path)
        sentinel.require_absent_from_logs(caplog, but_for=(NODE_LOGGER,))
        if place in {"item", "index"}:
            own = [r for r in caplog.records if r.name == NODE_LOGGER]
            assert WORD in "".join(logged(r) for r in own), "the node's own log says why"

    @pytest.mark.parametrize(
        ("place", "position"),
        [("item", 2), ("index", 2), ("shape", 2), ("item", 0), ("index", 0)],
    )
    def test_a_record_that_cannot_be_read_counts_as_zeros(self, place, position):
        training = Training(features=3, noise_multiplier=0.0)
        moved = self.moved(self.app(training, WithSentinel(place, position)), training)
        others = [t[torch.arange(5) != position] for t in honest_records(5, 3)]
        expected = self.moved(self.app(training, TensorDataset(*others)), training)
        np.testing.assert_allclose(moved, expected, rtol=1e-5)

    def test_a_reply_from_one_record_cannot_be_told_by_its_size(self):
        training = Training(features=3, noise_multiplier=1.0)
        sizes = {
            len(all_bytes(self.reply(self.app(training, data), training).content))
            for data in (joined(honest_records(4, 3)), WithSentinel("feature"))
        }
        assert len(sizes) == 1


class ClientContract(ClientIsolation):
    """All the claims that a private client inherits."""

    # --- noise is there, full-sized, fresh ----------------------------------------------------

    def test_the_noise_has_the_stated_scale_and_3_percent_off_is_rejected(self):
        training = Training(features=100_000, noise_multiplier=1.3)
        app = self.app(training, joined(honest_records(0, 100_000)))
        draws = [self.moved(app, training) for _ in range(2)]
        statistics.require_scale(np.concatenate(draws), 1.3)
        statistics.require_uncorrelated(draws)

    def test_every_step_adds_its_own_noise(self):
        training = Training(features=100_000, noise_multiplier=0.5, steps=4)
        app = self.app(training, joined(honest_records(0, 100_000)))
        statistics.require_scale(self.moved(app, training), 0.5 * 2, shape=False)

    def test_forked_workers_and_restarts_are_uncorrelated(self, tmp_path):
        for process in range(2):
            run_forked(noise_of_forks, type(self), tmp_path / str(process))
        samples = [np.load(path) for path in sorted(tmp_path.rglob("*.npy"))]
        assert len(samples) == 8
        statistics.require_uncorrelated(samples)

    # --- sampling that really happened --------------------------------------------------------

    def test_records_join_a_step_by_their_own_coins(self):
        rate, n, steps = 0.25, 2500, 200
        training = Training(features=n, noise_multiplier=0.0, sampling_rate=rate)
        # Record i alone moves weight i.
        app = self.app(training, TensorDataset(torch.eye(n), torch.ones(n)))
        node = context()
        with quiet():
            joined_in = np.array(
                [self.moved(app, training, node_context=node) > 0 for _ in range(steps)]
            )
        require_own_coins(joined_in, rate)

    # --- charge before reply ------------------------------------------------------------------

    def test_killed_at_any_moment_never_more_replies_are_out_than_charged(self, tmp_path):
        seed = int(os.environ.get("DPFL_KILL_SEED") or random.randrange(10**6))
        print(f"DPFL_KILL_SEED={seed} repeats these kills")
        run_forked(kill_and_restart, type(self), tmp_path, seed)

    def test_a_ledger_that_cannot_be_charged_lets_no_reply_out(self, tmp_path):
        training = Training(features=3, noise_multiplier=1.0)
        ledger = tmp_path / "ledger.jsonl"
        app = self.app(training, joined(honest_records(5, 3)), ledger=ledger)
        self.moved(app, training)
        lines = ledger.read_bytes().splitlines(keepends=True)
        ledger.write_bytes(b"".join(lines[:-1]))
        reply = self.reply(app, training)
        assert reply.has_error()


class WithSentinel(Dataset):
    """Honest records, one of which holds the sentinel, or raises with it."""

    def __init__(self, place: str, position: int = 2) -> None:
        self.place = place
        self.position = position
        self.records = honest_records(5, 3)

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index):
        features, target = self.records[0][index].clone(), self.records[1][index].clone()
        if index == self.position:
            match self.place:
                case "feature":
                    features[1] = NUMBER
                case "target":
                    target.fill_(NUMBER)
                case "item":
                    raise ValueError(f"{WORD} has an age of {NUMBER}")
                case "index":
                    raise KeyError(f"{WORD}: {COUNT}")
                case "shape":
                    features = torch.ones(2, 7)
        return features, target


def honest_records(n: int, features: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``n`` records whose gradients are all clipped and mostly agree."""
    generator = torch.Generator().manual_seed(0)
    return 1 + 0.1 * torch.randn(n, features, generator=generator), torch.full((n,), 5.0)


def joined(*parts: tuple[torch.Tensor, torch.Tensor]) -> TensorDataset:
    """Return the records of all parts as one data set."""
    return TensorDataset(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def logged(entry) -> str:
    """Return all that a log record says, its exception's text included."""
    return f"{entry.getMessage()} {entry.exc_info[1] if entry.exc_info else ''}"


def require_own_coins(joined_in: NDArray[np.bool_], rate: float) -> None:
    """Require that every record tossed its own coin of this ``rate`` in every step.

    False alarm: five comparisons, 5e-8. Of 500,000 coins a rate 3 % off is 12 standard errors away
    and missed once in 1e10; steps that are all of one size have no spread at all.

    Parameters
    ----------
    joined_in : bool array, shape (steps, records)
    rate : float
    """
    steps, n = joined_in.shape
    variance = rate * (1 - rate)
    total = np.array([joined_in.sum()])
    assert statistics.counts_fit(total, joined_in.size, rate), "another rate than stated"
    for wrong in (rate * statistics.OFF, rate / statistics.OFF):
        assert not statistics.counts_fit(total, joined_in.size, wrong), "no power"
    assert statistics.counts_fit(joined_in.sum(axis=0), steps, rate), "a record's own rate"
    # The spread over steps, and over records, is that of coins which know nothing of each other:
    # sums of squares of binomials with variances of 469 and 38, so near to chi-square that their
    # own variance is that of chi-square within 0.2 %.
    for axis, coins in ((1, n), (0, steps)):
        counts = joined_in.sum(axis=axis) - coins * rate
        stddev = np.sqrt(coins * variance)
        assert statistics.scale_fits(counts, stddev), "the coins hang together"
    assert not statistics.scale_fits(np.zeros(steps), np.sqrt(n * variance)), "no power"
    # Nobody is more, or less, likely to join again: an epoch without repetition would be seen.
    statistics.require_uncorrelated(
        [joined_in[at].astype(float).ravel() for at in (slice(1, None), slice(steps - 1))]
    )


def noise_of_forks(subject: type[ClientContract], directory: Path) -> None:
    """Save the noise of this process before and after it forked, and of two workers."""
    directory.mkdir()
    training = Training(features=40_000, noise_multiplier=1.0)
    app = subject().app(training, joined(honest_records(0, 40_000)))

    def save(name: str) -> None:
        np.save(directory / name, subject().moved(app, training))

    save("before")
    for worker in ("first", "second"):
        assert fork_and_wait(save, worker) == 0
    save("after")


KILLS = 8
ANSWERS = 2


def kill_and_restart(subject: type[ClientContract], directory: Path, seed: int) -> None:
    """Kill a node at one moment after another, start it again, and count its replies."""
    coins = random.Random(seed)
    whole = directory / "whole"
    fork_and_wait(answer_until_killed, subject, whole, 0)
    moments = int((whole / "moments").read_text())
    assert moments >= 8 * ANSWERS, "the kill points do not see the ledger's writes"
    _require_charged(whole)
    for stop in coins.sample(range(1, moments + 1), min(KILLS, moments)):
        node = directory / f"killed-at-{stop}"
        assert fork_and_wait(answer_until_killed, subject, node, stop) == -9
        _require_charged(node)
        fork_and_wait(answer_until_killed, subject, node, 0)
        _require_charged(node)


def answer_until_killed(subject: type[ClientContract], directory: Path, at: int) -> None:
    """Answer requests from the ledger in ``directory``, and die at moment ``at``."""
    directory.mkdir(exist_ok=True)
    points = KillPoints(at)
    points.install()
    training = Training(features=3, noise_multiplier=1.0)
    ledger = directory / "ledger.jsonl"
    app = subject().app(training, joined(honest_records(5, 3)), ledger=ledger)
    for _ in range(ANSWERS):
        reply = subject().reply(app, training)
        assert not reply.has_error(), reply.error
        points.moment()
        line = json.dumps(
            {
                "reply": hashlib.sha256(all_bytes(reply.content)).hexdigest(),
                "ledger": ledger.stat().st_size,
            }
        )
        with (directory / "replies").open("a") as file:
            file.write(line + "\n")
            file.flush()
            _fsync(file.fileno())
        points.moment()
    (directory / "moments").write_text(str(points.count))


def _require_charged(directory: Path) -> None:
    path = directory / "replies"
    lines = path.read_text().splitlines() if path.exists() else []
    ledger_path = directory / "ledger.jsonl"
    ledger = ledger_path.read_bytes() if ledger_path.exists() else b""
    out: set[str] = set()
    for line in map(json.loads, lines):
        out.add(line["reply"])
        charged = ledger[: line["ledger"]].count(b'"kind":"charge"')
        assert len(out) <= charged, f"{len(out)} replies were out when {charged} were charged"
