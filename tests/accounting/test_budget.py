import pytest

from dpfl_flower.accounting import PrivacyBudget, PrivacyUnit, Relation, TrustModel


def test_unit_and_relation_may_be_given_by_value():
    budget = PrivacyBudget(1, 1e-5, unit="user", relation="replace-one")
    assert budget.unit is PrivacyUnit.USER
    assert budget.relation is Relation.REPLACE_ONE
    assert isinstance(budget.epsilon, float)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"epsilon": 0.0, "delta": 1e-5}, "epsilon=0.0"),
        ({"epsilon": -1.0, "delta": 1e-5}, "epsilon=-1.0"),
        ({"epsilon": float("inf"), "delta": 1e-5}, "epsilon=inf"),
        ({"epsilon": float("nan"), "delta": 1e-5}, "epsilon=nan"),
        ({"epsilon": 1.0, "delta": 0.0}, "delta=0.0"),
        ({"epsilon": 1.0, "delta": 1.0}, "delta=1.0"),
        ({"epsilon": 1.0, "delta": 1e-5, "unit": "hospital"}, "hospital"),
        ({"epsilon": 1.0, "delta": 1e-5, "relation": "swap"}, "swap"),
    ],
)
def test_a_bad_budget_is_refused_by_name_and_value(arguments, named):
    with pytest.raises(ValueError, match=named):
        PrivacyBudget(**arguments)


def test_a_budget_without_delta_is_no_budget():
    with pytest.raises(ValueError, match="delta=nan must be given"):
        PrivacyBudget(epsilon=1.0)


def test_delta_must_be_below_one_over_the_population():
    budget = PrivacyBudget(1.0, 1e-3)
    budget.check_population(999)
    for population in (1000, 5000):
        with pytest.raises(ValueError, match=r"delta=0\.001 must be < 1/population"):
            budget.check_population(population)
    with pytest.raises(ValueError, match="population=0"):
        budget.check_population(0)


def test_the_four_trust_models_have_names():
    assert {str(trust) for trust in TrustModel} == {"central", "secure", "distributed", "local"}
