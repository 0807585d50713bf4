"""No stage is answered twice, whatever is forgotten in between."""

import json

import pytest

from dpfl_flower.accounting.ledger_file import LedgerFile
from dpfl_flower.secagg import Refusal, Refused
from dpfl_flower.secagg.journal import FileJournal, MemoryJournal, Progress
from dpfl_flower.secagg.messages import Stage

A, S, M, K, U = Stage


def refused(journal, server_round, stage):
    before = journal.progress
    with pytest.raises(Refused) as error:
        journal.enter(server_round, stage)
    assert journal.progress == before or error.value.reason is Refusal.JOURNAL
    return error.value.reason


@pytest.fixture(params=["memory", "file"])
def journal(request, tmp_path):
    return MemoryJournal() if request.param == "memory" else FileJournal(tmp_path / "a" / "j", 7, 1)


@pytest.mark.parametrize("stages", [(A, S, M, U), (A, S, M, K, U)])
def test_the_stages_in_order_pass(journal, stages):
    for server_round in (1, 2, 5):
        for stage in stages:
            journal.enter(server_round, stage)


def test_replayed_and_reordered_stages(journal):
    assert refused(journal, 1, S) is Refusal.OUT_OF_ORDER
    journal.enter(2, A)
    for server_round, stage, reason in (
        (2, A, Refusal.REPLAYED),
        (1, A, Refusal.REPLAYED),
        (2, M, Refusal.OUT_OF_ORDER),
        (2, U, Refusal.OUT_OF_ORDER),
        (3, S, Refusal.OUT_OF_ORDER),
    ):
        assert refused(journal, server_round, stage) is reason
    for stage in (S, M):
        journal.enter(2, stage)
        assert refused(journal, 2, stage) is Refusal.REPLAYED
        assert refused(journal, 2, A) is Refusal.REPLAYED
    journal.enter(2, U)
    assert refused(journal, 2, U) is Refusal.ALREADY_UNMASKED
    assert refused(journal, 2, M) is Refusal.REPLAYED
    assert refused(journal, 1, U) is Refusal.REPLAYED


def test_a_file_remembers_what_the_state_of_a_run_forgot(tmp_path):
    path = tmp_path / "journal"
    for stage in (A, S, M, U):
        FileJournal(path, 7, 1, remembered=Progress()).enter(4, stage)
    assert refused(FileJournal(path, 7, 1), 4, U) is Refusal.ALREADY_UNMASKED
    assert refused(FileJournal(path, 7, 1), 4, A) is Refusal.REPLAYED
    FileJournal(path, 8, 1).enter(4, A)  # another run has rounds of its own
    FileJournal(path, 7, 2).enter(4, A)  # and so has another node
    FileJournal(path, 7, 1).enter(5, A)
    # What memory says counts too, where the file was exchanged.
    late = FileJournal(tmp_path / "new", 7, 1, remembered=Progress(9, int(U)))
    assert refused(late, 9, U) is Refusal.ALREADY_UNMASKED


def test_lines_of_other_runs_cost_next_to_nothing_but_are_lines(tmp_path, monkeypatch):
    path = tmp_path / "journal"
    for stage in (A, S):
        FileJournal(path, 7, 1).enter(4, stage)
    with path.open("ab") as file:
        file.writelines(b"[8, 1, %d, 1]\n" % n for n in range(1, 500))
        file.writelines(b"[7, 11, %d, 1]\n" % n for n in range(1, 500))
    read, loads = [], json.loads
    monkeypatch.setattr(json, "loads", lambda line: read.append(line) or loads(line))
    FileJournal(path, 7, 1).enter(4, M)
    assert read == [b"[7, 1, 4, 1]", b"[7, 1, 4, 2]"]
    with path.open("ab") as file:
        file.write(b"[8, 1, 500]\n")
    assert refused(FileJournal(path, 7, 1), 4, U) is Refusal.JOURNAL


def test_a_line_that_a_crash_cut_short_was_never_answered(tmp_path):
    path = tmp_path / "journal"
    for stage in (A, S, M):
        FileJournal(path, 7, 1).enter(1, stage)
    whole = path.read_bytes()
    path.write_bytes(whole + b"[7,1,1")
    FileJournal(path, 7, 1).enter(1, U)
    assert refused(FileJournal(path, 7, 1), 1, U) is Refusal.ALREADY_UNMASKED


@pytest.mark.parametrize(
    "damage", [b"x\n", b"[7,1]\n", b'{"a":1}\n', b"[7,1,1,2,3]\n", b"[7,1,1,1.5]\n"]
)
def test_a_damaged_or_locked_journal_refuses(tmp_path, damage):
    path = tmp_path / "journal"
    FileJournal(path, 7, 1).enter(1, A)
    path.write_bytes(path.read_bytes() + damage)
    assert refused(FileJournal(path, 7, 1), 1, S) is Refusal.JOURNAL
    path.unlink()
    locked = LedgerFile.lock(path)
    try:
        assert refused(FileJournal(path, 7, 1, wait_seconds=0.0), 1, A) is Refusal.JOURNAL
    finally:
        locked.close()
    assert refused(FileJournal(tmp_path, 7, 1), 1, A) is Refusal.JOURNAL
