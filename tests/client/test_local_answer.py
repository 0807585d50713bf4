"""What a server can get out of a node that adds all of its noise, by what it asks and how often."""

import copy

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from dpfl_flower import records
from dpfl_flower.accounting import Ledger
from dpfl_flower.client import LocalNoise, NodeErrorCode, local_noise_mod, secure_aggregation_mod
from dpfl_flower.client.local_request import LocalRequest
from dpfl_flower.client.users import UserCohort, app, user_cohort_app
from tests.support.node import all_bytes, context, message

SECRET = "patient 4711 has no age"
SIZE = 12


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch):
    monkeypatch.setattr(app, "_cohorts", {})


def noise(**changes):
    fields = {"clip_norm": 1.0, "rounds": 9, "delta": 1e-5, "noise_multiplier": 2.0} | changes
    return LocalNoise(**fields)


def of_users(**changes):
    return noise(unit="user", relation="add-or-remove-one", sampling_rate=0.5, **changes)


def question(local, *, server_round=1, arrays=None, dimension=SIZE):
    request = LocalRequest(noise=local, dimension=dimension, server_round=server_round)
    arrays = {"w": np.zeros(SIZE, np.float32)} if arrays is None else arrays
    sent = ArrayRecord({name: Array(array) for name, array in arrays.items()})
    content = RecordDict({records.ARRAYS: sent, records.LOCAL: request.to_config()})
    return message("train", content)


def cohort_fn(ctx):
    del ctx
    return UserCohort(
        {str(i): 1.0 for i in range(20)},
        local_update=lambda arrays, step: {"w": arrays["w"].reshape(SIZE) + step},
    )


def hospital():
    return user_cohort_app(cohort_fn, mods=[local_noise_mod(dataset="patients")])


# --- errors ------------------------------------------------------------------------------------


def answers_an_error(received, ctx):
    del ctx
    return Message(Error(1, SECRET), reply_to=received)


def leaves(received, ctx):
    del received, ctx
    raise SystemExit(SECRET)


@pytest.mark.parametrize("failing", [answers_an_error, leaves])
def test_no_text_of_an_app_that_failed_leaves(failing):
    phone = ClientApp()
    phone.train(mods=[local_noise_mod(dataset="phone")])(failing)
    reply = phone(question(noise()), context())
    assert reply.error.code == NodeErrorCode.CLIENT_FAILED
    assert SECRET.encode() not in all_bytes(reply)


def test_an_apps_own_code_is_passed_on():
    def busy(received, ctx):
        del ctx
        return Message(Error(int(NodeErrorCode.MODEL_REFUSED), SECRET), reply_to=received)

    reply = local_noise_mod(dataset="phone")(question(noise()), context(), busy)
    assert reply.error.code == NodeErrorCode.MODEL_REFUSED
    assert reply.error.reason == NodeErrorCode.MODEL_REFUSED.reason


@pytest.mark.parametrize(
    "arrays",
    [
        {"w": np.zeros((3, 4), np.float32)},  # another shape of the same length
        {"v": np.zeros(SIZE, np.float32)},  # another name
        {"w": np.full(SIZE, np.nan, np.float32)},
        {"w": np.zeros(SIZE, np.float64), "n": np.zeros(3, np.int64)},
    ],
)
def test_a_model_that_fits_nobody_does_not_show_whether_anybody_was_drawn(arrays):
    kinds = []
    for rate in (2.0**-64, 1.0):  # nobody, everybody
        local = noise(unit="user", relation="add-or-remove-one", sampling_rate=rate)
        reply = hospital()(question(local, arrays=arrays), context())
        kinds.append(reply.error.code if reply.has_error() else sorted(reply.content))
    assert kinds[0] == kinds[1]


# --- asked again -------------------------------------------------------------------------------


def releases(path, local, dataset):
    with Ledger.open(
        path, dataset=dataset, delta=1e-5, unit=local.unit, relation=local.relation
    ) as ledger:
        return ledger.releases


@pytest.mark.parametrize("local", [noise(), of_users()])
def test_each_answer_to_the_same_round_is_charged_and_drawn_afresh(local, tmp_path):
    path = str(tmp_path / "ledger.jsonl")
    one = context(ledger_path=path)
    # As a server that asks again before the node's state of the run is kept finds it.
    stale = copy.deepcopy(one)
    client = hospital() if local.sampling_rate else phone()
    replies = [client(question(local), ctx) for ctx in (one, stale, one)]
    sums = [reply.content[records.INTEGER_SUM][records.SUM].numpy() for reply in replies]
    assert all((sums[i] != sums[j]).any() for i, j in ((0, 1), (0, 2), (1, 2)))
    dataset = "patients" if local.sampling_rate else "phone"
    assert releases(path, local, dataset) == 3


def phone():
    found = ClientApp()

    @found.train(mods=[local_noise_mod(dataset="phone")])
    def train(received, ctx):
        del ctx
        arrays = {k: Array(a.numpy() + 1) for k, a in received.content[records.ARRAYS].items()}
        return type(received)(RecordDict({"arrays": ArrayRecord(arrays)}), reply_to=received)

    return found


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize(
    "changed",
    [
        {"noise_multiplier": 1.0},
        {"rounds": 10},
        {"delta": 1e-6},
        {"law": "laplace", "max_inflation": 1.2},
    ],
)
def test_a_run_that_has_begun_gets_no_other_noise(changed, durable, tmp_path):
    path = str(tmp_path / "ledger.jsonl")
    ctx = context(ledger_path=path) if durable else context()
    assert not phone()(question(noise()), ctx).has_error()
    reply = phone()(question(noise(**changed)), ctx)
    assert reply.error.code == NodeErrorCode.LEDGER_REFUSED
    if durable:
        assert releases(path, noise(), "phone") == 1


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("spent", ["rounds", "budget", "policy"])
def test_what_a_node_cannot_charge_it_does_not_train_for(spent, durable, tmp_path):
    # Else a server could time one fresh sample after the other, and no ledger would show it.
    asked = []

    def train(received, ctx):
        del ctx
        asked.append(received)
        return type(received)(
            RecordDict({"arrays": received.content[records.ARRAYS]}), reply_to=received
        )

    config = {"ledger_path": str(tmp_path / "ledger.jsonl")} if durable else {}
    if spent == "policy":
        config |= {"max_epsilon": 3.0, "max_delta": 1e-4}  # one release is 4.4; no file, none
    ctx = context(**config)
    local = noise(rounds=2 if spent == "rounds" else 9)
    ask = question(local)
    if spent == "budget":
        request = LocalRequest(noise=local, dimension=SIZE, server_round=1, budget_epsilon=8.0)
        ask.content[records.LOCAL] = request.to_config()
    content = ask.content
    replies = []
    for _ in range(4):
        ask.content = RecordDict(dict(content))
        replies.append(local_noise_mod(dataset="phone")(ask, ctx, train))
    answered = sum(not reply.has_error() for reply in replies)
    assert answered == len(asked) == {"rounds": 2, "budget": 2, "policy": 0}[spent]
    code = {
        "rounds": NodeErrorCode.LEDGER_REFUSED,
        "budget": NodeErrorCode.BUDGET_EXHAUSTED,
        "policy": NodeErrorCode.POLICY_REFUSED,
    }[spent]
    assert replies[-1].error.code == code


def test_an_app_that_says_what_its_units_are_takes_no_other_word_for_it(tmp_path):
    path = str(tmp_path / "ledger.jsonl")
    client = user_cohort_app(cohort_fn, mods=[local_noise_mod(dataset="patients", unit="user")])
    examples = noise(unit="example", relation="add-or-remove-one", sampling_rate=0.5)
    reply = client(question(examples), context(ledger_path=path))
    assert reply.error.code == NodeErrorCode.POLICY_REFUSED
    assert not client(question(of_users()), context(ledger_path=path)).has_error()
    assert releases(path, of_users(), "patients") == 1
    with pytest.raises(ValueError, match=r"unit='user' must be noise\.unit='node'"):
        local_noise_mod(noise(), dataset="patients", unit="user")


@pytest.mark.parametrize("own", [None, noise()])
def test_a_mod_that_stands_before_the_masks_says_where_to_put_it(own, caplog):
    phone = ClientApp()
    phone.train(mods=[local_noise_mod(own, dataset="phone"), secure_aggregation_mod])(leaves)
    stage = RecordDict({records.SECAGG: ConfigRecord({"stage": "advertise"})})
    reply = phone(message("train", stage), context())
    assert reply.error.code == NodeErrorCode.POLICY_REFUSED
    assert "the strategy is no LocalDPFedAvg, or " in caplog.text
    assert "mods=[secure_aggregation_mod, local_noise_mod(...)]" in caplog.text


def test_a_larger_clip_norm_or_another_model_costs_what_the_first_cost(tmp_path):
    ctx = context(ledger_path=str(tmp_path / "ledger.jsonl"))
    phone()(question(noise()), ctx)
    wide = phone()(question(noise(clip_norm=1e6)), ctx)
    request = LocalRequest(noise=noise(clip_norm=1e6), dimension=SIZE, server_round=1)
    # The bound in grid units is the same, and with it the noise over what one unit moves.
    assert request.grid == LocalRequest(noise=noise(), dimension=SIZE, server_round=1).grid
    assert not wide.has_error()
    longer = {"w": np.zeros(2 * SIZE, np.float64)}
    other = phone()(question(noise(), arrays=longer, dimension=2 * SIZE), ctx)
    assert other.error.code == NodeErrorCode.LEDGER_REFUSED  # its samplers' remainder is another
