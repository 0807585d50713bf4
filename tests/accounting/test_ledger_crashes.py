"""A crash may overcharge, never undercharge."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpfl_flower.accounting import (
    Composed,
    Gaussian,
    Ledger,
    LedgerError,
    PoissonSampled,
    Relation,
    epsilon,
)
from dpfl_flower.accounting.ledger_file import LedgerFile

TERMS = {"dataset": "heart", "delta": 1e-5}
CHEAP, DEAR = Gaussian(50.0), Gaussian(5.0)


def sidecar(path):
    return path.with_name(path.name + ".head")


def both(path):
    return path.read_bytes(), sidecar(path).read_bytes()


def put_back(path, state):
    path.write_bytes(state[0])
    sidecar(path).write_bytes(state[1])


def cost(events):
    return epsilon(events, delta=1e-5, relation=Relation.ADD_OR_REMOVE_ONE)


def planned(path):
    """A ledger with a cheap and a dear run, one charge each, and what the next charge would write.

    Returns the state before, the line, and the state after.
    """
    with Ledger.open(path, **TERMS) as ledger:
        ledger.plan("cheap", CHEAP, 1000)
        ledger.plan("dear", DEAR, 1000, max_charge=3)
        ledger.charge("cheap")
        ledger.charge("dear", 2)
        before = both(path)
        ledger.charge("cheap")
    after = both(path)
    return before, after[0][len(before[0]) :], after


BEFORE = [CHEAP, Composed(DEAR, 2)]


def test_a_line_cut_short_anywhere_counts_as_the_dearest_charge_planned_and_stays(tmp_path):
    path = tmp_path / "ledger"
    before, line, _ = planned(path)
    torn = [*BEFORE, Composed(DEAR, 3)]  # the most one charge may be for, of the dearest run
    for length in range(1, len(line)):
        put_back(path, (before[0] + line[:length], before[1]))
        with Ledger.open(path, **TERMS) as ledger:
            assert ledger.events() == torn
            assert ledger.epsilon() == cost(torn)
            assert ledger.releases == 6
            ledger.charge("cheap")
        # It stays in the file, closed off, and is chained over.
        content = path.read_bytes()
        assert content.startswith(before[0] + line[:length])
        for _ in range(2):
            with Ledger.open(path, **TERMS) as ledger:
                assert ledger.events() == [Composed(CHEAP, 2), Composed(DEAR, 2), torn[2]]
        assert path.read_bytes() == content


def test_a_line_that_lacks_only_its_newline_is_torn_too(tmp_path):
    path = tmp_path / "ledger"
    before, line, _ = planned(path)
    put_back(path, (before[0] + line[:-1], before[1]))
    with Ledger.open(path, **TERMS) as ledger:
        assert ledger.events() == [*BEFORE, Composed(DEAR, 3)]


def test_a_whole_line_that_the_sidecar_does_not_know_yet_is_an_ordinary_charge(tmp_path):
    path = tmp_path / "ledger"
    before, line, after = planned(path)
    put_back(path, (before[0] + line, before[1]))
    with Ledger.open(path, **TERMS) as ledger:
        assert ledger.events() == [Composed(CHEAP, 2), Composed(DEAR, 2)]
    assert both(path) == after


def test_a_crash_while_a_torn_line_is_closed_off_charges_it_once(tmp_path):
    path = tmp_path / "ledger"
    before, line, _ = planned(path)
    put_back(path, (before[0] + line[:20], before[1]))
    with Ledger.open(path, **TERMS):
        pass
    mark = path.read_bytes()[len(before[0]) + 20 :]
    assert mark
    for length in range(len(mark) + 1):
        put_back(path, (before[0] + line[:20] + mark[:length], before[1]))
        with Ledger.open(path, **TERMS) as ledger:
            assert ledger.events() == [*BEFORE, Composed(DEAR, 3)]


def test_an_edited_torn_line_is_noticed_once_it_was_closed_off(tmp_path):
    path = tmp_path / "ledger"
    before, line, _ = planned(path)
    put_back(path, (before[0] + line[:20], before[1]))
    with Ledger.open(path, **TERMS):
        pass
    content, head = both(path)
    for removed in (content[: len(before[0])], content.replace(b"#torn", b"#tarn")):
        put_back(path, (removed, head))
        with pytest.raises(LedgerError):
            Ledger.open(path, **TERMS)


def test_a_torn_plan_charges_nothing_where_nothing_was_planned(tmp_path):
    path = tmp_path / "ledger"
    with Ledger.open(path, **TERMS):
        pass
    with path.open("ab") as file:
        file.write(b'{"kind":"plan","run":"mod')
    with Ledger.open(path, **TERMS) as ledger:
        assert ledger.releases == 0
        ledger.plan("model", DEAR, 10)


def test_a_torn_line_counts_by_the_plans_before_it(tmp_path):
    path = tmp_path / "ledger"
    with Ledger.open(path, **TERMS) as ledger:
        ledger.plan("cheap", CHEAP, 10)
    with path.open("ab") as file:
        file.write(b"{")
    with Ledger.open(path, **TERMS) as ledger:
        ledger.plan("dear", DEAR, 10)
        assert ledger.events() == [CHEAP]
    with Ledger.open(path, **TERMS) as ledger:
        assert ledger.events() == [CHEAP]


def test_events_that_cannot_be_ranked_are_all_charged(tmp_path):
    path = tmp_path / "ledger"
    # One leaks rarely but a lot, the other a little each time.
    rare, steady = PoissonSampled(0.001, Gaussian(0.3)), Gaussian(20.0)
    with Ledger.open(path, **TERMS) as ledger:
        ledger.plan("rare", rare, 10)
        ledger.plan("steady", steady, 10)
        ledger.plan("cheap", Gaussian(40.0), 10)
    with path.open("ab") as file:
        file.write(b"{")
    with Ledger.open(path, **TERMS) as ledger:
        assert set(ledger.events()) == {rare, steady}


def test_the_total_variation_of_a_torn_charge_counts(tmp_path):
    path = tmp_path / "ledger"
    with Ledger.open(path, **TERMS) as ledger:
        ledger.plan("model", DEAR, 10, max_charge=2, total_variation=1e-7)
    with path.open("ab") as file:
        file.write(b"{")
    with Ledger.open(path, **TERMS) as ledger:
        assert ledger.epsilon() == epsilon(
            [Composed(DEAR, 2)],
            delta=1e-5,
            relation=Relation.ADD_OR_REMOVE_ONE,
            total_variation=2e-7,
        )


def test_once_a_write_failed_nothing_more_is_charged_until_the_ledger_is_reopened(
    tmp_path, monkeypatch
):
    path = tmp_path / "ledger"
    with Ledger.open(path, **TERMS) as ledger:
        ledger.plan("model", DEAR, 10)
        write = os.write

        def full_disk(descriptor, data):
            write(descriptor, bytes(data)[:7])
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "write", full_disk)
        with pytest.raises(OSError, match="No space"):
            ledger.charge("model")
        monkeypatch.undo()
        with pytest.raises(LedgerError, match="open it again"):
            ledger.charge("model")
    with Ledger.open(path, **TERMS) as ledger:
        assert ledger.events() == [DEAR]


def test_a_charge_is_on_disk_before_it_is_confirmed_and_confirmed_before_it_returns(
    tmp_path, monkeypatch
):
    path = tmp_path / "ledger"
    steps = []

    def traced(name, function):
        def call(*arguments, **keywords):
            result = function(*arguments, **keywords)
            steps.append(name)
            return result

        return call

    with Ledger.open(path, **TERMS) as ledger:
        ledger.plan("model", DEAR, 10)
        monkeypatch.setattr(os, "write", traced("write", os.write))
        monkeypatch.setattr(os, "fsync", traced("fsync", os.fsync))
        monkeypatch.setattr(LedgerFile, "confirm", traced("confirmed", LedgerFile.confirm))
        ledger.charge("model")
    #                the line           the sidecar       its directory
    assert steps == ["write", "fsync", "write", "fsync", "fsync", "confirmed"]


class Crash(Exception):
    pass


RUNS = {"cheap": (CHEAP, 2), "dear": (DEAR, 3)}
steps = st.lists(
    st.tuples(
        st.sampled_from(["cheap", "dear"]),
        st.integers(1, 2),
        # None: no crash. Otherwise where: a share of the line's bytes, or between line and sidecar.
        st.none() | st.floats(0, 1) | st.just("unconfirmed"),
    ),
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(steps)
def test_no_sequence_of_charges_and_crashes_loses_a_charge(tmp_path_factory, sequence):
    path = tmp_path_factory.mktemp("ledger") / "ledger"
    returned = []  # what may have been released
    unsure = 0  # charges that a crash cut off after a byte was written
    with Ledger.open(path, **TERMS) as ledger:
        for run, (event, most) in RUNS.items():
            ledger.plan(run, event, 1000, max_charge=most)
    for run, count, crash in sequence:
        before = both(path)
        with Ledger.open(path, **TERMS) as ledger:
            ledger.charge(run, count)
        event = RUNS[run][0]
        if crash is None:
            returned.append(Composed(event, count))
        else:
            content, _ = both(path)
            line = content[len(before[0]) :]
            share = 1.0 if crash == "unconfirmed" else crash
            kept = line[: round(share * len(line))]
            put_back(path, (before[0] + kept, before[1]))
            unsure += bool(kept)
    with Ledger.open(path, **TERMS) as ledger:
        assert ledger.epsilon() >= cost(returned) * (1 - 1e-12)
        # At most one dearest charge for each crash on top.
        most = [*returned, *[Composed(DEAR, 3)] * unsure]
        assert ledger.epsilon() <= cost(most) * (1 + 1e-12)
        certain = sum(event.count for event in returned)
        assert ledger.releases >= certain + unsure
