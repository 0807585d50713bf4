"""What Flower's own privacy gets wrong, and ours does not: the same nodes, the same Grid, both.

Flower's halves assert the fault that was measured, in flwr 1.41 and 1.42: where Flower mends its
side they fail, say so, and may go, together with what the documents say about it.
"""

import importlib.metadata
import math
import warnings

import dp_accounting
import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.clientapp.mod import LocalDpMod
from flwr.serverapp import (
    GaussianPrivacyEvent,
    NeighboringRelation,
    PrivacyConfig,
    RdpAccountant,
    SamplingMethod,
)
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
)

from dpfl_flower.accounting import (
    BudgetExhausted,
    Composed,
    EveryoneSampling,
    Gaussian,
    Ledger,
    PoissonSampled,
    PrivacyBudget,
    epsilon,
)
from dpfl_flower.clipping import AdaptiveClipping, FixedClipping
from dpfl_flower.mechanisms import GaussianMechanism
from dpfl_strategies import DPFedAvg, NumExamplesWeighting
from tests.support.contracts import statistics
from tests.support.contracts.seeds import reseed
from tests.support.contracts.strategy import flat, quiet
from tests.support.node import context, message
from tests.support.recording_grid import RecordingGrid, adding, record, reply

OURS, FLOWERS = "ours", "Flower's"
on_both = pytest.mark.parametrize("whose", [OURS, FLOWERS])

NODES = 10
CLIP_NORM = 1.0
FIRST = 100
CLASSICAL = 4.8448  # sqrt(2 ln(1.25 / delta)) at delta = 1e-5


def pinned(fault: bool, what: str) -> None:
    """Require the fault that Flower had when this was written."""
    version = importlib.metadata.version("flwr")
    assert fault, f"flwr {version} no longer has this fault: {what}. Its half of this test can go"


def strategy(whose, *, noise_multiplier, nodes=NODES, adaptive_from=None, **ours):
    if whose == OURS:
        clipping = (
            FixedClipping(CLIP_NORM)
            if adaptive_from is None
            else AdaptiveClipping(initial=adaptive_from)
        )
        return DPFedAvg(
            noise_multiplier=noise_multiplier,
            sampling=EveryoneSampling(nodes),
            clipping=clipping,
            wait_seconds=0.0,
            **ours,
        )
    inner = FedAvg(fraction_evaluate=0.0, min_train_nodes=nodes, min_available_nodes=nodes)
    if adaptive_from is None:
        return DifferentialPrivacyServerSideFixedClipping(
            inner, noise_multiplier, CLIP_NORM, num_sampled_clients=nodes
        )
    return DifferentialPrivacyServerSideAdaptiveClipping(
        inner, noise_multiplier, nodes, initial_clipping_norm=adaptive_from
    )


def run(strategy, client, model, *, nodes=NODES, rounds=1, look=None):
    """Return the result of ``rounds`` rounds on nodes that are all ``client``."""
    grid = RecordingGrid(client, nodes)
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return strategy.start(grid, model, num_rounds=rounds, evaluate_fn=look)


def moved_by_first_node(strategy, model, update, *, counts=None, rest=1e-9):
    """Return how far the released model moves when the first node sends ``update`` or not."""

    def client(step):
        def answer(message):
            first = message.metadata.dst_node_id == FIRST
            content = adding(step if first else rest)(message)
            content["metrics"]["num-examples"] = counts[0] if counts and first else 1
            return content

        return answer

    with_update = flat(run(strategy(), client(update), model).arrays)
    without = flat(run(strategy(), client(rest), model).arrays)
    return float(np.linalg.norm(with_update - without))


@on_both
def test_a_node_that_says_it_has_many_examples_moves_the_mean_no_further(whose):
    def make():
        settings = {"weighting": NumExamplesWeighting(w_max=1000)} if whose == OURS else {}
        return strategy(whose, noise_multiplier=0.0, **settings)

    influence = moved_by_first_node(make, record(np.zeros(4)), 5.0, counts=[1000])
    noised_for = CLIP_NORM / NODES
    if whose == OURS:
        assert influence <= noised_for * 1.001
    else:
        # Its weight of 1000 is 0.991 of all.
        moves = influence == pytest.approx(0.991, abs=1e-3)
        pinned(moves, "the noise is sized for 0.1, one node moves 0.991")


@on_both
def test_nodes_that_are_missing_do_not_raise_what_the_others_weigh(whose):
    def client(message):
        late = message.metadata.dst_node_id >= FIRST + NODES // 2
        return None if late else adding(5.0)(message)

    model = record(np.zeros(4))
    released = flat(run(strategy(whose, noise_multiplier=0.0), client, model).arrays)
    moved = np.linalg.norm(released) / (NODES // 2)
    if whose == OURS:
        assert moved <= CLIP_NORM / NODES * 1.001
    else:
        twice = moved == pytest.approx(2 * CLIP_NORM / NODES)
        pinned(twice, "fewer replies only warn, each then weighs more")


@on_both
def test_adaptive_clipping_moves_towards_the_norms(whose):
    rng = np.random.default_rng(0)
    nodes, rounds = 40, 60

    def unit(_):
        step = rng.normal(size=50)
        return step / np.linalg.norm(step)

    under_test = strategy(whose, noise_multiplier=1.0, nodes=nodes, adaptive_from=0.1)
    norms = []

    def look(*_):
        ours = whose == OURS
        norms.append(under_test.clip_norm if ours else under_test.clipping_norm)

    run(under_test, adding(unit), record(np.zeros(50)), nodes=nodes, rounds=rounds, look=look)
    if whose == OURS:
        assert 0.5 < norms[-1] < 2.0
    else:
        # All are clipped in every round: log C falls by 6 and noise of 0.077, so that C is missed
        # by a factor of 1.6 once in 1e8.
        falls = abs(math.log(norms[-1] / 0.00026)) < math.log(1.6)
        pinned(falls, "it follows the clipped fraction, from 0.1 away from the norms to 0.00026")


@on_both
def test_the_noise_is_scaled_to_the_clip_norm_that_clipped(whose):
    nodes, used = 40, 0.1
    under_test = strategy(whose, noise_multiplier=1.0, nodes=nodes, adaptive_from=used)
    norms = []

    def look(*_):
        ours = whose == OURS
        norms.append(under_test.clip_norm if ours else under_test.clipping_norm)

    model = record(np.zeros(80_000))
    noise = flat(run(under_test, adding(1e-12), model, nodes=nodes, look=look).arrays) * nodes
    following = norms[-1]
    indicator_noise = nodes / 20
    stated = (1.0 - (2 * indicator_noise) ** -2) ** -0.5
    # Nobody is above the clip norm, which so moves by a tenth and noise of a hundredth.
    if whose == OURS:
        statistics.require_scale(noise / used, stated, allowance=0.01, shape=False)
        assert not statistics.scale_fits(noise / following, stated, highest=stated * 1.01)
    else:
        fault = statistics.scale_fits(noise / following, stated) and not statistics.scale_fits(
            noise / used, stated
        )
        pinned(fault, "the noise uses the clip norm of the next round")


@on_both
def test_a_zero_update_is_an_update(whose):
    def start():
        return run(strategy(whose, noise_multiplier=1.0), adding(0.0), record(np.zeros(4)))

    if whose == OURS:
        assert np.all(flat(start().arrays) != 0)
        return
    try:
        start()
    except ZeroDivisionError:
        return
    pinned(False, "a zero update raised ZeroDivisionError")


@on_both
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_does_not_reach_the_model(whose, value):
    def client(message):
        first = message.metadata.dst_node_id == FIRST
        return adding(value if first else 0.01)(message)

    model = record(np.zeros(4))
    released = flat(run(strategy(whose, noise_multiplier=1.0), client, model).arrays)
    if whose == OURS:
        assert np.isfinite(released).all()
    else:
        pinned(not np.isfinite(released).all(), "NaN passes the clip")


@on_both
def test_a_0_d_array_does_not_escape_the_clip(whose):
    model = record(np.zeros(()), np.zeros(3))
    influence = moved_by_first_node(lambda: strategy(whose, noise_multiplier=0.0), model, 1e6)
    if whose == OURS:
        assert influence <= CLIP_NORM / NODES * 1.001
    else:
        pinned(influence == pytest.approx(1e6 / NODES), "0-d arrays escape the clip")


@on_both
def test_an_integer_buffer_stays_the_servers_own(whose):
    def client(message):
        content = adding(0.01)(message)
        content["arrays"]["a1"] = record(np.array([123456], np.int64))["a0"]
        return content

    model = record(np.zeros(3), np.array([7], np.int64))
    try:
        released = run(strategy(whose, noise_multiplier=0.3), client, model).arrays
    except TypeError:  # numpy refuses to scale integers in place
        assert whose == FLOWERS
        return
    if whose == OURS:
        buffer = released["a1"].numpy()
        assert buffer.dtype == np.int64
        assert buffer.tolist() == [7]
    else:
        pinned(False, "an integer buffer raised TypeError")


@on_both
def test_one_error_does_not_drop_the_round(whose):
    def client(message):
        failed = message.metadata.dst_node_id == FIRST
        return Error(1, "failed") if failed else adding(0.01)(message)

    model = record(np.zeros(4))
    released = run(strategy(whose, noise_multiplier=1.0), client, model).arrays
    if whose == OURS:
        assert np.all(flat(released) != 0)
    else:
        pinned(not released or not flat(released).any(), "an error reply drops the round")


@on_both
def test_the_noise_does_not_follow_the_global_seed(whose):
    def once():
        under_test = strategy(whose, noise_multiplier=1.0)

        def client(message):
            reseed()
            return adding(1e-12)(message)

        return flat(run(under_test, client, record(np.zeros(100))).arrays)

    first, second = once(), once()
    if whose == OURS:
        assert abs(np.corrcoef(first, second)[0, 1]) < 0.6
    else:
        pinned(np.array_equal(first, second), "the noise came from numpy's global generator")


@on_both
def test_metrics_do_not_travel_without_noise_unmarked(whose):
    def client(message):
        return reply(adding(0.01)(message)["arrays"], num_examples=3, loss=0.123)

    result = run(strategy(whose, noise_multiplier=1.0), client, record(np.zeros(4)))
    metrics = dict(result.train_metrics_clientapp.get(1, {}))
    if whose == OURS:
        assert not metrics
    else:
        pinned(math.isclose(metrics.get("loss", 0.0), 0.123), "metrics leave without noise")


# --- noise added by the nodes themselves ----------------------------------------------------------


def local_reply(mod, update, model):
    """Return what a node answers through Flower's ``mod`` when it moves the model by ``update``."""

    def train(question, _):
        return Message(adding(update)(question), reply_to=question)

    question = message("train", RecordDict({"arrays": model, "config": ConfigRecord()}))
    with quiet():
        answer = mod(question, context(), train)
    assert not answer.has_error(), answer.error
    return flat(answer.content["arrays"])


@on_both
def test_beyond_epsilon_one_there_is_as_much_noise_as_epsilon_takes(whose):
    stated, delta = 20.0, 1e-5
    least = dp_accounting.get_sigma_gaussian(stated, delta)
    assert least == pytest.approx(0.2900, abs=1e-4)
    if whose == OURS:
        mechanism = GaussianMechanism(epsilon=stated, delta=delta, clip_norm=1.0)
        noise = mechanism.release([], dimension=100_000)
        statistics.require_scale(noise, least, allowance=0.01, shape=False)
        return
    mod = LocalDpMod(clipping_norm=1.0, sensitivity=1.0, epsilon=stated, delta=delta)
    noise = local_reply(mod, 1e-12, record(np.zeros(100_000)))
    # The proof of the classical formula holds up to epsilon = 1 only.
    classical = CLASSICAL / stated
    true = epsilon([Gaussian(classical)], delta=delta, relation="add-or-remove-one")
    assert true == pytest.approx(25.44, abs=0.01)
    fault = statistics.scale_fits(noise, classical) and not statistics.scale_fits(noise, least)
    pinned(fault, "the classical formula leaves epsilon 25.4 where 20 is said")


@on_both
def test_local_noise_covers_what_the_clip_norm_allows(whose):
    clip_norm = 10.0
    if whose == OURS:
        # Whoever looks at one node's answer compares it with any other that the node could give.
        mechanism = GaussianMechanism(
            epsilon=1.0, delta=1e-5, clip_norm=clip_norm, relation="replace-one"
        )
        noise = mechanism.release([], dimension=100_000)
        statistics.require_scale(noise, 2 * 3.7306 * clip_norm, allowance=0.01, shape=False)
        with pytest.raises(TypeError, match="sensitivity"):
            GaussianMechanism(epsilon=1.0, delta=1e-5, clip_norm=clip_norm, sensitivity=1e-6)
        return
    mod = LocalDpMod(clipping_norm=clip_norm, sensitivity=1e-6, epsilon=1.0, delta=1e-5)
    released = local_reply(mod, 100.0, record(np.zeros(4)))
    bare = np.abs(released - clip_norm / 2).max() < 1e-4  # the noise is 5e-6
    pinned(bare, "a free sensitivity: an update of norm 10 left with noise of 5e-6 at epsilon 1")


@on_both
def test_what_a_node_answers_again_and_again_is_charged_again_and_again(whose):
    delta, answers = 1e-5, 100
    if whose == OURS:
        mechanism = GaussianMechanism(epsilon=1.0, delta=delta, clip_norm=1.0)
        budget = PrivacyBudget(epsilon=1.01, delta=delta)
        with Ledger.in_memory(dataset="heart", delta=delta, budget=budget) as ledger:
            ledger.plan("local", mechanism.event, answers)
            ledger.charge("local")
            with pytest.raises(BudgetExhausted):
                ledger.charge("local")
        return
    mod = LocalDpMod(clipping_norm=1.0, sensitivity=1.0, epsilon=1.0, delta=delta)
    before = dict(vars(mod))
    noises = [local_reply(mod, 1e-12, record(np.zeros(1_000))) for _ in range(answers)]
    spent = epsilon(
        [Composed(Gaussian(CLASSICAL), answers)], delta=delta, relation="add-or-remove-one"
    )
    assert spent == pytest.approx(10.39, abs=0.01)
    uncounted = vars(mod) == before and statistics.scale_fits(np.concatenate(noises), CLASSICAL)
    pinned(uncounted, "a hundred answers at epsilon 1, 10.4 in all, went out uncounted")


# --- accounting -----------------------------------------------------------------------------------


@on_both
def test_rounds_that_draw_one_node_in_a_hundred_are_priced_as_such(whose):
    z, cohort, population, rounds, delta = 1.0, 10, 1000, 100, 1e-5

    def flowers(sampling):
        relation = NeighboringRelation.ADD_OR_REMOVE_ONE
        accountant = RdpAccountant(PrivacyConfig(delta, population, relation, sampling))
        accountant.compose(GaussianPrivacyEvent(z, cohort, population), rounds)
        return accountant

    poisson = flowers(SamplingMethod.POISSON)
    by_renyi = poisson.get_epsilon(delta)
    assert by_renyi == pytest.approx(1.21, abs=0.005)
    if whose == OURS:
        events = [Composed(PoissonSampled(cohort / population, Gaussian(z)), rounds)]
        exact = epsilon(events, delta=delta, relation="add-or-remove-one")
        assert exact == pytest.approx(0.718, abs=0.001)
        assert exact < by_renyi
        return
    everyone = flowers(SamplingMethod.NO_AMPLIFICATION)
    assert everyone.get_epsilon(delta) == pytest.approx(96.1, abs=0.05)
    # Its wrappers take no accountant but that one, and only around plain FedAvg.
    assert wrapped(FedAvg, everyone) is None
    refused = wrapped(FedAvg, poisson) or ""
    pinned("no-amplification" in refused, "its wrappers price the run at 96.1 for a true 0.72")
    pinned("FedAvg" in (wrapped(FedAdam, everyone) or ""), "accounts for no strategy but FedAvg")
    with pytest.raises(TypeError, match="accountant"):
        DifferentialPrivacyServerSideAdaptiveClipping(FedAvg(), z, cohort, accountant=everyone)


def wrapped(inner, accountant):
    """Return why Flower's wrapper refuses to account for ``inner``; None if it does not."""
    with quiet():
        try:
            DifferentialPrivacyServerSideFixedClipping(
                inner(), 1.0, CLIP_NORM, num_sampled_clients=10, accountant=accountant
            )
        except ValueError as error:
            return str(error)
    return None
