"""What all tests share."""

import sys
from collections.abc import Generator
from pathlib import Path

import pytest

# Helpers are imported, never collected: one of them silences logging on import.
collect_ignore_glob = ["support/*"]

_HERE = Path(__file__).parent

# These run the same lines thousands of times, and to trace a line can take longer than to run it.
# Other tests run the same lines once, and `make test` holds those to a coverage of 95 %.
_UNTRACED = tuple(
    _HERE / path
    for path in (
        "apps",
        "contracts",
        "client/per_sample/test_layers.py",
        "client/per_sample/test_opacus_layers.py",
        "client/users/test_cohort.py",
        "client/users/test_engines.py",
        "client/users/test_isolation.py",
        "client/users/test_step_graph.py",
        "distributed/test_plan.py",
        "noise/test_opendp.py",
        "quantize/test_bounded_sum.py",
        "secagg/test_hostile_inputs.py",
        "secagg/test_protocol.py",
        "secagg/test_runtimes.py",
        "strategies/test_local_fedavg.py",
    )
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start first what takes minutes, then what waits for other processes."""

    def late(item: pytest.Item) -> tuple[bool, bool]:
        marked = item.get_closest_marker
        return marked("slowest") is None, marked("slow") is None

    items.sort(key=late)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Leave repetitive tests untraced, which ``no_cover`` of pytest-cov does not in a worker."""
    tracer = sys.gettrace()
    if tracer is None or not any(pyfuncitem.path.is_relative_to(path) for path in _UNTRACED):
        return (yield)
    sys.settrace(None)
    try:
        return (yield)
    finally:
        sys.settrace(tracer)
