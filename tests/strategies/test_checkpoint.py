import json
import os

import numpy as np
import pytest

from dpfl_flower.accounting import LedgerPosition
from dpfl_strategies.checkpoint import CheckpointDirectory, CheckpointError, RunState


@pytest.fixture
def state():
    return RunState(
        run="r",
        server_round=3,
        model={
            "w": np.arange(6, dtype=np.float32).reshape(2, 3),
            "scale": np.float16(0.5).reshape(()),
            "count": np.array(7, dtype=np.int64),
        },
        clip_norm=0.25,
        optimizer_state={"velocity": np.linspace(0, 1, 7)},
        ledger=LedgerPosition(4, "ab" * 32),
        settings={"noise_multiplier": "1.5"},
    )


def test_everything_comes_back_with_shape_dtype_and_order(tmp_path, state):
    directory = CheckpointDirectory(tmp_path / "c")
    assert directory.load() is None
    directory.save(state)
    loaded = directory.load()
    assert list(loaded.model) == list(state.model)
    for name, array in state.model.items():
        assert loaded.model[name].dtype == array.dtype
        assert loaded.model[name].shape == array.shape
        np.testing.assert_array_equal(loaded.model[name], array)
    np.testing.assert_array_equal(
        loaded.optimizer_state["velocity"], state.optimizer_state["velocity"]
    )
    assert (loaded.run, loaded.server_round, loaded.clip_norm) == ("r", 3, 0.25)
    assert loaded.ledger == state.ledger
    assert loaded.settings == state.settings


def test_only_the_newest_round_is_kept(tmp_path, state):
    directory = CheckpointDirectory(tmp_path)
    directory.save(state)
    directory.save(RunState(run="r", server_round=4, model=state.model))
    assert directory.load().server_round == 4
    assert [p.name for p in tmp_path.glob("*.safetensors")] == ["round-000004.safetensors"]


@pytest.mark.parametrize("crash_at", range(6))
def test_a_crash_at_any_sync_or_rename_leaves_the_older_state_or_the_new_one(
    tmp_path, state, monkeypatch, crash_at
):
    directory = CheckpointDirectory(tmp_path)
    directory.save(state)
    calls = iter(range(100))

    def crashing(real):
        def call(*args, **kwargs):
            if next(calls) == crash_at:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        return call

    monkeypatch.setattr(os, "fsync", crashing(os.fsync))
    monkeypatch.setattr("pathlib.Path.replace", crashing(type(tmp_path).replace))
    with pytest.raises(KeyboardInterrupt):
        directory.save(RunState(run="r", server_round=4, model=state.model))
    monkeypatch.undo()
    assert directory.load().server_round in {3, 4}


def test_damage_is_refused_not_guessed_around(tmp_path, state):
    directory = CheckpointDirectory(tmp_path)
    directory.save(state)
    arrays = next(tmp_path.glob("*.safetensors"))
    good = arrays.read_bytes()
    arrays.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="not what was saved"):
        directory.load()
    arrays.unlink()
    with pytest.raises(CheckpointError, match="damaged"):
        directory.load()
    arrays.write_bytes(good)
    meta = json.loads((tmp_path / "state.json").read_text())
    (tmp_path / "state.json").write_text(json.dumps({**meta, "format": "other"}))
    with pytest.raises(CheckpointError, match="format 'other'"):
        directory.load()
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        directory.load()
