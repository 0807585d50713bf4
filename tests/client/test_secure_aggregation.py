"""The mod: what leaves a node, what it refuses, and what it forgets."""

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from dpfl_flower import records
from dpfl_flower.client import NodeErrorCode, noise_share_mod, secure_aggregation_mod
from dpfl_flower.client.contribution import SumBound, UpdateRequest, contribution_for
from dpfl_flower.client.distributed_request import DistributedRequest
from dpfl_flower.client.errors import NodeError
from dpfl_flower.client.secure_aggregation import rules_from_node_config
from dpfl_flower.distributed import design
from dpfl_flower.quantize import BoundedSum, IntegerGrid
from dpfl_flower.secagg import SecAggPlus, Session, SumRequest, terms_of
from dpfl_flower.secagg.messages import Stage
from dpfl_flower.secagg.node_state import NodeState
from dpfl_flower.secagg.wire import from_bytes
from tests.support.node import all_bytes, context, message

GRID = IntegerGrid.for_noise_multiplier(1.0, 4)
NODES = (1, 2, 3, 4)
SECRET = 4711.0625


def answers(message, context):
    """Train as an unmodified app does: weights, a count and metrics go back."""
    assert set(message.content) <= {records.ARRAYS, records.CONFIG, records.COHORT}
    arrays = {n: Array(a.numpy() + np.float32(0.1)) for n, a in message.content["arrays"].items()}
    metrics = MetricRecord({"num-examples": 25, "loss": SECRET})
    return Message(
        RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics}), reply_to=message
    )


def app_of(train):
    app = ClientApp()
    app.train(mods=[secure_aggregation_mod])(train)

    @app.query()
    def query(message, context):
        return Message(RecordDict(), reply_to=message)

    return app


def task(**changes):
    settings = {"clip_norm": 1.0, "w_max": 100.0} | changes
    request = UpdateRequest(grid=GRID, largest=1 << 15, parties=4, **settings)
    return {
        records.ARRAYS: ArrayRecord({"w": Array(np.zeros(4, np.float32))}),
        records.CONFIG: ConfigRecord({"server-round": 1}),
        records.UPDATE: request.to_config(),
    }


class Nodes:
    """Four nodes with contexts of their own, asked by a server that may do anything."""

    def __init__(self, train=answers, **node_config):
        self.app = app_of(train)
        self.contexts = {n: context(node_id=n, **node_config) for n in NODES}

    def ask(self, node, content):
        return self.app(message("train", content, node_id=node), self.contexts[node])

    def go(self, until=None, *, server_round=1, extra=None, **settings):
        """Carry a round out; stop before the stage ``until`` and return the exchange."""
        exchange = SecAggPlus(**settings).begin(
            SumRequest(
                session=Session(5, server_round, terms_of(RecordDict(dict(extra or task())))),
                nodes=NODES,
                width=4,
                bits=32,
                seconds=60.0,
            )
        )
        while hasattr(exchange, "requests"):
            if exchange.stage == until:
                return exchange
            replies = {}
            for node, protocol in exchange.requests.items():
                reply = self.ask(node, self.content(exchange, protocol, extra))
                assert not reply.has_error(), reply.error
                replies[node] = reply.content
            exchange = exchange.receive(replies)
        return exchange

    @staticmethod
    def passing(message, context):
        """Hand over a message of another kind, as an app with the mod around all of it does."""
        answered = secure_aggregation_mod(
            message, context, lambda m, _: Message(m.content, reply_to=m)
        )
        assert not answered.has_error()

    @staticmethod
    def content(exchange, protocol, extra=None):
        content = RecordDict(dict((extra or task()) if exchange.carries_task else {}))
        for name, record in protocol.items():
            content[name] = record
        return content

    def code(self, node, content):
        reply = self.ask(node, content)
        assert reply.has_error()
        return NodeErrorCode(reply.error.code)


def test_the_sum_is_that_of_bounded_updates():
    expected = BoundedSum(GRID, clip_norm=1.0).contribution(
        [np.full(4, np.float32(0.1))], weight=0.25
    )
    assert np.any(expected)
    np.testing.assert_array_equal(Nodes().go().total, 4 * expected)
    uniform = BoundedSum(GRID, clip_norm=1.0).contribution([np.full(4, np.float32(0.1))])
    total = Nodes().go(extra=task(w_max=0.0)).total
    np.testing.assert_array_equal(total, 4 * uniform)


def kept(context):
    """Return what a node keeps of a round."""
    return from_bytes(NodeState, context.state[records.SECAGG_STATE]["state"])


def test_only_the_masked_vector_leaves():
    nodes = Nodes()
    exchange = nodes.go(until="mask")
    reply = nodes.ask(1, nodes.content(exchange, exchange.requests[1]))
    assert set(reply.content) == {records.SECAGG, records.MASKED}
    assert dict(reply.content[records.SECAGG]) == {
        "stage": int(Stage.MASK),
        "tokens.node_id": [],
        "tokens.token": [],
    }
    sent = all_bytes(reply)
    assert np.float64(SECRET).tobytes() not in sent
    assert b"num-examples" not in sent
    assert b"loss" not in sent


def test_a_train_message_without_the_protocol_is_refused_and_others_pass(caplog):
    nodes = Nodes()
    plain = RecordDict({records.ARRAYS: ArrayRecord({"w": Array(np.zeros(4, np.float32))})})
    assert nodes.code(1, plain) is NodeErrorCode.SECAGG_REQUIRED
    assert "the strategy must have secure_aggregation=..." in caplog.text
    query = nodes.app(message("query", RecordDict(), node_id=1), nodes.contexts[1])
    assert not query.has_error()


@pytest.mark.parametrize("stage", ["advertise", "share", "mask", "unmask"])
def test_each_stage_is_answered_once(stage):
    nodes = Nodes()
    exchange = nodes.go(until=stage)
    content = nodes.content(exchange, exchange.requests[1])
    assert not nodes.ask(1, content).has_error()
    again = nodes.content(exchange, exchange.requests[1])
    expected = "SECAGG_ALREADY_UNMASKED" if stage == "unmask" else "SECAGG_REPLAYED"
    assert nodes.code(1, again).name == expected


def test_a_crash_between_reply_and_state_is_noticed_where_there_is_a_journal(tmp_path):
    nodes = Nodes(secagg_journal=str(tmp_path / "journal"))
    exchange = nodes.go(until="unmask")
    record = ConfigRecord(dict(nodes.contexts[1].state[records.SECAGG_STATE]))
    progress = ConfigRecord(dict(nodes.contexts[1].state[records.SECAGG_PROGRESS]))
    assert not nodes.ask(1, nodes.content(exchange, exchange.requests[1])).has_error()
    nodes.contexts[1].state[records.SECAGG_STATE] = record
    nodes.contexts[1].state[records.SECAGG_PROGRESS] = progress
    again = nodes.content(exchange, exchange.requests[1])
    assert nodes.code(1, again) is NodeErrorCode.SECAGG_ALREADY_UNMASKED


def test_the_state_is_deleted_when_a_round_ends_or_fails_or_another_begins(monkeypatch):
    nodes = Nodes()
    exchange = nodes.go(until="mask")
    assert records.SECAGG_STATE in nodes.contexts[1].state
    broken = nodes.content(exchange, exchange.requests[1], {records.CONFIG: ConfigRecord()})
    assert nodes.code(1, broken) is NodeErrorCode.MALFORMED_REQUEST
    assert records.SECAGG_STATE not in nodes.contexts[1].state
    nodes.go(server_round=2)
    assert all(records.SECAGG_STATE not in c.state for c in nodes.contexts.values())
    old = nodes.go(until="share", server_round=3)
    before = kept(nodes.contexts[1])
    nodes.go(until="share", server_round=4)
    assert kept(nodes.contexts[1]).mask_private != before.mask_private
    late = nodes.content(old, old.requests[1])
    assert nodes.code(1, late) is NodeErrorCode.SECAGG_REPLAYED


@pytest.mark.parametrize(
    ("late", "code"),
    [
        ("the stage that is next", "SECAGG_OUT_OF_ORDER"),
        ("a stage that was answered", "SECAGG_REPLAYED"),
        ("a stage of another round", "SECAGG_OUT_OF_ORDER"),
        ("no stage at all", "SECAGG_REQUIRED"),
        ("nothing that can be read", "MALFORMED_REQUEST"),
    ],
)
def test_a_round_whose_time_is_up_is_forgotten_whatever_comes_then(monkeypatch, late, code):
    nodes = Nodes()
    begun = nodes.go(until="advertise", server_round=1)
    exchange = nodes.go(until="share", server_round=1)
    other = Nodes().go(until="share", server_round=2)
    contents = {
        "the stage that is next": nodes.content(exchange, exchange.requests[1]),
        "a stage that was answered": nodes.content(begun, begun.requests[1]),
        "a stage of another round": nodes.content(other, other.requests[1]),
        "no stage at all": RecordDict(task()),
        "nothing that can be read": RecordDict({records.SECAGG: ConfigRecord({"stage": 99})}),
    }
    state = nodes.contexts[1].state
    expires = state[records.SECAGG_STATE]["expires"]
    monkeypatch.setattr("time.time", lambda: expires - 1)
    nodes.passing(message("query", RecordDict(), node_id=1), nodes.contexts[1])
    assert records.SECAGG_STATE in state
    monkeypatch.setattr("time.time", lambda: expires + 1)
    assert nodes.code(1, contents[late]).name == code
    assert records.SECAGG_STATE not in state


def test_a_message_of_another_kind_forgets_it_too(monkeypatch):
    nodes = Nodes()
    nodes.go(until="share")
    state = nodes.contexts[1].state
    expires = state[records.SECAGG_STATE]["expires"]
    monkeypatch.setattr("time.time", lambda: expires + 1)
    nodes.passing(message("query", RecordDict(), node_id=1), nodes.contexts[1])
    assert records.SECAGG_STATE not in state


@pytest.mark.parametrize("expires", [None, "soon", b"", [1.0], float("nan"), 4e12])
def test_a_state_without_an_end_that_a_round_can_have_is_forgotten(expires):
    nodes = Nodes()
    exchange = nodes.go(until="share")
    record = nodes.contexts[1].state[records.SECAGG_STATE]
    del record["expires"]
    if expires is not None:
        record["expires"] = expires
    content = nodes.content(exchange, exchange.requests[1])
    assert nodes.code(1, content) is NodeErrorCode.SECAGG_OUT_OF_ORDER
    assert records.SECAGG_STATE not in nodes.contexts[1].state


def raising(message, context):
    raise ValueError("patient 4711 has no age")


def leaving(message, context):
    raise SystemExit("patient 4711 has no age")


def failing(message, context):
    return Message(Error(77, "patient 4711"), reply_to=message)


def known(message, context):
    return Message(NodeErrorCode.BUDGET_EXHAUSTED.to_error(), reply_to=message)


def other_shape(message, context):
    arrays = ArrayRecord({"w": Array(np.zeros(5, np.float32))})
    return Message(RecordDict({"arrays": arrays}), reply_to=message)


@pytest.mark.parametrize(
    ("train", "code"),
    [
        (raising, "CLIENT_FAILED"),
        (leaving, "CLIENT_FAILED"),
        (failing, "CLIENT_FAILED"),
        (known, "BUDGET_EXHAUSTED"),
        (other_shape, "MALFORMED_REPLY"),
        (lambda m, c: Message(RecordDict(), reply_to=m), "MALFORMED_REPLY"),
    ],
)
def test_an_app_that_fails_is_a_dropout_and_its_words_stay(train, code):
    nodes = Nodes(train)
    exchange = nodes.go(until="mask")
    reply = nodes.ask(1, nodes.content(exchange, exchange.requests[1]))
    assert reply.error.code == NodeErrorCode[code]
    assert "4711" not in reply.error.reason


# What is asked of a node.


def contribution(content, *, width=4, bits=32, **node_config):
    return contribution_for(RecordDict(content), node_config, width=width, bits=bits)


@pytest.mark.parametrize(
    "changes",
    [
        {"bits": 16},  # 4 * 2^15 needs 18
        {"width": 5},
    ],
)
def test_a_request_that_does_not_fit_the_sum_is_refused(changes):
    contribution(task())
    with pytest.raises(NodeError) as refused:
        contribution(task(), **changes)
    assert refused.value.code is NodeErrorCode.MALFORMED_REQUEST


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("clip-norm", 0.0),
        ("w-max", -1.0),
        ("largest", 5),
        ("parties", 0),
        ("dither-seed", b"x"),
        ("dimension", 3),
        ("sensitivity-units", "4"),
        ("unknown", 1),
    ],
)
def test_each_field_of_an_update_request_is_checked(field, value):
    content = task()
    content[records.UPDATE][field] = value
    with pytest.raises(NodeError) as refused:
        contribution(content)
    assert refused.value.code is NodeErrorCode.MALFORMED_REQUEST


def test_a_nodes_own_least_noise_holds():
    contribution(task(), **{"min-noise-multiplier": 1.0})
    with pytest.raises(NodeError) as refused:
        contribution(task(), **{"min-noise-multiplier": 1.1})
    assert refused.value.code is NodeErrorCode.POLICY_REFUSED


def test_a_sum_of_many_units_is_held_to_the_population_that_was_named():
    bound = SumBound(largest=100, parties=4).to_config()
    made = contribution({records.COHORT: ConfigRecord(), records.UPDATE: bound})
    assert records.UPDATE not in made.task
    assert records.COHORT in made.task

    def answer(values):
        array = Array(np.asarray(values))
        return RecordDict({records.INTEGER_SUM: ArrayRecord({records.SUM: array})})

    np.testing.assert_array_equal(made.vector(answer([100, -100])), [100, -100])
    # Refused in clear, it would tell of the node's exact sum: the server names the bound.
    for large in ([101, 0], [-101, 1]):
        np.testing.assert_array_equal(made.vector(answer(large)), [0, 0])
    for wrong in (answer([[1]]), answer([0.5]), RecordDict()):
        with pytest.raises(NodeError) as refused:
            made.vector(wrong)
        assert refused.value.code is NodeErrorCode.MALFORMED_REPLY


@pytest.mark.parametrize(
    ("examples", "weight"), [(25, 0.25), (1e9, 1.0), (0, 0.0), (-5, 0.0), (None, 0.0)]
)
def test_a_node_weighs_as_num_examples_weighting_does(examples, weight):
    made = contribution(task())
    metrics = {} if examples is None else {"num-examples": examples}
    answer = RecordDict(
        {
            "arrays": ArrayRecord({"w": Array(np.full(4, 0.1, np.float32))}),
            "metrics": MetricRecord(metrics),
        }
    )
    expected = BoundedSum(GRID, clip_norm=1.0).contribution(
        [np.full(4, 0.1, np.float32)], weight=weight
    )
    np.testing.assert_array_equal(made.vector(answer), expected)


# Node config.


def test_rules_are_read_from_the_nodes_config(tmp_path):
    assert rules_from_node_config({}).min_cohort == 3
    key = Ed25519PrivateKey.generate()
    identity, roster = tmp_path / "id", tmp_path / "roster"
    identity.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    roster.write_bytes(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    rules = rules_from_node_config(
        {
            "secagg-min-cohort": 5,
            "secagg-colluders": 2,
            "secagg-identity": str(identity),
            "secagg-roster": str(roster),
            "secagg-journal": str(tmp_path / "journal"),
        }
    )
    assert (rules.min_cohort, rules.colluders) == (5, 2)
    assert rules.identity.public in rules.roster.members
    for wrong in (
        {"secagg-min-cohort": "5"},
        {"secagg-min-cohort": True},
        {"secagg-min-cohort": 1},
        {"secagg-roster": ""},
        {"secagg-roster": str(roster), "secagg-journal": str(tmp_path / "journal")},
        {"secagg-identity": str(identity), "secagg-journal": str(tmp_path / "journal")},
    ):
        with pytest.raises(ValueError):
            rules_from_node_config(wrong)
    # Asked twice before it has kept the state of the first time, it would hand out both shares.
    with pytest.raises(ValueError, match="needs secagg-journal"):
        rules_from_node_config({"secagg-identity": str(identity), "secagg-roster": str(roster)})


def test_a_node_whose_config_is_wrong_takes_no_part():
    nodes = Nodes(secagg_min_cohort="many")
    exchange = SecAggPlus().begin(
        SumRequest(session=Session(5, 1), nodes=NODES, width=4, bits=32, seconds=60.0)
    )
    content = nodes.content(exchange, exchange.requests[1])
    assert nodes.code(1, content) is NodeErrorCode.CLIENT_FAILED


def test_nodes_with_rosters_in_files(tmp_path):
    nodes = Nodes()
    keys = {n: Ed25519PrivateKey.generate() for n in NODES}
    for n, config in files_of(keys, tmp_path).items():
        nodes.contexts[n].node_config.update(config)
    assert nodes.go(rosters=True).survivors == NODES


def files_of(keys, folder, *, stranger=None):
    """Write each node's identity, and the roster that all but the stranger have."""
    for name, left_out in (("roster", stranger), ("all", None)):
        lines = [
            key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
            for n, key in keys.items()
            if n != left_out
        ]
        (folder / name).write_bytes(b"\n".join(lines))
    configs = {}
    for n, key in keys.items():
        path = folder / f"id{n}"
        path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        roster = folder / ("all" if n == stranger else "roster")
        configs[n] = {
            "secagg-identity": str(path),
            "secagg-roster": str(roster),
            "secagg-journal": str(folder / f"journal{n}"),
        }
    return configs


def noised_terms(min_survivors):
    """What nodes of a sum with distributed noise are asked, one unit each."""
    plan = design(
        noise_multiplier=2.0,
        rounds=1,
        dimension=4,
        clip_norm=1.0,
        num_nodes=4,
        min_survivors=min_survivors,
        max_units=4,
        unit="node",
        relation="zero-out",
    )
    asked = DistributedRequest(plan=plan, server_round=1, num_rounds=1, rotation_seed=b"public")
    terms = {**task(), records.DISTRIBUTED: asked.to_config()}
    del terms[records.UPDATE]
    return terms


def noised(message, context):
    """Answer a sum that carries its share of the noise."""
    total = ArrayRecord({records.SUM: Array(np.zeros(4, np.int64))})
    return Message(RecordDict({records.INTEGER_SUM: total}), reply_to=message)


@pytest.mark.parametrize(("counts_on", "answered"), [(3, True), (4, False)])
@pytest.mark.parametrize("gone_at", ["share", "mask"])
def test_fewer_vectors_than_a_plan_counts_on_are_not_unmasked_whatever_the_server_says(
    gone_at, counts_on, answered
):
    """Three of four are enough for masks, and for the node's own minimum."""
    terms, asked = noised_terms(counts_on), []

    def train(message, context):
        asked.append(context.node_id)
        return noised(message, context)

    nodes = Nodes(train)
    exchange = nodes.go(gone_at, extra=terms)
    replies = {
        node: nodes.ask(node, nodes.content(exchange, exchange.requests[node], terms)).content
        for node in (1, 2, 3)
    }
    exchange = exchange.receive(replies)
    reply = nodes.ask(1, nodes.content(exchange, exchange.requests[1], terms))
    if answered:
        assert not reply.has_error()
    else:
        assert NodeErrorCode(reply.error.code) is NodeErrorCode.SECAGG_TOO_FEW_NODES
        # Too few to begin with: nothing is computed, nothing charged.
        assert asked == ([] if gone_at == "share" else [1, 2, 3])


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ({"max-epsilon": 5.0, "max-delta": 1e-5}, "POLICY_REFUSED"),
        ({"min-noise-multiplier": 2.0}, "POLICY_REFUSED"),
        ({"secagg-min-cohort": 3}, "POLICY_REFUSED"),
        ({"min-share-multiplier": 0.5}, "POLICY_REFUSED"),
        ({"secagg-min-cohort": 30}, None),
    ],
)
def test_made_up_neighbours_make_no_share_of_the_noise_small(tmp_path, config, code):
    """A server that is all other 29 nodes would measure what a share of a thirtieth leaves bare."""
    made_up = range(2, 31)
    plan = design(
        noise_multiplier=2.0, rounds=1, dimension=4, clip_norm=1.0, num_nodes=30, min_survivors=30,
        max_units=30, unit="node", relation="zero-out",
    )  # fmt: skip
    asked = DistributedRequest(plan=plan, server_round=1, num_rounds=1, rotation_seed=b"public")
    terms = {**task(), records.DISTRIBUTED: asked.to_config()}
    del terms[records.UPDATE]
    app = ClientApp()
    share = noise_share_mod(dataset="heart", delta=1e-5)
    app.train(mods=[secure_aggregation_mod, share])(answers)
    ledger = {"ledger-path": str(tmp_path / "ledger.jsonl")}
    contexts = {1: context(node_id=1, **ledger, **config)}
    contexts |= {n: context(node_id=n) for n in made_up}
    wanted = SumRequest(
        session=Session(5, 1, terms_of(RecordDict(terms))), nodes=tuple(range(1, 31)), width=4,
        bits=32, seconds=60.0,
    )  # fmt: skip
    exchange = SecAggPlus(threshold=0.51).begin(wanted)
    while exchange.stage != "mask":
        replies = {
            n: app(message("train", RecordDict(dict(content)), node_id=n), contexts[n])
            for n, content in exchange.requests.items()
        }
        exchange = exchange.receive({n: reply.content for n, reply in replies.items()})
    content = RecordDict({**exchange.requests[1], **terms})
    reply = app(message("train", content, node_id=1), contexts[1])
    if code is None:
        assert not reply.has_error(), reply.error
    else:
        assert NodeErrorCode(reply.error.code).name == code


@pytest.mark.parametrize(
    ("stranger", "min_survivors", "taken"), [(None, 4, True), (4, 3, True), (4, 4, False)]
)
def test_a_neighbour_that_is_not_on_the_roster_makes_no_share_of_the_noise_certain(
    tmp_path, stranger, min_survivors, taken
):
    """t neighbours hand out shares of a seed, and the server is any of them that is a stranger."""
    terms = noised_terms(min_survivors)
    nodes = Nodes(noised)
    keys = {n: Ed25519PrivateKey.generate() for n in NODES}
    for n, config in files_of(keys, tmp_path, stranger=stranger).items():
        nodes.contexts[n].node_config.update(config)
    exchange = nodes.go("mask", extra=terms, rosters=True, threshold=1.0)  # t = 3 of 3 neighbours
    reply = nodes.ask(1, nodes.content(exchange, exchange.requests[1], terms))
    if taken:
        assert not reply.has_error(), reply.error
    else:
        assert NodeErrorCode(reply.error.code) is NodeErrorCode.POLICY_REFUSED


@pytest.mark.parametrize(
    "changed",
    [
        {records.UPDATE: task(clip_norm=2.0)[records.UPDATE]},
        {records.CONFIG: ConfigRecord({"server-round": 1, "lr": 0.0})},
        {records.ARRAYS: ArrayRecord({"w": Array(np.full(4, np.nan, np.float32))})},
        {records.ARRAYS: ArrayRecord({"w": Array(np.zeros((2, 2), np.float32))})},
        {records.ARRAYS: ArrayRecord({"v": Array(np.zeros(4, np.float32))})},
        {"more": ArrayRecord({"w": Array(np.zeros(4, np.float32))})},
        {"more": MetricRecord({"lr": 0.0})},
        {records.COHORT: ConfigRecord()},
    ],
)
def test_terms_that_are_not_those_the_round_began_with_get_no_vector(changed):
    """A server that told one node a coarse grid and the others a fine one could take it apart.

    So could one that sent all others a model or a config under which they learn nothing.
    """
    nodes = Nodes()
    exchange = nodes.go(until="mask")
    node, protocol = next(iter(exchange.requests.items()))
    content = nodes.content(exchange, protocol, task() | changed)
    assert nodes.code(node, content) is NodeErrorCode.MALFORMED_REQUEST


def test_a_model_whose_arrays_come_in_another_order_gets_no_vector():
    """One node's update of an array would lie where that of the others' other array is zero."""
    arrays = {"v": Array(np.zeros(2, np.float32)), "w": Array(np.zeros(2, np.float32))}
    told = task() | {records.ARRAYS: ArrayRecord(arrays)}
    nodes = Nodes()
    exchange = nodes.go(until="mask", extra=told)
    node, protocol = next(iter(exchange.requests.items()))
    turned = told | {records.ARRAYS: ArrayRecord(dict(reversed(arrays.items())))}
    content = nodes.content(exchange, protocol, turned)
    assert nodes.code(node, content) is NodeErrorCode.MALFORMED_REQUEST


def test_another_function_of_the_app_than_the_round_began_with_gets_no_vector():
    """A server asks one node to train and the others to do what leaves the model as it is."""
    nodes = Nodes()
    nodes.app.train("warmup", mods=[secure_aggregation_mod])(answers)
    exchange = nodes.go(until="mask")
    codes = {}
    for node, protocol in exchange.requests.items():
        action = "train" if node == NODES[0] else "train.warmup"
        request = message(action, nodes.content(exchange, protocol), node_id=node)
        reply = nodes.app(request, nodes.contexts[node])
        codes[node] = reply.error.code if reply.has_error() else None
    refused = NodeErrorCode.MALFORMED_REQUEST
    assert codes == {NODES[0]: None} | dict.fromkeys(NODES[1:], refused)


def test_records_in_another_order_get_no_vector():
    nodes = Nodes()
    exchange = nodes.go(until="mask")
    node, protocol = next(iter(exchange.requests.items()))
    content = nodes.content(exchange, protocol, dict(reversed(task().items())))
    assert nodes.code(node, content) is NodeErrorCode.MALFORMED_REQUEST


def test_a_clip_norm_that_no_grid_has_is_refused_before_the_app_is_called():
    def never(message, context):
        raise AssertionError

    nodes = Nodes(never)
    told = task()
    told[records.UPDATE]["clip-norm"] = 1e-306
    exchange = nodes.go(until="mask", extra=told)
    node, protocol = next(iter(exchange.requests.items()))
    code = nodes.code(node, nodes.content(exchange, protocol, told))
    assert code is NodeErrorCode.MALFORMED_REQUEST


def test_nodes_that_were_told_other_terms_share_no_keys():
    nodes = Nodes()
    exchange = nodes.go(until="share")
    other = dict(task())
    other[records.UPDATE] = ConfigRecord(dict(other[records.UPDATE]) | {"clip-norm": 2.0})
    lied_to = NODES[0]
    request = SumRequest(
        session=Session(5, 1, terms_of(RecordDict(other))),
        nodes=NODES,
        width=4,
        bits=32,
        seconds=60.0,
    )
    fresh = Nodes()
    first = SecAggPlus().begin(request).requests[lied_to]
    honest = SecAggPlus().begin(
        SumRequest(
            session=Session(5, 1, terms_of(RecordDict(dict(task())))),
            nodes=NODES,
            width=4,
            bits=32,
            seconds=60.0,
        )
    )
    keys = {}
    for node in NODES:
        asked = first if node == lied_to else honest.requests[node]
        keys[node] = fresh.ask(node, fresh.content(honest, asked)).content
    sharing = honest.receive(keys)
    shared = {
        node: fresh.ask(node, fresh.content(sharing, asked)).content
        for node, asked in sharing.requests.items()
    }
    masking = sharing.receive(shared)
    states = []
    for node, asked in masking.requests.items():
        if node != lied_to:
            reply = fresh.ask(node, fresh.content(masking, asked, task()))
            assert not reply.has_error()
            states.append({held.node_id for held in kept(fresh.contexts[node]).held})
    # What the node with other terms sealed opens for nobody: no mask of its is ever taken off.
    assert all(lied_to not in held for held in states)
    assert exchange.stage == "share"
