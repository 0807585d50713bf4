"""DP-SGD on a node: what leaves is noised, charged and says nothing else about the records."""

import logging
import random

import numpy as np
import pytest
import torch
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from dpfl_flower import records
from dpfl_flower.accounting import Composed, Gaussian, Ledger, events_from_json
from dpfl_flower.client import (
    NODE_LOGGER,
    DPSGDClient,
    DPSGDConfig,
    GradientEngine,
    ModelRefused,
    NodeError,
    NodeErrorCode,
    NodeLedger,
    NodePolicy,
    numpy_client_app,
)
from dpfl_flower.client.sum_grid import SumGrid
from dpfl_flower.rng import SeededRandom
from tests.support.node import all_bytes, context, message

SECRET = "patient-4711-8.31415926"
ENGINES = list(GradientEngine)
MSE = nn.MSELoss(reduction="none")


def configured(**changes):
    settings = {
        "sampling_rate": 1.0,
        "steps_per_round": 1,
        "planned_rounds": 100,
        "clip_norm": 1.0,
        "expected_batch_size": 10.0,
        "delta": 1e-5,
        "noise_multiplier": 1.0,
    }
    return DPSGDConfig(**{**settings, **changes})


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=1.0)


def column(outputs, targets):
    return MSE(outputs[:, 0], targets)


def regression(n=20, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(
        torch.randn(n, 3, generator=generator), torch.randn(n, generator=generator)
    )


def client_for(model, dataset, config, *, ledger=None, loss_fn=column, optimizer=sgd, **arguments):
    return DPSGDClient(
        model,
        dataset,
        config=config,
        loss_fn=loss_fn,
        optimizer=optimizer,
        ledger=ledger or NodeLedger("test"),
        device="cpu",
        **arguments,
    )


def one_round(client):
    """Return how far one round moves the arrays."""
    before = client.get_parameters({})
    after, _, _ = client.fit(before, {})
    return [b - a for a, b in zip(before, after, strict=True)]


# The mechanism without noise.


@pytest.mark.parametrize("engine", ENGINES)
def test_without_noise_and_clipping_it_is_gradient_descent(engine):
    config = configured(
        noise_multiplier=0.0,
        clip_norm=1e6,
        expected_batch_size=20,
        steps_per_round=5,
    )
    torch.manual_seed(0)
    model, data = nn.Linear(3, 1), regression()
    client = client_for(model, data, config, engine=engine)
    start = client.get_parameters({})
    plain = nn.Linear(3, 1)
    plain.load_state_dict(model.state_dict())
    optimizer = sgd(plain.parameters())
    for _ in range(5):
        optimizer.zero_grad()
        column(plain(data.tensors[0]), data.tensors[1]).mean().backward()
        optimizer.step()
    arrays, _, _ = client.fit(start, {})
    for array, expected in zip(arrays, plain.parameters(), strict=True):
        np.testing.assert_allclose(array, expected.detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_sample_in_parts_gives_the_same_sum(engine):
    moves = []
    for size in (1, 7, 64):
        torch.manual_seed(0)
        config = configured(noise_multiplier=0.0, max_physical_batch_size=size)
        moves.append(one_round(client_for(nn.Linear(3, 1), regression(), config, engine=engine)))
    for other in moves[1:]:
        for a, b in zip(moves[0], other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


class Pushes(nn.Module):
    """Every record pushes every weight the same way, far beyond the clip norm."""

    def __init__(self, d=4):
        super().__init__()
        self.layer = nn.Linear(d, 1, bias=False)
        nn.init.zeros_(self.layer.weight)

    def forward(self, x):
        return self.layer(x)


def pull(outputs, targets):
    return -100 * outputs[:, 0]


def test_the_normaliser_is_public_and_does_not_follow_the_number_of_records():
    moved = {}
    for n in (0, 99, 100, 101):
        data = TensorDataset(torch.ones(n, 4), torch.zeros(n))
        config = configured(noise_multiplier=0.0, expected_batch_size=50.0, clip_norm=0.5)
        (move,) = one_round(client_for(Pushes(), data, config, loss_fn=pull))
        moved[n] = float(np.linalg.norm(move))
    for n, move in moved.items():
        assert move == pytest.approx(n * 0.5 / 50.0, rel=1e-5)


@pytest.mark.parametrize("value", [1e5, 1e30, np.nan, np.inf])
@pytest.mark.parametrize("engine", ENGINES)
def test_one_hostile_record_moves_a_step_by_at_most_the_clip_norm(engine, value):
    moves = []
    for n in (20, 21):
        inputs, targets = (t.clone() for t in regression(21).tensors)
        inputs[20] = value
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        config = configured(noise_multiplier=0.0)
        data = TensorDataset(inputs[:n], targets[:n])
        moves.append(
            np.concatenate(
                [m.ravel() for m in one_round(client_for(model, data, config, engine=engine))]
            )
        )
    assert np.isfinite(moves).all()
    assert np.linalg.norm(moves[1] - moves[0]) <= (1.0 / 10.0) * (1 + 1e-4)


def test_frozen_parameters_and_constant_buffers_come_back_as_they_were_sent():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen, self.head = nn.Linear(3, 3), nn.Linear(3, 1)
            self.frozen.requires_grad_(False)
            self.positions = nn.Module()
            self.positions.register_buffer("table", torch.arange(3))

        def forward(self, x):
            return self.head(self.frozen(x) + self.positions.table)

    client = client_for(Model(), regression(), configured())
    names = list(Model().state_dict())
    sent = [a + 1 for a in client.get_parameters({})]
    answered, _, _ = client.fit(sent, {})
    for name, before, after in zip(names, sent, answered, strict=True):
        assert before.dtype == after.dtype
        assert np.array_equal(before, after) != name.startswith("head"), name


def test_a_stateful_optimizer_starts_anew_in_each_round():
    def client():
        torch.manual_seed(0)
        return client_for(
            nn.Linear(3, 1),
            regression(),
            configured(noise_multiplier=0.0, steps_per_round=3),
            optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.1),
        )

    kept = client()
    start = kept.get_parameters({})
    kept.fit(start, {})
    again, _, _ = kept.fit(start, {})
    fresh, _, _ = client().fit(start, {})
    for a, b in zip(again, fresh, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_bfloat16_model_answers_in_numpy():
    arrays, _, _ = (
        c := client_for(nn.Linear(3, 1).bfloat16(), regression_in(torch.bfloat16), configured())
    ).fit(c.get_parameters({}), {})
    assert all(a.dtype == np.float32 and np.isfinite(a).all() for a in arrays)


def regression_in(dtype):
    return TensorDataset(*(t.to(dtype) for t in regression().tensors))


# The coins.


class Watches(Dataset):
    """Counts how often each record is read."""

    def __init__(self, n):
        self.reads = np.zeros(n, dtype=int)
        self.sizes = []

    def __len__(self):
        return len(self.reads)

    def __getitem__(self, index):
        self.reads[index] += 1
        return torch.zeros(3), 0.0


def test_every_record_has_its_own_coin_which_no_seed_moves():
    data = Watches(500)
    config = configured(sampling_rate=0.3, steps_per_round=20)
    client = client_for(nn.Linear(3, 1), data, config)
    start = client.get_parameters({})
    rounds = []
    for _ in range(2):
        reseed()
        before = data.reads.copy()
        client.fit(start, {})
        rounds.append(data.reads - before)
    rounds[0][0] -= 1  # the one look at shapes before the first charge
    draws = 20 * 500
    for reads in rounds:
        assert abs(reads.sum() - 0.3 * draws) < 5 * np.sqrt(draws * 0.3 * 0.7)
        # Binomial(20, 0.3) in each record: variance 4.2, estimated to 6 % by 500 of them.
        assert abs(reads.var() / 4.2 - 1) < 0.35
    assert abs(np.corrcoef(rounds)[0, 1]) < 5 / np.sqrt(500)


def test_rate_one_takes_every_record_in_every_step():
    data = Watches(70)
    client = client_for(nn.Linear(3, 1), data, configured(steps_per_round=3))
    client.fit(client.get_parameters({}), {})
    assert data.reads[0] == 4 and (data.reads[1:] == 3).all()


# The noise.


def reseed():
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


D = 160_000


def flat(outputs, targets):
    return 0 * outputs[:, 0]


def noise_of_rounds(n_records, *, rounds=2, rate=1.0, engine=GradientEngine.HOOKS, **changes):
    config = configured(sampling_rate=rate, **changes)
    data = TensorDataset(torch.ones(n_records, D), torch.zeros(n_records))
    moves = []
    for _ in range(rounds):
        reseed()
        client = client_for(Pushes(D), data, config, loss_fn=flat, engine=engine)
        reseed()
        moves.append(one_round(client)[0].ravel())
    return moves


def right_scale(noise, stddev):
    """Accept a standard deviation within 0.9 %: five times the error of estimating it from D."""
    return abs(noise.std() / stddev - 1) < 5 / np.sqrt(2 * D) and abs(noise.mean()) < 5 * stddev / (
        np.sqrt(D)
    )


@pytest.mark.parametrize(
    ("n_records", "rate", "engine"),
    [
        (3, 1.0, "hooks"),
        (3, 1.0, "ghost"),
        (3, 1.0, "bookkeeping"),
        (0, 1.0, "auto"),
        (3, 1e-9, "auto"),
    ],
    ids=["hooks", "ghost", "bookkeeping", "no-records", "empty-sample"],
)
def test_noise_is_there_full_sized_and_fresh_whatever_is_seeded(n_records, rate, engine):
    changes = {"noise_multiplier": 1.5, "clip_norm": 2.0, "expected_batch_size": 4.0}
    if rate < 1:
        changes["delta"] = 1e-12
    first, second = noise_of_rounds(n_records, rate=rate, engine=GradientEngine(engine), **changes)
    for noise in (first, second):
        assert right_scale(noise, 1.5 * 2.0 / 4.0)
        assert not right_scale(noise, 1.03 * 1.5 * 2.0 / 4.0)
        assert not right_scale(noise, 0.97 * 1.5 * 2.0 / 4.0)
        assert len(np.unique(noise)) > 0.3 * D  # a grid of 2^-14 standard deviations has ties
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / np.sqrt(D)
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 5 / np.sqrt(D)


def test_every_step_draws_its_own_noise():
    (noise,) = noise_of_rounds(1, rounds=1, steps_per_round=4)
    assert right_scale(noise, np.sqrt(4) * 1.0 / 10.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_noisy_sum_leaves_on_a_public_grid(dtype):
    """In float64 and undivided, so that every bit of the sum can be seen."""
    inputs, targets = (t.to(dtype) for t in regression().tensors)
    model = nn.Linear(3, 1).double() if dtype is torch.float64 else nn.Linear(3, 1)
    client = client_for(
        model,
        TensorDataset(inputs, targets),
        configured(noise_multiplier=1.3, clip_norm=0.7, expected_batch_size=1.0),
    )
    zeros = [np.zeros_like(array) for array in client.get_parameters({})]
    after, _, _ = client.fit(zeros, {})
    grid = 0.7 / SumGrid.for_noise_multiplier(1.3, 4).clip_units
    for array in after:
        cells = array.astype(np.float64) / grid
        assert np.abs(cells).max() > 1
        rounding = 2.0**-22 if dtype is torch.float32 else 2.0**-50
        assert (np.abs(cells - np.rint(cells)) <= rounding * np.abs(cells)).all()


# The ledger.


def test_epsilon_is_cumulative_over_rounds_runs_and_restarts(tmp_path):
    """1000 steps at rate 0.05 and z = 1: what an engine that forgets would call the last 100."""
    config = configured(
        sampling_rate=0.05, steps_per_round=100, planned_rounds=5, expected_batch_size=1.0
    )
    claims = []
    for run in ("first", "second"):
        for _ in range(5):  # a new client, as each message gets one, and the file opened anew
            client = client_for(
                nn.Linear(3, 1),
                regression(),
                config,
                ledger=NodeLedger("heart", path=tmp_path / "ledger.jsonl", run=run),
            )
            client.fit(client.get_parameters({}), {})
            claims.append(client.privacy_claim())

    def independent(accountant, steps):
        event = SelfComposedDpEvent(PoissonSampledDpEvent(0.05, GaussianDpEvent(1.0)), steps)
        return accountant.compose(event).get_epsilon(1e-5)

    epsilons = [c["epsilon"] for c in claims]
    assert epsilons == sorted(epsilons)
    assert epsilons[-1] == pytest.approx(independent(PLDAccountant(), 1000), rel=1e-2)
    assert epsilons[-1] == pytest.approx(10.99, abs=0.05)
    assert epsilons[-1] <= independent(RdpAccountant(), 1000)
    assert epsilons[0] == pytest.approx(independent(PLDAccountant(), 100), rel=1e-2)
    assert epsilons[0] < 4 < epsilons[-1]
    assert claims[-1]["durable"] is True
    assert sum(e.count for e in events_from_json(claims[-1]["events"])) == 1000


class ReadsAfterCharge(Dataset):
    """Remembers how much was charged whenever a record is read."""

    def __init__(self, path):
        self.path = path
        self.charges = []

    def __len__(self):
        return 3

    def __getitem__(self, index):
        self.charges.append(self.path.read_text().count('"kind":"charge"'))
        return torch.zeros(3), 0.0


def test_a_round_is_charged_before_it_trains_and_stays_charged_if_it_fails(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.touch()
    data = ReadsAfterCharge(path)

    def failing(parameters):
        optimizer = sgd(parameters)
        optimizer.register_step_post_hook(lambda *_: 1 / 0)
        return optimizer

    for expected in (1, 2):
        client = client_for(
            nn.Linear(3, 1),
            data,
            configured(),
            ledger=NodeLedger("heart", path=path),
            optimizer=failing,
        )
        data.charges.clear()
        with pytest.raises(ZeroDivisionError):
            client.fit(client.get_parameters({}), {})
        assert data.charges[1:] == [expected] * 3
    with Ledger.open(path, dataset="heart", delta=1e-5, unit="example") as ledger:
        assert ledger.releases == 2


def code_of(client):
    start = client.get_parameters({})
    with pytest.raises(NodeError) as refused:
        client.fit(start, {})
    for before, after in zip(start, client.get_parameters({}), strict=True):
        np.testing.assert_array_equal(before, after)
    assert client.privacy_claim() is None
    return refused.value.code


@pytest.mark.parametrize("rate", [1.0, 0.2])
def test_a_target_epsilon_is_the_data_sets_over_all_runs(tmp_path, rate):
    config = configured(
        sampling_rate=rate,
        noise_multiplier=None,
        target_epsilon=2.0,
        planned_rounds=3,
        steps_per_round=2,
    )

    def client(run):
        ledger = NodeLedger("heart", path=tmp_path / "ledger.jsonl", run=run)
        return client_for(nn.Linear(3, 1), regression(), config, ledger=ledger)

    one_round(client("aborted"))
    for _ in range(2):
        latest = client("again")
        one_round(latest)
    assert 1.99 < latest.privacy_claim()["epsilon"] <= 2.0
    assert code_of(client("again")) is NodeErrorCode.BUDGET_EXHAUSTED
    assert code_of(client("another")) is NodeErrorCode.BUDGET_EXHAUSTED
    assert code_of(client("aborted")) is NodeErrorCode.BUDGET_EXHAUSTED


def test_more_rounds_than_planned_are_refused(tmp_path):
    config = configured(planned_rounds=1)
    ledger = NodeLedger("heart", path=tmp_path / "ledger.jsonl")
    client = client_for(nn.Linear(3, 1), regression(), config, ledger=ledger)
    one_round(client)
    assert code_of(client) is NodeErrorCode.LEDGER_REFUSED


def test_a_node_does_not_train_below_its_own_policy(tmp_path):
    def client(**policy):
        return client_for(
            nn.Linear(3, 1),
            regression(),
            configured(noise_multiplier=4.0),
            ledger=NodeLedger("heart", path=tmp_path / "ledger.jsonl", chosen_by_node=True),
            policy=NodePolicy(**policy),
        )

    assert code_of(client(min_noise_multiplier=4.1)) is NodeErrorCode.POLICY_REFUSED
    one_round(client(min_noise_multiplier=4.0))
    assert code_of(client(max_epsilon=1.8, max_delta=9e-6)) is NodeErrorCode.POLICY_REFUSED
    for _ in range(2):
        one_round(client(max_epsilon=1.8, max_delta=1e-5))
    spent = client()
    assert code_of(client(max_epsilon=1.8, max_delta=1e-5)) is NodeErrorCode.POLICY_REFUSED
    one_round(spent)
    assert spent.privacy_claim()["epsilon"] > 1.8


def test_a_policy_about_all_runs_needs_a_ledger_that_outlives_them():
    policy = NodePolicy(max_epsilon=1e6, max_delta=0.5)
    client = client_for(nn.Linear(3, 1), regression(), configured(), policy=policy)
    assert code_of(client) is NodeErrorCode.POLICY_REFUSED


def test_a_policy_about_all_runs_needs_a_ledger_that_the_node_chose(tmp_path):
    """An app that names another file in each run would start from zero in each."""
    policy = NodePolicy(max_epsilon=1e6, max_delta=0.5)
    for node, refused in ((context(), True), (context(ledger_path=str(tmp_path / "n")), False)):
        ledger = NodeLedger.from_context(node, dataset="heart", path=tmp_path / "app")
        client = client_for(
            nn.Linear(3, 1), regression(), configured(), ledger=ledger, policy=policy
        )
        if refused:
            assert code_of(client) is NodeErrorCode.POLICY_REFUSED
        else:
            one_round(client)


def test_noise_from_a_seed_is_charged_as_none(tmp_path):
    client = client_for(
        nn.Linear(3, 1),
        regression(),
        configured(),
        ledger=NodeLedger("heart", path=tmp_path / "ledger.jsonl"),
        rng=SeededRandom(1),
        policy=NodePolicy(),
    )
    one_round(client)
    assert client.privacy_claim()["epsilon"] == float("inf")
    assert events_from_json(client.privacy_claim()["events"]) == [Gaussian(0.0)]
    with pytest.raises(ValueError, match="target_epsilon=1"):
        client_for(
            nn.Linear(3, 1),
            regression(),
            configured(noise_multiplier=None, target_epsilon=1.0),
            rng=SeededRandom(1),
        )


# What leaves the node.


def app_for(make_model=lambda: nn.Linear(3, 1), data=None, **changes):
    def client_fn(node):
        return client_for(
            make_model(),
            regression() if data is None else data,
            configured(**changes),
            ledger=NodeLedger.from_context(node, dataset="heart"),
        )

    return numpy_client_app(client_fn)


def request():
    return RecordDict(
        {
            "arrays": ArrayRecord(nn.Linear(3, 1).state_dict()),
            "config": ConfigRecord({"server-round": 1, "noise-multiplier": 0.0}),
        }
    )


def test_the_answer_holds_arrays_a_public_weight_and_the_claim():
    reply = app_for(weight=3)(message("train", request()), context())
    assert set(reply.content) == {records.ARRAYS, records.METRICS, records.PRIVACY}
    assert list(reply.content["arrays"]) == ["weight", "bias"]
    assert dict(reply.content["metrics"]) == {records.NUM_EXAMPLES: 3}
    claim = reply.content["privacy"]
    assert events_from_json(claim["events"]) == [Gaussian(1.0)]
    assert claim["durable"] is False and "this run only" in claim["statement"]


def test_the_run_keeps_its_account_in_the_context_between_messages():
    app, node = app_for(), context()
    claims = [app(message("train", request()), node).content["privacy"] for _ in range(3)]
    assert [events_from_json(c["events"]) for c in claims] == [
        [Gaussian(1.0)],
        [Composed(Gaussian(1.0), 2)],
        [Composed(Gaussian(1.0), 3)],
    ]
    assert claims[0]["epsilon"] < claims[1]["epsilon"] < claims[2]["epsilon"]


def test_the_node_config_sets_the_policy_and_the_ledger(tmp_path):
    path = str(tmp_path / "refused.jsonl")
    for node_config in (
        {"min_noise_multiplier": 1.1},
        {"max_epsilon": 0.1, "max_delta": 1e-5, "ledger_path": path},
        {"max_epsilon": 1e6, "max_delta": 1e-5},  # without a ledger of the node's own
    ):
        reply = app_for()(message("train", request()), context(**node_config))
        assert reply.error.code == NodeErrorCode.POLICY_REFUSED
    writes = context(ledger_path=str(tmp_path / "ledger.jsonl"))
    reply = app_for()(message("train", request()), writes)
    assert reply.content["privacy"]["durable"] is True
    assert (tmp_path / "ledger.jsonl").exists()


def test_no_policy_that_an_app_brings_loosens_the_nodes_own():
    ledger = NodeLedger.from_context(context(min_noise_multiplier=1.1), dataset="heart")
    for policy in (None, NodePolicy(), NodePolicy(min_noise_multiplier=0.5)):
        client = client_for(
            nn.Linear(3, 1), regression(), configured(), ledger=ledger, policy=policy
        )
        assert code_of(client) is NodeErrorCode.POLICY_REFUSED
    lax = NodeLedger.from_context(context(min_noise_multiplier=0.5), dataset="heart")
    strict = NodePolicy(min_noise_multiplier=1.1)
    client = client_for(nn.Linear(3, 1), regression(), configured(), ledger=lax, policy=strict)
    assert code_of(client) is NodeErrorCode.POLICY_REFUSED


class Leaks(Dataset):
    """One record that cannot be read, and says why."""

    def __len__(self):
        return 4711

    def __getitem__(self, index):
        if index == 4000:
            raise ValueError(f"bad row: {SECRET}")
        return torch.zeros(3), 0.0


def test_no_record_and_no_count_is_in_what_leaves(caplog):
    with caplog.at_level(logging.WARNING, NODE_LOGGER):
        reply = app_for(data=Leaks())(message("train", request()), context())
    assert not reply.has_error()  # which would tell that the record is there
    leaving = all_bytes(reply)
    assert SECRET.encode() not in leaving and b"4711" not in leaving
    assert SECRET in caplog.text  # on the node, where it helps

    number = 8.31415926
    inputs, targets = (t.clone() for t in regression(4711).tensors)
    inputs[7], targets[7] = number, number
    reply = app_for(data=TensorDataset(inputs, targets))(message("train", request()), context())
    leaving = all_bytes(reply)
    for secret in (np.float32(number).tobytes(), np.float64(number).tobytes(), b"4711"):
        assert secret not in leaving
    assert 4711 not in reply.content["metrics"].values()


def test_evaluation_is_left_to_the_app():
    reply = app_for()(message("evaluate", request()), context())
    assert reply.error.code == NodeErrorCode.NOT_IMPLEMENTED


def test_a_model_that_is_refused_is_answered_with_a_code_that_names_the_fix():
    def model():
        return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))

    with pytest.raises(ModelRefused, match=r"ModuleValidator\.fix.*GroupNorm"):
        client_for(model(), regression(), configured())
    reply = app_for(model)(message("train", request()), context())
    assert reply.error.code == NodeErrorCode.MODEL_REFUSED
    assert "ModuleValidator.fix" in reply.error.reason


class Centred(nn.Linear):
    """Takes the mean over the records of a batch from each."""

    def forward(self, x):
        return super().forward(x - x.mean(0))


EXAMPLE = [np.zeros(3, np.float32), np.float32(0)]


def test_records_that_meet_are_found_before_anything_is_charged(tmp_path):
    ledger = NodeLedger("heart", path=tmp_path / "ledger.jsonl")
    client = client_for(Centred(3, 1), regression(), configured(), ledger=ledger, example=EXAMPLE)
    assert code_of(client) is NodeErrorCode.MODEL_REFUSED
    assert not (tmp_path / "ledger.jsonl").exists()


@pytest.mark.parametrize("data", [regression(), TensorDataset(torch.zeros(0, 3), torch.zeros(0))])
def test_without_a_public_example_no_verdict_on_the_model_leaves(data, caplog):
    with caplog.at_level(logging.INFO, NODE_LOGGER):
        reply = app_for(lambda: Centred(3, 1), data)(message("train", request()), context())
    assert set(reply.content) == {records.ARRAYS, records.METRICS, records.PRIVACY}
    assert "one record at a time" in caplog.text


def test_a_model_that_is_not_refused_for_want_of_an_example_meets_no_two_records():
    moved = []
    for n in (20, 21):
        inputs, targets = (t.clone() for t in regression(21).tensors)
        inputs[20] = 1e3
        client = client_for(
            Centred(3, 1),
            TensorDataset(inputs[:n], targets[:n]),
            configured(noise_multiplier=0.0, expected_batch_size=1.0),
        )
        client.fit([np.ones((1, 3), np.float32), np.zeros(1, np.float32)], {})
        moved.append(np.concatenate([a.ravel() for a in client.get_parameters({})]))
    assert 0.01 < np.linalg.norm(moved[1] - moved[0]) <= 1 + 1e-5


class OddlyShaped(Dataset):
    """Records of three features, one of them of seven."""

    def __init__(self, odd):
        self.odd = odd

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return torch.ones(7 if index == self.odd else 3), 1.0


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("example", [None, EXAMPLE])
def test_an_oddly_shaped_record_counts_as_zeros_wherever_it_lies(engine, example):
    moves = []
    for odd in (0, 5, 19):
        torch.manual_seed(0)
        config = configured(noise_multiplier=0.0, clip_norm=0.1)
        client = client_for(
            nn.Linear(3, 1), OddlyShaped(odd), config, engine=engine, example=example
        )
        moves.append(np.concatenate([m.ravel() for m in one_round(client)]))
        assert np.linalg.norm(moves[-1]) == pytest.approx(19 * 0.1 / 10, rel=1e-5)
    np.testing.assert_allclose(moves[0], moves[1], rtol=1e-6)
    np.testing.assert_allclose(moves[0], moves[2], rtol=1e-6)


def test_what_records_write_into_a_buffer_reaches_nobody_and_no_code_tells_of_it():
    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.memory = nn.Linear(3, 1), nn.Module()
            self.memory.register_buffer("seen", torch.zeros(3), persistent=False)

        def forward(self, x):
            if (x < 0).any():
                raise ValueError("made-up records do not get this far")
            self.memory.seen += x.detach().sum(0)
            return self.layer(x)

    model = Remembers()
    data = TensorDataset(torch.ones(5, 3), torch.zeros(5))
    one_round(client_for(model, data, configured()))
    assert model.memory.seen.abs().sum() == 0


@pytest.mark.parametrize(
    "arrays",
    [[], [np.zeros((1, 3), np.float32)], [np.zeros((3, 1), np.float32), np.zeros(1, np.float32)]],
)
def test_arrays_of_another_model_are_refused(arrays):
    client = client_for(nn.Linear(3, 1), regression(), configured())
    with pytest.raises(NodeError) as refused:
        client.fit(arrays, {})
    assert refused.value.code is NodeErrorCode.MALFORMED_REQUEST


def hooks_on(model):
    return sum(
        len(m._forward_hooks) + len(m._backward_hooks) + len(m._forward_pre_hooks)
        for m in model.modules()
    ) + sum(len(p.__dict__) for p in model.parameters())


@pytest.mark.parametrize("engine", ENGINES)
def test_hooks_are_gone_after_each_round_and_after_an_exception(engine):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    fails = []

    def loss_fn(outputs, targets):
        if fails:
            raise KeyboardInterrupt  # any Exception would make a record count as zeros
        return column(outputs, targets)

    config = configured(steps_per_round=2)
    client = client_for(model, regression(), config, loss_fn=loss_fn, engine=engine)
    for _ in range(3):
        one_round(client)
        assert hooks_on(model) == 0
    fails.append(True)
    with pytest.raises(KeyboardInterrupt):
        one_round(client)
    assert hooks_on(model) == 0
    fails.clear()
    one_round(client)
    assert hooks_on(model) == 0


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("engine", ENGINES)
def test_it_trains_on_cuda_by_default_and_to_the_same_result(engine):
    moves = []
    for device in ("cpu", None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        client = DPSGDClient(
            model,
            regression(),
            config=configured(noise_multiplier=0.5, steps_per_round=3),
            loss_fn=column,
            optimizer=sgd,
            ledger=NodeLedger("test"),
            device=device,
            rng=SeededRandom(3),
        )
        moves.append(np.concatenate([m.ravel() for m in one_round(client)]))
        assert next(model.parameters()).is_cuda == (device is None)
    # A sum that rounds to the next cell of the grid moves by 3e-6: once in each of three steps.
    np.testing.assert_allclose(moves[0], moves[1], rtol=1e-4, atol=1e-5)
