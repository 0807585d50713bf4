import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import (
    GaussianPrivacyEvent,
    NeighboringRelation,
    PrivacyAccountant,
    RdpAccountant,
    SamplingMethod,
)
from flwr.serverapp.exception import PrivacyBudgetExhausted
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg

from dpfl_flower.accounting import (
    BudgetExhausted,
    Composed,
    FixedSizeSampled,
    Gaussian,
    Ledger,
    LedgerAccountant,
    LedgerError,
    LedgerTampered,
    PoissonSampled,
    PrivacyBudget,
    delta,
    epsilon,
)
from tests.support.scripted_grid import ScriptedGrid

TERMS = {"dataset": "heart", "delta": 1e-5}
NODES = 4


def accountant_of(ledger, **changes):
    return LedgerAccountant(ledger, **{"population": NODES, "planned_releases": 100, **changes})


def release(z=5.0, sample=NODES, population=NODES):
    return GaussianPrivacyEvent(z, sample, population)


def train(strategy, grid, server_round, arrays):
    """One round of a Flower strategy."""
    messages = strategy.configure_train(server_round, arrays, ConfigRecord(), grid)
    replies = grid.send_and_receive(messages)
    return strategy.aggregate_train(server_round, replies)


def flower_run(ledger, noise_multiplier=5.0):
    """Flower's own fixed-clipping wrapper, its nodes and a model."""
    weights = {"w": Array(np.ones(3, dtype=np.float32))}

    def answer(message):
        del message
        return RecordDict(
            {"arrays": ArrayRecord(weights), "metrics": MetricRecord({"num-examples": 7})}
        )

    strategy = DifferentialPrivacyServerSideFixedClipping(
        FedAvg(fraction_evaluate=0.0, min_train_nodes=NODES, min_available_nodes=NODES),
        noise_multiplier=noise_multiplier,
        clipping_norm=1.0,
        num_sampled_clients=NODES,
        accountant=accountant_of(ledger),
    )
    return strategy, ScriptedGrid(answer, NODES), ArrayRecord({"w": Array(np.zeros(3))})


def test_it_has_all_that_the_protocol_asks_for():
    members = [name for name in vars(PrivacyAccountant) if not name.startswith("_")]
    assert len(members) == 9
    for name in members:
        assert hasattr(LedgerAccountant, name), name
    # A type checker proves it too: see the annotation.
    with Ledger.in_memory(**TERMS) as ledger:
        accountant: PrivacyAccountant = accountant_of(ledger)
        assert accountant.num_releases == 0


def test_flowers_wrapper_charges_the_ledger_before_its_aggregate_is_returned(tmp_path):
    path = tmp_path / "ledger"
    with Ledger.open(path, **TERMS) as ledger:
        ledger.plan("another model", Gaussian(8.0), 10)
        ledger.charge("another model")
        strategy, grid, arrays = flower_run(ledger)
        for server_round in (1, 2, 3):
            aggregated, _ = train(strategy, grid, server_round, arrays)
            assert aggregated is not None
            assert ledger.releases == 1 + server_round
        spent = strategy.privacy_spent()
        expected = [Gaussian(8.0), Composed(Gaussian(5.0), 3)]
        assert spent.epsilon == epsilon(expected, delta=1e-5, relation="add-or-remove-one")
        assert spent.num_releases == 4
        strategy.summary()
    with Ledger.open(path, **TERMS) as ledger:
        assert ledger.events() == expected


def test_flowers_wrapper_stops_at_the_ledgers_budget():
    budget = PrivacyBudget(2.0, 1e-5)
    with Ledger.in_memory(**TERMS, budget=budget) as ledger:
        strategy, grid, arrays = flower_run(ledger)
        rounds = 0
        with pytest.raises(PrivacyBudgetExhausted):
            for rounds in range(100):
                train(strategy, grid, rounds, arrays)
        assert rounds == ledger.releases > 0
        assert ledger.epsilon() <= 2.0
        over = [Composed(Gaussian(5.0), rounds + 1)]
        assert epsilon(over, delta=1e-5, relation="add-or-remove-one") > 2.0


def test_it_never_says_less_than_flowers_accountant_would_have_to():
    with Ledger.in_memory(**TERMS) as ledger:
        ours = accountant_of(ledger)
        theirs = RdpAccountant(ours.config)
        for accountant in (ours, theirs):
            accountant.compose(release(), count=10)
        # Exact here, Rényi's upper bound there.
        assert 0.8 < ours.get_epsilon(1e-5) / theirs.get_epsilon(1e-5) <= 1.0


@pytest.mark.parametrize(
    ("method", "relation", "event"),
    [
        # A node that leaves makes room for another one: the sum of 2 of 4 moves by two clip norms.
        (SamplingMethod.NO_AMPLIFICATION, "add-or-remove-one", Gaussian(2.5)),
        (SamplingMethod.POISSON, "add-or-remove-one", PoissonSampled(0.5, Gaussian(5.0))),
        (SamplingMethod.WITHOUT_REPLACEMENT, "replace-one", FixedSizeSampled(4, 2, Gaussian(5.0))),
    ],
)
def test_flowers_sampling_methods_are_priced_as_ours(method, relation, event):
    with Ledger.in_memory(**TERMS, relation=relation) as ledger:
        accountant = accountant_of(ledger, sampling_method=method)
        accountant.compose(release(sample=2), count=3)
        assert ledger.events() == [Composed(event, 3)]
        assert accountant.config.neighboring_relation is NeighboringRelation(relation)


def test_where_everyone_takes_part_nobody_takes_the_place_of_one_who_leaves():
    with Ledger.in_memory(**TERMS, relation="add-or-remove-one") as ledger:
        accountant = accountant_of(ledger)
        accountant.compose(release(sample=4))
        assert ledger.events() == [Gaussian(5.0)]


def test_what_flower_cannot_express_is_refused():
    with (
        Ledger.in_memory(**TERMS, relation="zero-out") as ledger,
        pytest.raises(ValueError, match="relation='zero-out' must be one of"),
    ):
        accountant_of(ledger)
    with Ledger.in_memory(**TERMS, relation="replace-one") as ledger:
        with pytest.raises(ValueError, match="Unsupported privacy accounting model"):
            accountant_of(ledger)
        with pytest.raises(ValueError, match="population=0"):
            accountant_of(ledger, population=0)


def test_another_release_than_the_planned_one_is_refused():
    with Ledger.in_memory(**TERMS) as ledger:
        accountant = accountant_of(ledger)
        accountant.compose(release())
        with pytest.raises(LedgerError, match="is planned as"):
            accountant.compose(release(z=4.0))
        with pytest.raises(ValueError, match="population_size=9"):
            accountant.compose(release(population=9))
        with pytest.raises(ValueError, match="count=0"):
            accountant.compose(release(), count=0)
        assert ledger.releases == 1


def test_several_releases_are_charged_whole_or_not_at_all():
    with Ledger.in_memory(**TERMS, budget=PrivacyBudget(2.0, 1e-5)) as ledger:
        accountant = accountant_of(ledger)
        with pytest.raises(BudgetExhausted):
            accountant.compose(release(), count=50)
        assert ledger.releases == 0


def test_asking_changes_nothing():
    with Ledger.in_memory(**TERMS) as ledger:
        accountant = accountant_of(ledger)
        position = ledger.position
        assert accountant.would_exceed(release(), max_epsilon=0.1)
        assert not accountant.would_exceed(release(), max_epsilon=1.0)
        assert accountant.would_exceed(release(), max_epsilon=1.0, count=10)
        with pytest.raises(ValueError, match="max_epsilon=None"):
            accountant.would_exceed(release())
        with pytest.raises(ValueError, match="max_epsilon=0"):
            accountant.would_exceed(release(), max_epsilon=0)
        assert ledger.position == position


def test_epsilon_and_delta_are_the_ledgers():
    with Ledger.in_memory(**TERMS) as ledger:
        accountant = accountant_of(ledger)
        accountant.compose(release(), count=3)
        events = ledger.events()
        spent = accountant.get_privacy_spent(1e-7)
        assert spent.delta == 1e-7
        assert spent.epsilon == epsilon(events, delta=1e-7, relation="add-or-remove-one")
        assert accountant.get_delta(1.0) == delta(events, epsilon=1.0, relation="add-or-remove-one")
        assert accountant.get_privacy_spent().delta == 1e-5


def test_state_is_a_position_in_the_ledger_that_cannot_be_rolled_back(tmp_path):
    path = tmp_path / "ledger"
    head = path.with_name("ledger.head")
    with Ledger.open(path, **TERMS) as ledger:
        accountant_of(ledger).compose(release())
        yesterday = path.read_bytes(), head.read_bytes()
        accountant_of(ledger).compose(release())
        state = accountant_of(ledger).state_dict()
        accountant_of(ledger).compose(release())
    with Ledger.open(path, **TERMS) as ledger:
        accountant = accountant_of(ledger)
        accountant.load_state_dict(state)
        assert accountant.num_releases == 3
        with pytest.raises(LedgerError, match="run='flower', not 'other'"):
            accountant_of(ledger, run="other").load_state_dict(state)
        with pytest.raises(LedgerError, match="backend=None"):
            accountant.load_state_dict({})
        incomplete = {k: v for k, v in state.items() if k not in ("length", "head")}
        with pytest.raises(LedgerTampered):
            accountant.load_state_dict(incomplete)
    path.write_bytes(yesterday[0])
    head.write_bytes(yesterday[1])
    with Ledger.open(path, **TERMS) as ledger, pytest.raises(LedgerTampered):
        accountant_of(ledger).load_state_dict(state)


def test_messages_are_flowers_own():
    # The round above went through flwr.app.Message, not through a stand-in.
    with Ledger.in_memory(**TERMS) as ledger:
        strategy, grid, arrays = flower_run(ledger)
        train(strategy, grid, 1, arrays)
        assert all(isinstance(message, Message) for message in grid.pushed)
        assert len(grid.pushed) == NODES
