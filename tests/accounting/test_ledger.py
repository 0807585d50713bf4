import hashlib
import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from dpfl_flower.accounting import (
    BudgetExhausted,
    Composed,
    FixedSizeSampled,
    Gaussian,
    Ledger,
    LedgerError,
    LedgerLocked,
    LedgerPosition,
    LedgerTampered,
    PoissonSampled,
    PrivacyBudget,
    PrivacyUnit,
    Relation,
    UnsupportedEvent,
    affordable_rounds,
    calibrate,
    epsilon,
)
from dpfl_flower.accounting import pld as pld_module

TERMS = {"dataset": "heart", "delta": 1e-5}
BUDGET = PrivacyBudget(2.0, 1e-5)
ADD_REMOVE = Relation.ADD_OR_REMOVE_ONE


@pytest.fixture
def path(tmp_path):
    return tmp_path / "runs" / "ledger.jsonl"


def sidecar(path):
    return path.with_name(path.name + ".head")


def opened(path, **changes):
    return Ledger.open(path, **{**TERMS, **changes})


def filled(path, charges=3, **changes):
    """A closed ledger with one run; return its position."""
    with opened(path, **changes) as ledger:
        ledger.plan("model", Gaussian(10.0), 100)
        for number in range(charges):
            ledger.charge("model", note={"round": number})
        return ledger.position


def both(path):
    return path.read_bytes(), sidecar(path).read_bytes()


def put_back(path, copy):
    path.write_bytes(copy[0])
    sidecar(path).write_bytes(copy[1])


# What it remembers.


def test_charges_outlive_the_process(path):
    position = filled(path)
    with opened(path) as ledger:
        assert ledger.events() == [Composed(Gaussian(10.0), 3)]
        assert ledger.position == position
        assert ledger.durable
        expected = epsilon([Composed(Gaussian(10.0), 3)], delta=1e-5, relation=ADD_REMOVE)
        assert ledger.epsilon() == expected
        assert ledger.epsilon(1e-7) > expected
        ledger.charge("model")
        assert ledger.releases == 4


def test_a_quick_look_tells_no_less_than_everything_charged(path):
    with opened(path) as ledger:
        event = PoissonSampled(0.2, Gaussian(2.0))
        ledger.plan("model", event, 60, max_charge=20, total_variation=1e-7)
        for _ in range(3):
            ledger.charge("model", count=20)
            quick = ledger.quick_epsilon()
            assert ledger.epsilon() - 1e-9 <= quick <= ledger.epsilon() * 1.001
            assert ledger.quick_epsilon() == ledger.epsilon()  # which is known now
            without = epsilon(ledger.events(), delta=1e-5, relation=ADD_REMOVE)
            assert quick > 1.001 * without, "what samplers leave is not in it"


def test_runs_on_the_same_data_compose(path):
    with opened(path) as ledger:
        ledger.plan("a", Gaussian(10.0), 10)
        ledger.plan("b", Gaussian(5.0), 10)
        ledger.charge("a")
        ledger.charge("b")
        ledger.charge("b")
        both_runs = [Gaussian(10.0), Composed(Gaussian(5.0), 2)]
        assert ledger.events() == both_runs
        assert ledger.epsilon() == epsilon(both_runs, delta=1e-5, relation=ADD_REMOVE)


def test_what_was_spent_is_said_in_full(path):
    with opened(path, unit="user", relation="replace-one") as ledger:
        ledger.plan("model", Gaussian(20.0), 10)
        ledger.charge("model")
        spent = ledger.spent()
        assert spent.unit is PrivacyUnit.USER
        assert str(spent) == (
            "epsilon 0.341 at delta 1e-05 for each user (replace-one) "
            'of data set "heart" after 1 release'
        )
    assert float(str(spent).split()[1]) >= spent.epsilon


def test_a_ledger_in_memory_speaks_for_this_run_only():
    with Ledger.in_memory(**TERMS, budget=BUDGET) as ledger:
        ledger.plan("model", Gaussian(20.0), 10)
        position = ledger.charge("model")
        ledger.charge("model")
        ledger.require_extends(position)
        assert not ledger.durable
        assert str(ledger.spent()).endswith("; this run only")
    with pytest.raises(LedgerError, match="is closed"):
        ledger.charge("model")


def test_the_file_is_lines_of_json_that_only_its_owner_may_read(path):
    filled(path)
    for file in (path, sidecar(path)):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["header", "plan", "charge", "charge", "charge"]
    assert lines[0]["dataset"] == "heart"
    assert lines[4]["note"] == {"round": 2}


def test_new_folders_are_on_disk_before_anything_is_charged(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync

    def watched(descriptor):
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    with opened(tmp_path / "a" / "b" / "ledger"):
        pass
    folders = [str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "b")]
    assert synced[:2] == folders[:2]
    assert synced[-1] == folders[2]


def test_numpy_integers_are_written_as_integers(path):
    with opened(path) as ledger:
        ledger.plan("model", Gaussian(np.float64(10.0)), np.int64(10), max_charge=np.int64(3))
        ledger.charge("model", np.int64(3))
    with opened(path) as ledger:
        assert ledger.releases == 3


def test_every_charge_shows_at_once(path):
    with opened(path, budget=BUDGET) as ledger:
        ledger.plan("model", Gaussian(10.0), 10)
        previous = ledger.spent().epsilon
        assert previous == 0.0
        for _ in range(3):
            ledger.charge("model")
            assert ledger.epsilon() > previous
            previous = ledger.spent().epsilon


# What may be charged.


def test_a_charge_needs_a_plan_and_a_plan_never_changes(path):
    with opened(path) as ledger:
        with pytest.raises(LedgerError, match="run 'model' has no plan"):
            ledger.charge("model")
        with pytest.raises(LedgerError, match="no plan"):
            ledger.affordable("model", 1)
        plan = ledger.plan("model", Gaussian(10.0), 100)
        ledger.charge("model")
        before = path.read_bytes()
        assert ledger.plan("model", Gaussian(10.0), 100) == plan
        for other in ((Gaussian(9.0), 100), (Gaussian(10.0), 101)):
            with pytest.raises(LedgerError, match="is planned as"):
                ledger.plan("model", *other)
        with pytest.raises(LedgerError, match="is planned as"):
            ledger.plan("model", Gaussian(10.0), 100, max_charge=2)
        assert path.read_bytes() == before
        assert ledger.plans == {"model": plan}
    with opened(path) as ledger:
        assert ledger.plan("model", Gaussian(10.0), 100) == plan


def test_no_more_than_was_planned_is_charged(path):
    with opened(path) as ledger:
        ledger.plan("model", Gaussian(10.0), 5, max_charge=2)
        with pytest.raises(ValueError, match="count=3 must be <= max_charge = 2"):
            ledger.charge("model", 3)
        for bad in (0, -1, 1.5, True):
            with pytest.raises(ValueError, match="count="):
                ledger.charge("model", bad)
        ledger.charge("model", 2)
        ledger.charge("model", 2)
        assert ledger.affordable("model", 10) == 1
        with pytest.raises(LedgerError, match="4 of 5 planned releases"):
            ledger.charge("model", 2)
        ledger.charge("model")
        assert ledger.affordable("model", 10) == 0


def test_what_the_relation_cannot_price_is_not_planned(path):
    with opened(path) as ledger:
        before = path.read_bytes()
        with pytest.raises(UnsupportedEvent):
            ledger.plan("model", FixedSizeSampled(100, 10, Gaussian(1.0)), 10)
        assert path.read_bytes() == before


def test_the_budget_is_spent_to_the_last_affordable_release_and_not_beyond(path):
    affordable = affordable_rounds(BUDGET, Gaussian(10.0))
    with opened(path, budget=BUDGET) as ledger:
        ledger.plan("model", Gaussian(10.0), 1000)
        assert ledger.affordable("model", 1000) == affordable
        assert ledger.affordable("model", 3) == 3
        for _ in range(affordable):
            ledger.charge("model")
        before = both(path)
        with pytest.raises(BudgetExhausted, match="would exceed the budget"):
            ledger.charge("model")
        assert both(path) == before
        assert ledger.epsilon() <= BUDGET.epsilon
        over = [*ledger.events(), Gaussian(10.0)]
        assert epsilon(over, delta=1e-5, relation=ADD_REMOVE) > BUDGET.epsilon
    with opened(path) as ledger, pytest.raises(BudgetExhausted):
        ledger.charge("model")


def test_a_charge_of_several_is_refused_whole(path):
    with opened(path, budget=BUDGET) as ledger:
        ledger.plan("model", Gaussian(10.0), 1000, max_charge=20)
        ledger.charge("model", 20)
        left = ledger.affordable("model", 20)
        assert 0 < left < 20
        with pytest.raises(BudgetExhausted):
            ledger.charge("model", left + 1)
        ledger.charge("model", left)


def test_another_run_leaves_less(path):
    with opened(path, budget=BUDGET) as ledger:
        ledger.plan("a", Gaussian(10.0), 1000)
        ledger.plan("b", Gaussian(10.0), 1000)
        alone = ledger.affordable("a", 1000)
        ledger.charge("b")
        assert ledger.affordable("a", 1000) == alone - 1
        ledger.charge("a")
        assert ledger.affordable("b", 1000) == alone - 2


def test_a_calibrated_run_can_make_every_planned_release(path):
    rounds = 30
    with opened(path, budget=BUDGET) as ledger:
        ledger.plan("earlier", Gaussian(8.0), 5)
        for _ in range(5):
            ledger.charge("earlier")
        z = calibrate(BUDGET, None, rounds, prior=ledger.events())
        ledger.plan("model", Gaussian(z), rounds)
        for _ in range(rounds):
            ledger.charge("model")
        assert 0.999 * BUDGET.epsilon < ledger.epsilon() <= BUDGET.epsilon


def test_a_run_without_noise_is_never_within_a_budget(path):
    with opened(path, budget=BUDGET) as ledger:
        ledger.plan("model", Gaussian(0.0), 10)
        with pytest.raises(BudgetExhausted):
            ledger.charge("model")


def test_without_a_budget_everything_planned_may_be_charged(path):
    with opened(path) as ledger:
        ledger.plan("model", Gaussian(0.0), 10)
        assert ledger.affordable("model", 50) == 10
        ledger.charge("model")
        assert ledger.epsilon() == float("inf")
        assert "epsilon infinite" in str(ledger.spent())


def test_rounds_of_a_plan_that_fits_are_not_priced_one_by_one(monkeypatch):
    priced = []
    compose = pld_module.compose

    def counted(*arguments):
        priced.append(arguments)
        return compose(*arguments)

    monkeypatch.setattr(pld_module, "compose", counted)
    with Ledger.in_memory(**TERMS, budget=BUDGET) as ledger:
        ledger.plan("model", PoissonSampled(0.1, Gaussian(10.0)), 50)
        for _ in range(50):
            ledger.charge("model")
    assert len(priced) == 1


def test_inexact_samplers_are_part_of_the_price():
    with Ledger.in_memory(**TERMS, budget=BUDGET) as ledger:
        ledger.plan("model", Gaussian(10.0), 100, total_variation=1e-7)
        for _ in range(10):
            ledger.charge("model")
        assert ledger.total_variation == pytest.approx(10 * 1e-7)
        expected = epsilon(
            [Composed(Gaussian(10.0), 10)],
            delta=1e-5,
            relation=ADD_REMOVE,
            total_variation=10 * 1e-7,
        )
        assert ledger.epsilon() == expected
        assert ledger.affordable("model", 100) < affordable_rounds(BUDGET, Gaussian(10.0))


def test_threads_do_not_spend_a_budget_twice():
    with Ledger.in_memory(**TERMS, budget=BUDGET) as ledger:
        ledger.plan("model", Gaussian(10.0), 1000)
        affordable = ledger.affordable("model", 1000)

        def spend():
            for _ in range(affordable):
                try:
                    ledger.charge("model")
                except BudgetExhausted:
                    return

        threads = [threading.Thread(target=spend) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert ledger.releases == affordable


# Budgets over time.


def test_a_budget_written_down_holds_when_none_is_given(path):
    filled(path, charges=0, budget=BUDGET)
    with opened(path) as ledger:
        assert ledger.budget == BUDGET


def test_a_smaller_budget_holds_for_one_opening(path):
    filled(path, charges=10, budget=BUDGET)
    smaller = PrivacyBudget(1.0, 1e-5)
    with opened(path, budget=smaller) as ledger, pytest.raises(BudgetExhausted):
        ledger.charge("model")
    with opened(path) as ledger:
        ledger.charge("model")


def test_a_larger_budget_is_raised_deliberately_and_on_record(path):
    filled(path, budget=BUDGET)
    larger = PrivacyBudget(4.0, 1e-5)
    with pytest.raises(LedgerError, match=r"budget of epsilon 2\.0, it was opened for 4\.0"):
        opened(path, budget=larger)
    with opened(path, budget=larger, raise_budget=True) as ledger:
        assert ledger.budget == larger
    with opened(path, budget=larger) as ledger:
        assert ledger.budget == larger
    assert '"kind":"budget","epsilon":4.0' in path.read_text()


def test_a_budget_given_later_is_written_down(path):
    filled(path)
    with opened(path, budget=BUDGET):
        pass
    with opened(path) as ledger:
        assert ledger.budget == BUDGET


@pytest.mark.parametrize(
    "budget",
    [
        PrivacyBudget(2.0, 1e-6),
        PrivacyBudget(2.0, 1e-5, unit="example"),
        PrivacyBudget(2.0, 1e-5, relation="zero-out"),
    ],
)
def test_a_budget_for_something_else_is_refused(path, budget):
    with pytest.raises(ValueError, match=r"budget\..* must be the ledger's"):
        opened(path, budget=budget)
    with pytest.raises(ValueError, match=r"budget\..* must be the ledger's"):
        Ledger.in_memory(**TERMS, budget=budget)
    assert not path.exists()


# What it is about.


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dataset", "lungs"),
        ("delta", 1e-6),
        ("unit", "example"),
        ("relation", "replace-one"),
    ],
)
def test_a_ledger_about_something_else_is_refused_naming_both(path, field, value):
    filled(path)
    before = both(path)
    with pytest.raises(LedgerError) as error:
        opened(path, **{field: value})
    here = {**TERMS, "unit": "node", "relation": "add-or-remove-one"}[field]
    assert field in str(error.value)
    assert str(here) in str(error.value)
    assert str(value) in str(error.value)
    assert both(path) == before


@pytest.mark.parametrize(
    "bad", [{"delta": 0.0}, {"dataset": ""}, {"unit": "x"}, {"wait_seconds": -1.0}]
)
def test_bad_terms_are_refused(path, bad):
    with pytest.raises(ValueError):
        opened(path, **bad)


@pytest.mark.parametrize(
    "bad",
    [
        {"run": "", "event": Gaussian(1.0), "count": 1},
        {"run": "m", "event": "gaussian", "count": 1},
        {"run": "m", "event": Gaussian(1.0), "count": 0},
        {"run": "m", "event": Gaussian(1.0), "count": 1, "max_charge": 0},
        {"run": "m", "event": Gaussian(1.0), "count": 1, "total_variation": -1.0},
    ],
)
def test_bad_plans_are_refused(bad):
    with Ledger.in_memory(**TERMS) as ledger, pytest.raises(ValueError):
        ledger.plan(**bad)


# One writer.


def test_a_second_opening_in_the_same_process_is_refused(path):
    with opened(path):
        with pytest.raises(LedgerLocked, match="open elsewhere"):
            opened(path)
        link = path.with_name("link.jsonl")
        link.symlink_to(path)
        with pytest.raises(LedgerLocked):
            opened(link)
    with opened(link) as ledger:
        assert ledger.releases == 0


HOLD = """
import sys
from dpfl_flower.accounting import Ledger
with Ledger.open(sys.argv[1], dataset="heart", delta=1e-5):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_a_second_process_is_refused_until_the_first_one_is_done(path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(LedgerLocked):
            opened(path)
        # A little later it is free: whoever waits gets it.
        release = threading.Timer(0.3, lambda: (holder.stdin.write("\n"), holder.stdin.close()))
        release.start()
        with opened(path, wait_seconds=60.0) as ledger:
            assert ledger.releases == 0
        release.join()
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def test_a_forked_child_can_neither_charge_nor_free_the_lock(path):
    with opened(path) as ledger:
        ledger.plan("model", Gaussian(10.0), 10)
        before = both(path)
        child = os.fork()
        if child == 0:  # pragma: no cover
            try:
                ledger.charge("model")
            except LedgerError:
                ledger.close()
                os._exit(7)
            os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 7
        assert both(path) == before
        with pytest.raises(LedgerLocked):
            opened(path)


def test_a_fork_that_lives_on_does_not_keep_the_lock(path):
    ledger = opened(path)
    ready, wait = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover
        os.close(wait)
        os.read(ready, 1)
        os._exit(0)
    ledger.close()
    try:
        with opened(path):
            pass
    finally:
        os.close(wait)
        os.waitpid(child, 0)
        os.close(ready)


def test_closing_twice_is_harmless_and_a_closed_ledger_takes_nothing(path):
    ledger = opened(path)
    ledger.plan("model", Gaussian(10.0), 10)
    ledger.close()
    ledger.close()
    with pytest.raises(LedgerError, match="is closed"):
        ledger.charge("model")


# Edited, truncated, rolled back.


def refused(path, match=None):
    """The ledger is refused, and stays as it is."""
    before = both(path) if sidecar(path).exists() else path.read_bytes()
    with pytest.raises(LedgerTampered, match=match):
        opened(path)
    assert (both(path) if sidecar(path).exists() else path.read_bytes()) == before


@pytest.mark.parametrize(
    ("content", "head"),
    [
        (b'{"kind":"header","format":"dpfl-ledger-1","prev":"%s"}\n', None),
        (b"", '{"length":0,"head":"%s"}'),
        (b"[" * 100_000 + b"\n", '{"length":1,"head":"x"}'),
        (b"", '{"length":1e400,"head":"x"}'),
        (b"", "[" * 100_000),
        (b"\xff\xfe\n", None),
    ],
)
def test_whatever_else_lies_in_its_place_is_refused_as_tampered(path, content, head):
    empty = hashlib.sha256().hexdigest()
    path.parent.mkdir()
    path.write_bytes(content.replace(b"%s", empty.encode()))
    if head is not None:
        sidecar(path).write_text(head.replace("%s", empty))
    with pytest.raises(LedgerTampered):
        opened(path)


def test_any_edited_byte_is_noticed(path):
    filled(path)
    copy = both(path)
    for index in range(len(copy[0])):
        for byte in {copy[0][index] ^ 1} | ({10, 48} if index % 10 == 0 else set()):
            if byte == copy[0][index]:
                continue
            edited = bytearray(copy[0])
            edited[index] = byte
            put_back(path, (bytes(edited), copy[1]))
            refused(path)


def test_any_removed_line_is_noticed(path):
    filled(path)
    copy = both(path)
    lines = copy[0].splitlines(keepends=True)
    for index in range(len(lines)):
        put_back(path, (b"".join(lines[:index] + lines[index + 1 :]), copy[1]))
        refused(path)


def test_any_swapped_or_repeated_line_is_noticed(path):
    filled(path)
    copy = both(path)
    lines = copy[0].splitlines(keepends=True)
    put_back(path, (b"".join([*lines[:3], lines[4], lines[3]]), copy[1]))
    refused(path)
    put_back(path, (copy[0] + lines[-1], copy[1]))
    refused(path, match="does not follow")


def test_any_lost_end_is_noticed(path):
    filled(path)
    copy = both(path)
    for length in [*range(0, len(copy[0]), 5), len(copy[0]) - 1]:
        put_back(path, (copy[0][:length], copy[1]))
        refused(path)


def test_a_removed_ledger_is_noticed_by_its_sidecar(path):
    filled(path)
    path.unlink()
    with pytest.raises(LedgerTampered, match="does not extend"):
        opened(path)


def test_a_copy_of_yesterday_is_noticed_by_the_sidecar(path):
    filled(path)
    yesterday = path.read_bytes()
    with opened(path) as ledger:
        ledger.charge("model")
    path.write_bytes(yesterday)
    refused(path, match="truncated, edited or rolled back")


def test_a_copy_of_yesterday_with_its_sidecar_is_noticed_by_the_checkpoint(path):
    earlier = filled(path)
    yesterday = both(path)
    with opened(path) as ledger:
        checkpoint = ledger.charge("model")
        ledger.require_extends(earlier)
        ledger.require_extends(checkpoint)
    put_back(path, yesterday)
    with opened(path) as ledger:
        ledger.require_extends(earlier)
        with pytest.raises(LedgerTampered, match="an older copy was put back"):
            ledger.require_extends(checkpoint)
        # Charging on does not hide it.
        ledger.charge("model", note={"round": 99})
        with pytest.raises(LedgerTampered):
            ledger.require_extends(checkpoint)
        with pytest.raises(LedgerTampered):
            ledger.require_extends(LedgerPosition(checkpoint.length, "0" * 64))


@pytest.mark.parametrize("charges", [0, 3])
def test_a_missing_sidecar_is_refused_and_says_how_to_go_on(path, charges):
    filled(path, charges)
    sidecar(path).unlink()
    refused(path, match="accept_missing_head=True")
    with opened(path, accept_missing_head=True) as ledger:
        assert ledger.releases == charges
    with opened(path) as ledger:
        assert ledger.releases == charges


def test_a_torn_line_without_a_sidecar_is_refused(path):
    filled(path, charges=0)
    sidecar(path).unlink()
    with path.open("ab") as file:
        file.write(b'{"ki')
    refused(path, match="accept_missing_head=True")


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[1, 2]", b'{"length": "x", "head": 1}', b"\xff\xfe"]
)
def test_a_sidecar_that_is_none_is_refused(path, content):
    filled(path)
    sidecar(path).write_bytes(content)
    refused(path, match="not a ledger's sidecar")


def test_a_file_that_is_no_ledger_is_refused(path):
    path.parent.mkdir()
    for content in (b"hello\n", b'{"kind":"header"}\n', b"[]\n", b"\n"):
        path.write_bytes(content)
        refused(path)


def test_lines_that_chain_but_mean_nothing_are_refused(path):
    from dpfl_flower.accounting.ledger_file import Chain

    filled(path)
    for record in (
        {"kind": "gift"},
        {"kind": "charge", "run": "nobody", "count": 1},
        {"kind": "plan", "run": "x"},
        {
            "kind": "plan",
            "run": "x",
            "event": {"kind": "sorcery"},
            "count": 1,
            "max_charge": 1,
            "total_variation": 0.0,
        },
    ):
        copy = both(path)
        chain = Chain.parse(copy[0])
        path.write_bytes(copy[0] + chain.line(record))
        refused(path, match="that is none")
        put_back(path, copy)


def test_a_file_replaced_under_an_open_ledger_takes_no_charge(path):
    filled(path)
    yesterday = path.read_bytes()
    with opened(path) as ledger:
        other = path.with_name("other")
        other.write_bytes(yesterday)
        other.replace(path)
        with pytest.raises(LedgerTampered, match="was replaced"):
            ledger.charge("model")
        path.unlink()
        with pytest.raises(LedgerTampered, match="was removed"):
            ledger.charge("model")


def test_a_file_that_grew_or_shrank_under_an_open_ledger_takes_no_charge(path):
    filled(path)
    with opened(path) as ledger:
        with path.open("ab") as file:
            file.write(b"x")
        with pytest.raises(LedgerTampered, match="bytes, it was left with"):
            ledger.charge("model")


# A crash while a ledger was created.


def test_a_first_line_that_was_cut_short_is_begun_again(path):
    filled(path, charges=0)
    whole = path.read_bytes().splitlines(keepends=True)[0]
    for length in [*range(0, len(whole), 5), len(whole) - 1]:
        path.write_bytes(whole[:length])
        sidecar(path).unlink(missing_ok=True)
        with opened(path) as ledger:
            assert ledger.releases == 0
    # Whole, but not confirmed.
    path.write_bytes(whole)
    sidecar(path).unlink()
    with opened(path) as ledger:
        assert ledger.releases == 0
    assert path.read_bytes() == whole
