"""Figures as JSON, with the machine they were measured on."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import compare

FOLDER = Path(__file__).parent / "results"


def save(name: str, figures: Mapping[str, object]) -> Path:
    """Write ``figures`` to ``benchmarks/results/<name>.json`` and return the path."""
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.json"
    payload = {
        "benchmark": name,
        "machine": compare.machine(),
        "measured": datetime.now(UTC).date().isoformat(),
        **figures,
    }
    path.write_text(json.dumps(payload, indent=2) + "\n", encoding="utf-8")
    return path
