"""Checkpoints of a run: safetensors and JSON, written atomically, holding released values only.

A checkpoint never holds an un-noised sum or a random generator's state. It remembers how long the
ledger was and its head, so that an older copy of the ledger put back beside it is refused.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from dpfl_flower.accounting import LedgerPosition

_FORMAT = "dpfl-checkpoint-1"
_STATE = "state.json"
_MODEL, _OPTIMIZER = "model/", "optimizer/"

Arrays = Mapping[str, NDArray[Any]]


class CheckpointError(RuntimeError):
    """A checkpoint is damaged, or belongs to another run."""


@dataclass(frozen=True)
class RunState:
    """Everything a run needs to go on after a round, all of it already paid for in the ledger.

    ``settings`` names what may not change between the parts of one run; ``claims`` holds what
    nodes that account for themselves said in public, by node.
    """

    run: str
    server_round: int
    model: Arrays
    clip_norm: float | None = None
    optimizer_state: Arrays = field(default_factory=dict)
    ledger: LedgerPosition | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    claims: Mapping[str, Any] = field(default_factory=dict)


def _write_atomically(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


class CheckpointDirectory:
    """The checkpoint of one run, in a directory of its own; only the newest round is kept."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def save(self, state: RunState) -> None:
        """Write ``state`` and sync it to disk; a crash at any point leaves the older one or it."""
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        # np.require, not ascontiguousarray: the latter turns 0-d arrays into 1-d ones.
        tensors = {
            _MODEL + name: np.require(a, requirements="C") for name, a in state.model.items()
        }
        tensors |= {_OPTIMIZER + name: a for name, a in state.optimizer_state.items()}
        data = save(tensors)
        arrays_file = f"round-{state.server_round:06d}.safetensors"
        _write_atomically(self.path / arrays_file, data)
        meta = {
            "format": _FORMAT,
            "run": state.run,
            "server_round": state.server_round,
            "clip_norm": state.clip_norm,
            "ledger": None if state.ledger is None else asdict(state.ledger),
            "settings": dict(state.settings),
            "claims": dict(state.claims),
            "arrays": arrays_file,
            "sha256": hashlib.sha256(data).hexdigest(),
            "order": list(state.model),
        }
        _write_atomically(self.path / _STATE, json.dumps(meta, indent=1).encode())
        for old in self.path.glob("round-*.safetensors"):
            if old.name != arrays_file:
                old.unlink()

    def load(self) -> RunState | None:
        """Return the newest state, or None where there is none.

        Raises
        ------
        CheckpointError
            If the files are damaged or do not belong together.
        """
        state_file = self.path / _STATE
        if not state_file.exists():
            return None
        try:
            meta = json.loads(state_file.read_bytes())
            data = (self.path / meta["arrays"]).read_bytes()
            if meta["format"] != _FORMAT:
                raise CheckpointError(f"{state_file}: format {meta['format']!r} is not {_FORMAT!r}")
            if hashlib.sha256(data).hexdigest() != meta["sha256"]:
                raise CheckpointError(f"{self.path / meta['arrays']} is not what was saved")
            tensors = load(data)
            return RunState(
                run=meta["run"],
                server_round=meta["server_round"],
                model={name: tensors[_MODEL + name] for name in meta["order"]},
                clip_norm=meta["clip_norm"],
                optimizer_state={
                    name.removeprefix(_OPTIMIZER): tensor
                    for name, tensor in tensors.items()
                    if name.startswith(_OPTIMIZER)
                },
                ledger=None if meta["ledger"] is None else LedgerPosition(**meta["ledger"]),
                settings=meta["settings"],
                claims=meta["claims"],
            )
        except (KeyError, TypeError, ValueError, OSError) as damaged:
            raise CheckpointError(f"{state_file} is damaged: {damaged}") from damaged
