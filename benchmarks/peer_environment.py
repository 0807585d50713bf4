"""A virtual environment of its own for a peer that cannot share ours, made once and kept."""

import hashlib
import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path


def peer_python(name: str, requirements: Sequence[str]) -> Path:
    """Return the interpreter of an environment that holds ``requirements``, making it if need be.

    It lies in the user's cache directory, under a name that follows from the requirements and the
    Python version. pip installs with whatever index it is configured for.
    """
    exact = "\n".join([sys.version, *requirements])
    digest = hashlib.sha256(exact.encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = cache / "dpfl-flower" / "peers" / f"{name}-{digest}"
    python, complete = folder / "bin" / "python", folder / "complete"
    if not complete.exists():
        print(f"Making an environment for {name} in {folder}", file=sys.stderr)
        venv.create(folder, clear=True, with_pip=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, *requirements], check=True)
        complete.touch()
    return python
