"""A node adds all of its noise itself, for whoever compares any two data sets it could have."""

import json
import math

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from dpfl_flower import records
from dpfl_flower.accounting import Composed, Gaussian, Laplace, Ledger, epsilon, event_from_json
from dpfl_flower.client import LocalNoise, NodeErrorCode, local_noise_mod
from tests.support.node import all_bytes, context, message

DELTA = 1e-5
STEP = 7.0


def noise(**changes):
    fields = {"clip_norm": 1.0, "rounds": 3, "delta": DELTA, "noise_multiplier": 2.0}
    return LocalNoise(**(fields | changes))


def weights(size):
    arrays = {"w": Array(np.full(size, 5.0, np.float32)), "n": Array(np.array(3))}
    return RecordDict({records.ARRAYS: ArrayRecord(arrays)})


def phone(local, step=STEP):
    app = ClientApp()

    @app.train(mods=[local_noise_mod(local, dataset="phone")])
    def train(received, ctx):
        del ctx
        arrays = {}
        for name, array in received.content[records.ARRAYS].items():
            moved = array.numpy() + (step if name == "w" else 1)
            arrays[name] = Array(np.asarray(moved, array.numpy().dtype))
        metrics = MetricRecord({"num-examples": 4711, "loss": 0.123})
        content = RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics})
        return type(received)(content, reply_to=received)

    @app.evaluate()
    def evaluate(received, ctx):
        del ctx
        return type(received)(RecordDict(), reply_to=received)

    return app


def ask(local, *, size=4, ctx=None, step=STEP):
    return phone(local, step)(message("train", weights(size)), ctx or context())


def update(reply):
    assert not reply.has_error(), reply.error
    return reply.content[records.ARRAYS]["w"].numpy().astype(float) - 5.0


# --- what leaves -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("law", "deviation", "norm"), [("gaussian", 2.0, 2), ("laplace", 2.0 * math.sqrt(2), 1)]
)
def test_the_update_is_clipped_in_the_laws_norm_and_noised_in_full(law, deviation, norm):
    size = 20_000
    found = update(ask(noise(law=law, max_inflation=2.0), size=size))
    # Laplace: the grid's enforced bound may be up to twice the clip norm, and noise with it.
    inflation = found.std() / deviation
    assert 0.97 < inflation < (1.03 if law == "gaussian" else 2.1)
    mean = 1 / size ** (1 / norm)  # every coordinate of a vector of norm 1
    assert found.mean() == pytest.approx(mean, abs=6 * found.std() / math.sqrt(size))


def test_nothing_else_of_the_answer_leaves():
    reply = ask(noise())
    assert set(reply.content) == {records.ARRAYS, records.METRICS, records.PRIVACY}
    assert dict(reply.content[records.METRICS]) == {"num-examples": 1}
    assert reply.content[records.ARRAYS]["n"].numpy() == 3  # as it was sent, not as it was trained
    assert b"0.123" not in all_bytes(reply) and b"4711" not in all_bytes(reply)


@pytest.mark.parametrize("step", [math.nan, math.inf])
def test_a_broken_update_leaves_as_noise(step):
    assert np.isfinite(update(ask(noise(), step=step))).all()


# --- what it costs ---------------------------------------------------------------------------


@pytest.mark.parametrize("law", ["gaussian", "laplace"])
def test_the_ledger_is_charged_for_replacing_the_whole_node_over_all_rounds(law, tmp_path):
    path = str(tmp_path / "ledger.jsonl")
    ctx = context(ledger_path=path)
    replies = [ask(noise(law=law), ctx=ctx) for _ in range(3)]
    kind = Gaussian if law == "gaussian" else Laplace
    expected = epsilon([Composed(kind(2.0), 3)], delta=DELTA, relation="replace-one")
    # Twice the clip norm each time: as noise multiplier 1 under add-or-remove-one.
    half = epsilon([Composed(kind(1.0), 3)], delta=DELTA, relation="add-or-remove-one")
    assert expected == pytest.approx(half, rel=1e-3)
    claim = replies[-1].content[records.PRIVACY]
    assert claim["epsilon"] == pytest.approx(expected, rel=1e-6)
    assert (claim["unit"], claim["relation"]) == ("node", "replace-one")
    assert [event_from_json(e) for e in json.loads(claim["events"])] == [Composed(kind(2.0), 3)]
    with Ledger.open(
        path, dataset="phone", delta=DELTA, unit="node", relation="replace-one"
    ) as ledger:
        assert ledger.releases == 3
    assert ask(noise(law=law), ctx=ctx).error.code == NodeErrorCode.LEDGER_REFUSED  # no 4th round


@pytest.mark.parametrize("law", ["gaussian", "laplace"])
def test_a_target_is_met_by_all_rounds_together(law):
    local = noise(noise_multiplier=None, target_epsilon=4.0, law=law)
    spent = epsilon(
        [Composed(local.event(local.resolve_noise_multiplier()), 3)],
        delta=DELTA,
        relation="replace-one",
    )
    assert 3.99 < spent <= 4.0


def test_a_laplace_round_is_pure_and_twice_the_clip_norm():
    one = epsilon([Laplace(2.0)], delta=1e-9, relation="replace-one")
    assert one == pytest.approx(1.0, abs=1e-3)


def test_the_nodes_policy_holds():
    refused = context(min_noise_multiplier=2.5)
    assert ask(noise(), ctx=refused).error.code == NodeErrorCode.POLICY_REFUSED
    fleeting = context(max_epsilon=100.0, max_delta=1e-3)
    assert ask(noise(), ctx=fleeting).error.code == NodeErrorCode.POLICY_REFUSED


# --- what does not fit -----------------------------------------------------------------------


def test_requests_and_replies_that_do_not_fit_are_answered_with_codes():
    empty = phone(noise())(message("train", RecordDict()), context())
    assert empty.error.code == NodeErrorCode.MALFORMED_REQUEST
    app = ClientApp()

    @app.train(mods=[local_noise_mod(noise(), dataset="phone")])
    def train(received, ctx):
        del ctx
        return type(received)(weights(5), reply_to=received)

    reply = app(message("train", weights(4)), context())
    assert reply.error.code == NodeErrorCode.MALFORMED_REPLY
    assert not phone(noise())(message("evaluate", RecordDict()), context()).has_error()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"clip_norm": 0}, "clip_norm=0"),
        ({"rounds": 0}, "rounds=0"),
        ({"delta": 1.0}, "delta=1.0"),
        ({"noise_multiplier": 0.0}, "noise_multiplier=0.0"),
        ({"target_epsilon": 1.0}, "exactly one"),
        ({"noise_multiplier": None}, "exactly one"),
        ({"law": "uniform"}, "uniform"),
    ],
)
def test_impossible_noise_is_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        noise(**changes)
