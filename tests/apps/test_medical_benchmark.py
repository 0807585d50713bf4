"""The benchmark's table holds a row for each seed and their mean."""

import dataclasses

from apps.medical.medical.report import HospitalReport, Report
from benchmarks import medical

REPORT = Report(
    run_id=1,
    rounds=30,
    split_seed=1,
    unit="example",
    relation="add-or-remove-one",
    delta=1e-4,
    worst_epsilon=1.0,
    epsilon_everywhere=2.2056,
    hospitals=(
        HospitalReport("heart-disease/Cleveland", 1.0, 1e-4, True, 0.9, 0.9),
        HospitalReport("heart-disease/Switzerland", 1.0, 1e-4, True, None, None),
    ),
    expected_hospitals=2,
    not_private_auc=0.85,
    not_private_reference_auc=0.88,
)


def test_the_table_holds_each_seed_and_the_mean() -> None:
    second = dataclasses.replace(REPORT, split_seed=2, not_private_auc=0.87)
    header, rule, *rows = medical.table([REPORT, second]).splitlines()
    assert header.startswith("| split seed | pooled | Cleveland | Switzerland |")
    assert set(rule) == set("| -")
    # Epsilon is rounded up.
    assert rows[0] == "| 1 | 0.850 | 0.900 | n/a | 0.880 | 1 | 2.21 |"
    assert rows[2].startswith("| **mean** | **0.860** | **0.900** | **n/a** |")


def test_noise_that_is_not_cryptographic_is_said_beside_each_epsilon_of_the_table() -> None:
    weak = dataclasses.replace(REPORT.hospitals[0], cryptographic=False)
    said = dataclasses.replace(REPORT, hospitals=(weak, REPORT.hospitals[1])).table()
    lines = [line for line in said.splitlines() if "noise not cryptographic" in line]
    assert [line.split()[0] for line in lines] == ["heart-disease/Cleveland", "a"]
    assert lines[1].startswith(
        "a patient seen in all 2 at most epsilon 2.21 at delta 0.0001; noise"
    )
    assert "noise not cryptographic" not in REPORT.table()
