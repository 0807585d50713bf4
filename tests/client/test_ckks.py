"""The nodes' side of CKKS: what leaves a node, what it refuses, and what it decrypts."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

from dpfl_flower import records
from dpfl_flower.client import NodeErrorCode, ckks_mod, secure_aggregation_mod
from dpfl_flower.client.contribution import SumBound
from dpfl_flower.secagg import CKKS, SecAggPlus, Session, SumRequest
from dpfl_flower.secagg.ckks_key import PublicKey, make_key
from dpfl_flower.secagg.ckks_messages import DecryptRequest, decode_request, encode
from tests.support.node import all_bytes, context, message

NODES = (1, 2, 3, 4)
SECRET = 4711
VECTOR = np.array([SECRET, -SECRET, 0, 2, 3], np.int64)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_key(tmp_path_factory.mktemp("key"))


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    return make_key(tmp_path_factory.mktemp("other"))


def answers(message, context):
    assert set(message.content) == {records.ARRAYS, records.CONFIG, records.COHORT}
    content = {records.INTEGER_SUM: ArrayRecord({records.SUM: Array(VECTOR * context.node_id)})}
    return Message(RecordDict(content), reply_to=message)


class Nodes:
    """Four nodes with contexts of their own, asked by a server that may do anything."""

    def __init__(self, files, **node_config):
        self.app = ClientApp()
        self.app.train(mods=[ckks_mod])(answers)

        @self.app.query()
        def query(message, context):
            return Message(RecordDict(), reply_to=message)

        config = {"ckks_key": str(files.nodes)} | node_config
        config = {name: value for name, value in config.items() if value is not None}
        self.contexts = {node: context(node_id=node, **config) for node in NODES}

    def ask(self, node, content):
        return self.app(message("train", content, node_id=node), self.contexts[node])

    def code(self, node, content):
        return self.ask(node, content).error.code

    def answer(self, stage, nodes=NODES):
        replies = {n: self.ask(n, asked(stage, n)) for n in stage.requests if n in nodes}
        return {node: reply.content for node, reply in replies.items() if not reply.has_error()}


def asked(stage, node):
    content = RecordDict(dict(stage.requests[node]))
    if stage.carries_task:
        content[records.ARRAYS] = ArrayRecord({"w": Array(np.zeros(4, np.float32))})
        content[records.CONFIG] = ConfigRecord({"server-round": 1})
        content[records.COHORT] = ConfigRecord({"dimension": 5})
        content[records.UPDATE] = SumBound(largest=1 << 15, parties=4).to_config()
    return content


def begin(files, *, server_round=1, protocol=None, nodes=NODES, seconds=60.0, bits=24):
    request = SumRequest(
        session=Session(5, server_round), nodes=nodes, width=5, bits=bits, seconds=seconds
    )
    return (protocol or CKKS(key=PublicKey.load(files.server), decryptors=4)).begin(request)


def changed(content, **fields):
    """Return a request with some fields changed."""
    record = dict(content.config_records[records.SECAGG]) | fields
    made = RecordDict(dict(content))
    made[records.SECAGG] = ConfigRecord(record)
    return made


def test_the_sum_leaves_and_no_vector(files):
    nodes = Nodes(files)
    first = begin(files)
    sent = [nodes.ask(node, asked(first, node)) for node in NODES]
    assert all(VECTOR[:2].tobytes() not in all_bytes(reply) for reply in sent)
    second = first.receive({n: reply.content for n, reply in zip(NODES, sent, strict=True)})
    replies = nodes.answer(second)
    assert set(replies) == set(NODES)
    np.testing.assert_array_equal(second.receive(replies).total, VECTOR * 10)


@pytest.mark.parametrize("journal", [False, True])
def test_a_second_decryption_and_every_replay_are_refused(files, tmp_path, journal):
    extra = {"secagg_journal": str(tmp_path / "journal")} if journal else {}
    nodes = Nodes(files, **extra)
    first = begin(files)
    early = RecordDict(dict(first.receive(Nodes(files).answer(first)).requests[1]))
    assert nodes.code(1, early) == NodeErrorCode.SECAGG_OUT_OF_ORDER
    second = first.receive(nodes.answer(first))
    assert nodes.code(2, asked(first, 2)) == NodeErrorCode.SECAGG_REPLAYED
    assert set(nodes.answer(second)) == set(NODES)
    for node in NODES:
        again = RecordDict(dict(second.requests[node]))
        assert nodes.code(node, again) == NodeErrorCode.SECAGG_ALREADY_UNMASKED
        assert nodes.code(node, asked(first, node)) == NodeErrorCode.SECAGG_REPLAYED
    following = begin(files, server_round=2)
    assert set(following.receive(nodes.answer(following)).requests) == set(NODES)


def test_a_journal_withstands_the_loss_of_the_state(files, tmp_path):
    nodes = Nodes(files, secagg_journal=str(tmp_path / "journal"))
    first = begin(files)
    second = first.receive(nodes.answer(first))
    before = RecordDict(dict(nodes.contexts[1].state))
    nodes.answer(second)
    nodes.contexts[1].state = before  # as after a crash between the answer and the state
    again = RecordDict(dict(second.requests[1]))
    assert nodes.code(1, again) == NodeErrorCode.SECAGG_ALREADY_UNMASKED


@pytest.mark.parametrize("late", ["the sum", "the model again", "no stage at all"])
def test_a_round_whose_time_is_up_is_forgotten_whatever_comes_then(files, monkeypatch, late):
    nodes = Nodes(files)
    first = begin(files)
    second = first.receive(nodes.answer(first))
    state = nodes.contexts[1].state
    expires = state[records.CKKS_STATE]["expires"]
    monkeypatch.setattr("time.time", lambda: expires + 1)
    content, code = {
        "the sum": (RecordDict(dict(second.requests[1])), NodeErrorCode.SECAGG_OUT_OF_ORDER),
        "the model again": (asked(first, 1), NodeErrorCode.SECAGG_REPLAYED),
        "no stage at all": (RecordDict(), NodeErrorCode.SECAGG_REQUIRED),
    }[late]
    assert nodes.code(1, content) == code
    assert records.CKKS_STATE not in state


def test_a_request_that_was_refused_cannot_be_mended(files):
    """One try a round: a server cannot probe with damaged sums until one is answered."""
    nodes = Nodes(files)
    first = begin(files)
    second = first.receive(nodes.answer(first))
    good = second.requests[1]
    wrong = changed(good, survivors=[1, 2, 3])
    assert nodes.code(1, wrong) == NodeErrorCode.MALFORMED_REQUEST
    assert nodes.code(1, RecordDict(dict(good))) == NodeErrorCode.SECAGG_ALREADY_UNMASKED


def test_another_key_is_refused_before_the_app_is_asked(files, others):
    nodes = Nodes(others)
    assert nodes.code(1, asked(begin(files), 1)) == NodeErrorCode.SECAGG_KEY


@pytest.mark.parametrize(
    ("survivors", "code"),
    [
        ([1, 2], NodeErrorCode.SECAGG_TOO_FEW_NODES),
        ([1, 2, 2], NodeErrorCode.SECAGG_TOO_FEW_NODES),
        ([1, 2, 3, 3], NodeErrorCode.MALFORMED_REQUEST),
        ([1, 2, 3, 4, 5], NodeErrorCode.MALFORMED_REQUEST),
        ([2, 3, 4, 5], NodeErrorCode.MALFORMED_REQUEST),
        ([1, 2, 3], NodeErrorCode.MALFORMED_REQUEST),
        ("1234", NodeErrorCode.MALFORMED_REQUEST),
    ],
)
def test_survivors_that_cannot_be_are_refused(files, survivors, code):
    nodes = Nodes(files)
    first = begin(files)
    second = first.receive(nodes.answer(first))
    assert nodes.code(1, changed(second.requests[1], survivors=survivors)) == code


def test_one_ciphertext_in_place_of_the_sum_is_refused_as_it_is(files):
    """By its count. A server that lies can make the count right: no node can see that."""
    nodes = Nodes(files)
    first = begin(files)
    replies = nodes.answer(first)
    _, ciphertexts = decode_request(first.receive(replies).requests[1])
    assert len(ciphertexts) == 1
    single = replies[2].array_records[records.MASKED]["0"].numpy().tobytes()
    request = encode(DecryptRequest(server_round=1, survivors=NODES), [single])
    assert nodes.code(1, request) == NodeErrorCode.MALFORMED_REQUEST


@pytest.mark.parametrize("ciphertexts", [[], [b"x"], [b""], [b"x" * 300_000], [b"x", b"y"]])
def test_malformed_sums_are_refused(files, ciphertexts):
    nodes = Nodes(files)
    nodes.answer(begin(files))
    request = encode(DecryptRequest(server_round=1, survivors=NODES), ciphertexts)
    assert nodes.code(1, request) == NodeErrorCode.MALFORMED_REQUEST


@pytest.mark.parametrize(
    "fields",
    [
        {"stage": "unmask"},
        {"stage": 1},
        {"width": 0},
        {"bits": 0},
        {"bits": 65},
        {"bits": 8},
        {"parties": 2**20 + 1},
        {"seconds": 0.0},
        {"seconds": 1e9},
        {"key": "text"},
        {"extra": 1},
    ],
)
def test_malformed_requests_are_refused(files, fields):
    content = changed(asked(begin(files), 1), **fields)
    assert Nodes(files).code(1, content) == NodeErrorCode.MALFORMED_REQUEST


def test_distributed_noise_is_refused(files):
    content = asked(begin(files), 1)
    content[records.DISTRIBUTED] = ConfigRecord({})
    assert Nodes(files).code(1, content) == NodeErrorCode.POLICY_REFUSED


def test_too_few_parties_are_refused(files):
    nodes = Nodes(files, secagg_min_cohort=5)
    assert nodes.code(1, asked(begin(files), 1)) == NodeErrorCode.SECAGG_TOO_FEW_NODES


@pytest.mark.parametrize("error", [ValueError, SystemExit])
def test_an_app_that_fails_is_a_dropout_and_its_words_stay(files, error):
    def fails(received, ctx):
        raise error("patient 4711 has no age")

    nodes = Nodes(files)
    nodes.app = ClientApp()
    nodes.app.train(mods=[ckks_mod])(fails)
    reply = nodes.ask(1, asked(begin(files), 1))
    assert reply.error.code == NodeErrorCode.CLIENT_FAILED
    assert b"4711" not in all_bytes(reply)


def test_a_round_whose_time_is_up_is_forgotten(files):
    nodes = Nodes(files)
    first = begin(files, seconds=1e-3)
    second = first.receive(nodes.answer(first))
    assert nodes.code(1, RecordDict(dict(second.requests[1]))) == NodeErrorCode.SECAGG_OUT_OF_ORDER


@pytest.mark.parametrize(
    "config", [{"secagg_colluders": 1}, {"secagg_roster": "r"}, {"secagg_identity": "i"}]
)
def test_a_node_that_insists_on_what_ckks_cannot_give_refuses(files, config):
    code = Nodes(files, **config).code(1, asked(begin(files), 1))
    assert code == NodeErrorCode.POLICY_REFUSED


@pytest.mark.parametrize("config", [{"ckks_key": None}, {"ckks_key": 3}, {"secagg_min_cohort": 1}])
def test_a_node_that_is_configured_wrongly_answers_nothing(files, config):
    code = Nodes(files, **config).code(1, asked(begin(files), 1))
    assert code == NodeErrorCode.CLIENT_FAILED


def test_nothing_is_answered_without_the_protocol_or_to_the_other_one(files):
    nodes = Nodes(files)
    plain = asked(begin(files), 1)
    del plain[records.SECAGG]
    assert nodes.code(1, plain) == NodeErrorCode.SECAGG_REQUIRED
    masks = begin(files, protocol=SecAggPlus())
    assert nodes.code(1, asked(masks, 1)) == NodeErrorCode.MALFORMED_REQUEST
    other = ClientApp()
    other.train(mods=[secure_aggregation_mod])(answers)
    reply = other(message("train", asked(begin(files), 1)), context())
    assert reply.error.code == NodeErrorCode.MALFORMED_REQUEST
    query = nodes.app(message("query", RecordDict()), nodes.contexts[1])
    assert not query.has_error()
