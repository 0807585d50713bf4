"""One node's hospital: whose patients it trains on and where it writes down what they have paid."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from flwr.app import Context

from .patients import HOSPITALS, Patient, read_patients, sample_patients

SAMPLE: Final = "heart-disease"
"""The packaged data sets are called ``heart-disease/<hospital>``."""

NodeConfig = Mapping[str, bool | float | int | str]


@dataclass(frozen=True)
class Hospital:
    """A hospital's patients.

    Attributes
    ----------
    dataset
        The name under which their ledger is kept; the server learns it.
    patients
        All of them, held-out ones included.
    ledger_path
        Where the app keeps the ledger unless the node config's ``ledger-path`` says where; None for
        a hospital's own file, whose ledger no server may choose.
    """

    dataset: str
    patients: tuple[Patient, ...]
    ledger_path: Path | None

    @classmethod
    def of(cls, context: Context, *, run_dir: Path) -> "Hospital":
        """Return the hospital of this node.

        The node config's ``data-path`` names a CSV file of its own, ``hospital`` its name (default:
        the file's). Without them the node is the packaged hospital of its ``partition-id``.

        Raises
        ------
        ValueError
            If the node config or the file is not as it should be.
        """
        config: NodeConfig = context.node_config
        data_path = _text(config, "data-path")
        if data_path is not None:
            path = Path(data_path)
            dataset = _text(config, "hospital") or path.stem
            return cls(dataset=dataset, patients=read_patients(path), ledger_path=None)
        partition = config.get("partition-id")
        if not isinstance(partition, int) or not 0 <= partition < len(HOSPITALS):
            raise ValueError(
                f"node config partition-id={partition!r} must be from 0 to {len(HOSPITALS) - 1}, "
                "the packaged hospitals; give data-path for others"
            )
        name = HOSPITALS[partition]
        return cls(
            dataset=f"{SAMPLE}/{name}",
            patients=sample_patients(name),
            ledger_path=ledger_path(run_dir, name),
        )


def ledger_path(run_dir: Path, hospital: str) -> Path:
    """Return where a packaged hospital's ledger lies.

    >>> ledger_path(Path("runs"), "VA Long Beach").as_posix()
    'runs/ledgers/va-long-beach.jsonl'
    """
    return run_dir / "ledgers" / f"{re.sub(r'[^a-z0-9]+', '-', hospital.lower())}.jsonl"


def _text(config: NodeConfig, key: str) -> str | None:
    value = config.get(key)
    if value is not None and not (isinstance(value, str) and value):
        raise ValueError(f"node config {key}={value!r} must be a text")
    return value
