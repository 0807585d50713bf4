"""Finds a data set on this machine, or fetches it once and keeps it.

In this order: the installed package, the cache, the user's package client. Whatever the source, a
file is used only if its SHA-256 is the pinned one. With a warm cache nothing is downloaded and
nothing is written, so that it works offline and on a read-only disk.

>>> cache_root(Path("/tmp/cache"))
PosixPath('/tmp/cache')
"""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Final

from dpfl_flower.datasets import wheel
from dpfl_flower.datasets.catalog import DataSet, look_up
from dpfl_flower.datasets.errors import DatasetError

MANIFEST: Final = "manifest.json"
"""Lies beside the cached files and says what they are, whence they came and on what terms."""

Progress = Callable[[str], None]


def fetch(
    name: str, *, cache_dir: str | Path | None = None, progress: Progress | None = None
) -> Path:
    """Return a folder that holds the files of the data set called ``name``.

    Parameters
    ----------
    name
        A name in the catalog.
    cache_dir
        Where data sets are kept; default ``$XDG_CACHE_HOME/dpfl-flower/data``
        (``~/.cache/dpfl-flower/data``).
    progress
        Is told, in a line each, what takes time or is out of the ordinary.

    Returns
    -------
    Path
        The files of ``look_up(name).files`` lie in it, each with the pinned SHA-256.

    Raises
    ------
    ValueError
        If there is no such data set.
    DatasetError
        If it is not here and cannot be fetched, or what was fetched is not what is pinned.
    """
    data = look_up(name)
    tell = progress or _say_nothing
    place = cache_root(cache_dir) / f"{data.name}-{data.version}"
    found = _installed(data, tell)
    if found is None and _fault(data, place) is None:
        found = place
    return found or _fetched(data, place, tell)


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """Return where data sets are kept."""
    if cache_dir is not None:
        return Path(cache_dir)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "dpfl-flower" / "data"


def _say_nothing(_: str) -> None:
    pass


def _installed(data: DataSet, tell: Progress) -> Path | None:
    """Return the folder in the installed package, None unless it holds the pinned files."""
    try:
        package = distribution(data.distribution)
    except PackageNotFoundError:
        return None
    folder = Path(str(package.locate_file(data.folder)))
    fault = _fault(data, folder)
    if fault is None:
        return folder
    tell(f"{data.name}: passing over the installed {data.distribution} {package.version}: {fault}")
    return None


def _fault(data: DataSet, folder: Path) -> str | None:
    """Return what is wrong with the files in ``folder``; None if they are the pinned ones."""
    for name, expected in data.files.items():
        try:
            found = wheel.sha256((folder / name).read_bytes())
        except OSError as error:
            return f"{folder / name}: {error.strerror}"
        if found != expected:
            return f"{folder / name} has SHA-256 {found}, must be {expected}"
    return None


def _fetched(data: DataSet, place: Path, tell: Progress) -> Path:
    """Download into ``place``, unless another process just did."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with _alone(place.parent / f".{place.name}.lock"):
            fault = _fault(data, place)
            if fault is None:
                return place
            damaged = place.exists()
            if damaged:
                tell(f"{data.name}: the cache is damaged and is fetched again: {fault}")
            tell(f"{data.name}: fetching {data.requirement} with pip")
            try:
                _fill(data, place)
            except DatasetError as error:
                if not damaged:
                    raise
                raise DatasetError(f"{error}\nThe cached copy is damaged: {fault}") from error
    except OSError as error:
        raise DatasetError(
            f"{data.name}: cannot be kept in {place.parent}: {error}. Make it writable, or name "
            "another folder (cache_dir, or XDG_CACHE_HOME in the environment)"
        ) from error
    return place


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Hold ``lock`` against other threads and processes; the kernel lets go of a dead one's."""
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fill(data: DataSet, place: Path) -> None:
    """Put files and manifest into ``place`` in one step, in the place of whatever was there."""
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}.") as work:
        downloads, fresh, stale = (Path(work) / part for part in ("wheel", "fresh", "stale"))
        downloads.mkdir()
        fresh.mkdir()
        contents = wheel.members(data, wheel.download(data, downloads))
        for name, content in contents.items():
            _write(fresh / name, content)
        _write(fresh / MANIFEST, (json.dumps(_manifest(data), indent=2) + "\n").encode())
        if place.is_symlink() or place.is_file():
            place.unlink()
        elif place.exists():
            place.rename(stale)
        fresh.rename(place)
        shutil.rmtree(stale, ignore_errors=True)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _manifest(data: DataSet) -> dict[str, object]:
    return {
        "name": data.name,
        "summary": data.summary,
        "licence": data.licence,
        "citation": data.citation,
        "distribution": data.distribution,
        "version": data.version,
        "wheel_sha256": data.wheel_sha256,
        "files": dict(data.files),
    }
