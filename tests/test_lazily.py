"""What stays unimported until it is used."""

import subprocess
import sys
from pathlib import Path

import pytest

from dpfl_flower.lazily import attributes_from

HEAVY = ("torch", "dp_accounting", "opacus", "scipy.special", "scipy.stats")

ADVERTISE = """
from pathlib import Path

from flwr.app import Context, Message, RecordDict

from apps.medical.medical.client_app import app
from dpfl_flower._flower import acting_as
from dpfl_flower.secagg import SecAggPlus, Session, SumRequest
from dpfl_flower.simulation.app_folder import AppFolder

config = dict(AppFolder.read(Path("apps/medical")).config)
config |= {{"trust": "distributed", "run-dir": {run_dir!r}}}
terms = Session(1, 1, bytes(32))
asked = SecAggPlus().begin(
    SumRequest(session=terms, nodes=(1, 2, 3, 4), width=16, bits=32, lanes=1, seconds=60.0)
)
with acting_as(0, run_id=1):
    message = Message(asked.requests[1], 1, "train")
node_config = {{"partition-id": 0, "num-partitions": 4}}
with acting_as(1, run_id=1):
    reply = app(message, Context(1, 1, node_config, RecordDict(), config))
assert not reply.has_error(), reply.error
"""


def heavy_after(code: str) -> str:
    """Return what another process has imported of what is heavy once it has run ``code``."""
    told = f"import sys; print([name for name in {HEAVY} if name in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", f"{code}\n{told}"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout.strip()


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
def test_nothing_heavy_is_imported_before_something_needs_it(
    module: str,
) -> None:
    assert heavy_after(f"import {module}") == "[]"


def test_a_hospital_imports_nothing_heavy_for_a_stage_that_trains_nobody(tmp_path: Path) -> None:
    assert heavy_after(ADVERTISE.format(run_dir=str(tmp_path))) == "[]"


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
