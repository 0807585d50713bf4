"""A NumPyClient answers a Message-API strategy, and nothing of an exception leaves the node."""

import logging

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.client import Client, NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import (
    Code,
    EvaluateRes,
    FitRes,
    GetParametersRes,
    GetPropertiesRes,
    Status,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)

from dpfl_flower import records
from dpfl_flower.client import NODE_LOGGER, NodeErrorCode, guarded, numpy_client_app
from tests.support.node import all_bytes, context, message

SECRET = "patient-4711-8.31415926"
ARRAYS = {
    "layer.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "layer.scale": np.array(2.0, dtype=np.float64),
    "half": np.ones(4, dtype=np.float16),
    "num_batches_tracked": np.array(3, dtype=np.int64),
}


class AddOne(NumPyClient):
    """Adds one, returns float64 throughout, and remembers what it was given."""

    seen = None

    def get_properties(self, config):
        return {"hospital": "north", "beds": 120, "asked": config.get("which", "")}

    def get_parameters(self, config):
        return [np.zeros(2), np.ones((1, 2), dtype=np.float32)]

    def fit(self, parameters, config):
        AddOne.seen = (parameters, config)
        return (
            [
                p + 1 if p.dtype.kind == "i" else np.asarray(p, dtype=np.float64) + 1
                for p in parameters
            ],
            7,
            {"accuracy": np.float32(0.5), "converged": True, "steps": [1, 2]},
        )

    def evaluate(self, parameters, config):
        return 0.25, 9, {"auc": 0.75}


def request():
    arrays = ArrayRecord({name: Array(array) for name, array in ARRAYS.items()})
    return RecordDict({"arrays": arrays, "config": ConfigRecord({"lr": 0.1, "which": "all"})})


def ask(client, kind="train", content=None, *, mods=None):
    app = numpy_client_app(lambda context: client, mods=mods)
    return app(message(kind, request() if content is None else content), context())


@pytest.mark.parametrize("wrap", [lambda c: c, lambda c: c.to_client()], ids=["numpy", "client"])
def test_names_order_shapes_and_dtypes_of_the_request_come_back(wrap):
    reply = ask(wrap(AddOne()))
    arrays = reply.content.array_records[records.ARRAYS]
    assert list(arrays) == list(ARRAYS)
    for name, before in ARRAYS.items():
        after = arrays[name].numpy()
        assert (after.dtype, after.shape) == (before.dtype, before.shape)
        np.testing.assert_array_equal(after, before + 1)
    parameters, config = AddOne.seen
    assert config == {"lr": 0.1, "which": "all"}
    assert [p.dtype for p in parameters] == [a.dtype for a in ARRAYS.values()]


def test_metrics_travel_with_num_examples():
    metrics = ask(AddOne()).content.metric_records[records.METRICS]
    assert dict(metrics) == {
        "accuracy": 0.5,
        "converged": 1,
        "steps": [1, 2],
        records.NUM_EXAMPLES: 7,
    }


def test_evaluate_answers_loss_num_examples_and_metrics():
    reply = ask(AddOne(), "evaluate")
    assert list(reply.content) == [records.METRICS]
    assert dict(reply.content.metric_records[records.METRICS]) == {
        "auc": 0.75,
        records.LOSS: 0.25,
        records.NUM_EXAMPLES: 9,
    }


def test_properties_and_parameters_answer_queries():
    reply = ask(AddOne(), "query")
    assert dict(reply.content.config_records[records.PROPERTIES]) == {
        "hospital": "north",
        "beds": 120,
        "asked": "all",
    }
    reply = ask(AddOne(), "query.get_parameters", RecordDict())
    first, second = reply.content.array_records[records.ARRAYS].to_numpy_ndarrays()
    assert first.shape == (2,) and second.dtype == np.float32


def test_records_under_other_names_are_found_when_there_is_one_of_a_kind():
    content = RecordDict({"weights": ArrayRecord([np.ones(3)]), "cfg": ConfigRecord({"a": 1})})
    reply = ask(AddOne(), content=content)
    assert list(reply.content.array_records) == ["weights"]
    assert AddOne.seen[1] == {"a": 1}
    no_config = RecordDict({"arrays": ArrayRecord([np.ones(3)])})
    ask(AddOne(), content=no_config)
    assert AddOne.seen[1] == {}


def test_a_claim_goes_into_the_privacy_record():
    class Claims(AddOne):
        def privacy_claim(self):
            return ConfigRecord({"epsilon": 1.5})

    class NoClaim(AddOne):
        def privacy_claim(self):
            return None

    assert dict(ask(Claims()).content.config_records[records.PRIVACY]) == {"epsilon": 1.5}
    assert records.PRIVACY not in ask(NoClaim()).content
    assert records.PRIVACY not in ask(AddOne()).content


def test_what_is_not_a_number_is_dropped_and_named_in_the_nodes_log(caplog):
    class Talks(AddOne):
        def fit(self, parameters, config):
            return parameters, 1, {"note": SECRET, "rows": [SECRET], "blob": b"x", "ok": 1.0}

    with caplog.at_level(logging.ERROR, NODE_LOGGER):
        reply = ask(Talks())
    assert dict(reply.content.metric_records["metrics"]) == {"ok": 1.0, "num-examples": 1}
    assert SECRET.encode() not in all_bytes(reply)
    assert all(name in caplog.text for name in ("note", "rows", "blob"))


class Raises(AddOne):
    def fit(self, parameters, config):
        raise ValueError(f"bad row: {SECRET}")

    evaluate = fit

    def get_properties(self, config):
        raise KeyError(SECRET)

    get_parameters = get_properties


@pytest.mark.parametrize("kind", ["train", "evaluate", "query", "query.get_parameters"])
def test_an_exception_is_logged_here_and_answered_with_a_fixed_code(kind, caplog):
    with caplog.at_level(logging.ERROR, NODE_LOGGER):
        reply = ask(Raises(), kind)
    assert reply.error.code == NodeErrorCode.CLIENT_FAILED
    assert reply.error.reason == NodeErrorCode.CLIENT_FAILED.reason
    leaving = all_bytes(reply)
    for part in (SECRET, "ValueError", "KeyError", "bad row", "Traceback"):
        assert part.encode() not in leaving
    assert SECRET in caplog.text


def test_a_failing_client_function_and_a_failing_mod_are_guarded_too():
    def client_fn(context):
        raise RuntimeError(SECRET)

    def mod(message, context, call_next):
        raise RuntimeError(SECRET)

    for reply in (
        numpy_client_app(client_fn)(message("train", request()), context()),
        ask(AddOne(), mods=[mod]),
    ):
        assert reply.error.code == NodeErrorCode.CLIENT_FAILED
        assert SECRET.encode() not in all_bytes(reply)


def test_mods_wrap_the_call():
    def doubles(message, context, call_next):
        reply = call_next(message, context)
        reply.content.metric_records["metrics"]["accuracy"] *= 2
        return reply

    assert ask(AddOne(), mods=[doubles]).content["metrics"]["accuracy"] == 1.0


def test_guarded_lets_nothing_of_an_exit_leave_either():
    @guarded
    def train(message, context):
        raise SystemExit(SECRET)

    reply = train(message("train", request()), context())
    assert reply.error.code == NodeErrorCode.CLIENT_FAILED
    assert SECRET.encode() not in all_bytes(reply)


def test_guarded_protects_an_authors_own_function():
    app = ClientApp()

    @app.train()
    @guarded
    def train(message, context):
        raise ZeroDivisionError(SECRET)

    @app.evaluate()
    @guarded
    def evaluate(message, context):
        return Message(RecordDict({"metrics": MetricRecord({"a": 1})}), reply_to=message)

    reply = app(message("train", request()), context())
    assert reply.error.code == NodeErrorCode.CLIENT_FAILED
    assert SECRET.encode() not in all_bytes(reply)
    assert app(message("evaluate", request()), context()).content["metrics"]["a"] == 1
    assert train.__name__ == "train"


@pytest.mark.parametrize(
    "result",
    [
        ([np.zeros((2, 3))], 1, {}),  # too few
        ([np.zeros((3, 2)), *list(ARRAYS.values())[1:]], 1, {}),  # a wrong shape
        ([*list(ARRAYS.values())[:3], np.array(0.5)], 1, {}),  # a float for an integer
        (["a", "b", "c", "d"], 1, {}),
        ("abcd", 1, {}),
        (list(ARRAYS.values()), "many", {}),
        (list(ARRAYS.values()), [1], {}),
        (list(ARRAYS.values()), -1, {}),
        (list(ARRAYS.values()), float("nan"), {}),
        (list(ARRAYS.values()), 1),
        None,
    ],
)
def test_what_the_request_cannot_hold_is_answered_with_a_fixed_code(result):
    class Returns(AddOne):
        def fit(self, parameters, config):
            return result

    assert ask(Returns()).error.code == NodeErrorCode.MALFORMED_REPLY


def test_a_loss_that_is_no_number_is_answered_with_a_fixed_code():
    class Returns(AddOne):
        def evaluate(self, parameters, config):
            return "low", 1, {}

    assert ask(Returns(), "evaluate").error.code == NodeErrorCode.MALFORMED_REPLY


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"a": ArrayRecord([np.ones(1)]), "b": ArrayRecord([np.ones(1)])}),
        RecordDict({"arrays": ConfigRecord({"a": 1})}),
        RecordDict(
            {"arrays": ArrayRecord({"w": Array("float32", (1,), "pickle", b"\x80\x04K\x01.")})}
        ),
        RecordDict({"arrays": ArrayRecord({"w": Array("float32", (1,), "numpy.ndarray", b"no")})}),
    ],
)
def test_a_request_that_makes_no_sense_is_answered_with_a_fixed_code(content):
    assert ask(AddOne(), content=content).error.code == NodeErrorCode.MALFORMED_REQUEST


@pytest.mark.parametrize("kind", ["train", "evaluate", "query", "query.get_parameters"])
def test_what_a_client_does_not_override_is_answered_not_implemented(kind):
    class Nothing(NumPyClient):
        pass

    class NothingEither(Client):
        pass

    for client in (Nothing(), Nothing().to_client(), NothingEither()):
        assert ask(client, kind).error.code == NodeErrorCode.NOT_IMPLEMENTED


def test_an_overflow_becomes_inf_and_says_nothing():
    class Explodes(AddOne):
        def fit(self, parameters, config):
            return [np.full(np.shape(p), 1e300) for p in parameters[:3]] + parameters[3:], 1, {}

    arrays = ask(Explodes()).content["arrays"]
    assert np.isinf(arrays["half"].numpy()).all()


OK = Status(Code.OK, "Success")


class Legacy(Client):
    """A Flower Client that never was a NumPyClient."""

    def get_properties(self, ins):
        return GetPropertiesRes(OK, {"beds": 3})

    def get_parameters(self, ins):
        return GetParametersRes(OK, ndarrays_to_parameters([np.zeros(2)]))

    def fit(self, ins):
        arrays = [a + 1 for a in parameters_to_ndarrays(ins.parameters)]
        return FitRes(OK, ndarrays_to_parameters(arrays), 3, {"lr": ins.config["lr"]})

    def evaluate(self, ins):
        return EvaluateRes(OK, 0.5, 4, {})


def test_a_legacy_client_answers_everything():
    reply = ask(Legacy())
    np.testing.assert_array_equal(
        reply.content["arrays"]["layer.weight"].numpy(), ARRAYS["layer.weight"] + 1
    )
    assert dict(reply.content["metrics"]) == {"lr": 0.1, "num-examples": 3}
    assert ask(Legacy(), "evaluate").content["metrics"]["loss"] == 0.5
    assert ask(Legacy(), "query").content["properties"]["beds"] == 3
    assert "0" in ask(Legacy(), "query.get_parameters").content["arrays"]


def test_a_legacy_clients_own_error_text_stays():
    class Fails(Legacy):
        def fit(self, ins):
            return FitRes(Status(Code.FIT_NOT_IMPLEMENTED, SECRET), ins.parameters, 0, {})

    reply = ask(Fails())
    assert reply.error.code == NodeErrorCode.NOT_IMPLEMENTED
    assert SECRET.encode() not in all_bytes(reply)


def test_a_client_function_must_return_a_client():
    assert ask(object()).error.code == NodeErrorCode.CLIENT_FAILED


def test_every_code_has_a_reason_of_its_own_above_flowers():
    reasons = [code.reason for code in NodeErrorCode]
    assert len(set(reasons)) == len(reasons)
    assert all(code >= 100 for code in NodeErrorCode)
