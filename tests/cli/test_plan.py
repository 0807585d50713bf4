"""``dpfl plan`` says what the accountant says, and warns before a model drowns."""

import json
import math

import pytest
from typer.testing import CliRunner, Result

from dpfl_flower.accounting import (
    Composed,
    EveryoneSampling,
    Gaussian,
    PoissonSampled,
    PoissonSampling,
    PrivacyBudget,
    Relation,
    calibrate,
    epsilon,
)
from dpfl_flower.cli import app
from dpfl_flower.cli.plan import MeanNoise

PLAN = {"population": 1000, "cohort": 50, "rounds": 20, "epsilon": 4, "delta": 1e-5}


def invoke(*more: object, **changes: object) -> Result:
    options = [f"--{key}={value}" for key, value in {**PLAN, **changes}.items()]
    return CliRunner().invoke(app, ["plan", *options, *map(str, more)])


def test_the_figures_are_the_accountants() -> None:
    done = invoke("--dimension=10000", "--clip=0.5", "--format=json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    budget = PrivacyBudget(epsilon=4.0, delta=1e-5)
    z = calibrate(budget, PoissonSampling(50, 1000), 20)
    assert found["noise-multiplier"] == z
    noise = found["noise-on-mean"]
    assert noise["per-coordinate-in-clip-norms"] == pytest.approx(z / 50)
    assert noise["per-coordinate"] == pytest.approx(0.5 * z / 50)
    assert noise["length-to-clipped-mean"] == pytest.approx(100 * z / 50)
    assert found["dimension-of-equal-length"] == math.floor((50 / z) ** 2)
    around = {(row["cohort"], row["rounds"]): row["epsilon"] for row in found["epsilon-around"]}
    assert set(around) == {(m, t) for m in (25, 50, 100) for t in (10, 20, 40)}
    assert 3.99 < around[50, 20] <= 4
    event = Composed(PoissonSampled(0.1, Gaussian(z)), 40)
    expected = epsilon([event], delta=1e-5, relation=Relation.ADD_OR_REMOVE_ONE)
    assert around[100, 40] == pytest.approx(expected)
    assert around[25, 20] < around[50, 20] < around[100, 20]
    assert around[50, 10] < around[50, 20] < around[50, 40]


def test_the_text_holds_the_same_figures() -> None:
    z = calibrate(PrivacyBudget(epsilon=4.0, delta=1e-5), PoissonSampling(50, 1000), 20)
    done = invoke("--clip=0.5")
    assert f"Noise multiplier: {z:.4f}" in done.stdout
    assert f"{z / 50:.3g} clip norms = {z / 100:.3g} at clip norm 0.5" in done.stdout
    assert f"at {math.floor((50 / z) ** 2):,} parameters: name your model's" in done.stdout
    assert "20 rounds" in done.stdout


def test_everybody_in_every_round_is_priced_without_amplification() -> None:
    done = invoke("--format=json", cohort=1000)
    budget = PrivacyBudget(epsilon=4.0, delta=1e-5)
    found = json.loads(done.stdout)
    assert found["noise-multiplier"] == calibrate(budget, EveryoneSampling(1000), 20)
    assert {row["cohort"] for row in found["epsilon-around"]} == {500, 1000}  # not above everybody


@pytest.mark.parametrize(
    ("dimension", "words"),
    [
        (100, "expect the model to learn"),
        (100_000, "WARNING: in each round the noise is"),
        (10_000_000, "WARNING: the model will drown"),
    ],
)
def test_the_warning_grows_with_the_model(dimension: int, words: str) -> None:
    assert words in MeanNoise(1.0, cohort=100, rounds=400, dimension=dimension).verdict()
    assert words not in MeanNoise(1.0, cohort=100, rounds=400, dimension=10_000).verdict() or (
        dimension == 100
    )


def test_the_cohort_that_the_warning_names_is_enough() -> None:
    noise = MeanNoise(2.0, cohort=100, rounds=1, dimension=1_000_000)
    assert "2,000 units a round" in noise.verdict()
    assert MeanNoise(2.0, cohort=2000, rounds=1, dimension=1_000_000).length == 1


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"cohort": 1001}, "--cohort=1001 must be <= --population=1000"),
        ({"cohort": 0}, "--cohort=0.0 must be a finite number > 0"),
        ({"population": 0}, "--population=0 must be an integer >= 1"),
        ({"epsilon": -1}, "epsilon=-1.0 must be a finite number > 0"),
        ({"delta": 0.5}, "delta=0.5 must be < 1/population"),
        ({"rounds": 0}, "rounds=0 must be an integer >= 1"),
        ({"dimension": 0}, "dimension=0 must be an integer >= 1"),
        ({"clip": 0}, "clip=0.0 must be a finite number > 0"),
    ],
)
def test_a_wrong_argument_exits_with_2_and_is_named(
    changes: dict[str, object], culprit: str
) -> None:
    done = invoke(**changes)
    assert (done.exit_code, done.stdout) == (2, "")
    assert culprit in done.stderr
    found = json.loads(invoke("--format=json", **changes).stdout)
    assert found["exit-code"] == 2
    assert culprit in found["error"]


def test_a_word_that_is_no_option_exits_with_2() -> None:
    assert invoke("--relation=nonsense").exit_code == 2
    assert CliRunner().invoke(app, ["plan"]).exit_code == 2
