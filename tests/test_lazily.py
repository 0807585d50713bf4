"""What stays unimported until it is used."""

import subprocess
import sys

import pytest

from dpfl_flower.lazily import attributes_from


@pytest.mark.parametrize(
    "module",
    [
        "dpfl_strategies",
        "dpfl_flower.client",
        "dpfl_flower.client.users",
        "dpfl_flower.simulation",
        "dpfl_flower.cli",
        "apps.medical.medical.client_app",
    ],
)
def test_neither_torch_nor_dp_accounting_is_imported_before_something_needs_it(module: str) -> None:
    code = (
        f"import sys, {module}; "
        "print([name for name in ('torch', 'dp_accounting', 'opacus') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("package", ["dpfl_flower.client", "dpfl_flower.client.users"])
def test_every_public_name_is_there(package: str) -> None:
    module = __import__(package, fromlist=["__all__"])
    for name in module.__all__:
        assert hasattr(module, name)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    get = attributes_from("dpfl_flower", {"PrivacyBudget": "accounting"})
    assert get("PrivacyBudget").__name__ == "PrivacyBudget"
    with pytest.raises(AttributeError, match="'dpfl_flower' has no attribute 'Missing'"):
        get("Missing")
