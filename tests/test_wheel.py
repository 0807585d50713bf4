"""What a user installs holds both packages, and nothing of the source tree is needed."""

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

CHECK = """
import importlib.resources, pathlib, sys
import dpfl_flower, dpfl_strategies
from dpfl_strategies import DPFedAvg
for package in (dpfl_flower, dpfl_strategies):
    assert pathlib.Path(package.__file__).is_relative_to(sys.prefix), package.__file__
    assert (importlib.resources.files(package) / "py.typed").is_file()
    missing = [name for name in package.__all__ if not hasattr(package, name)]
    assert not missing, missing
print("imported", DPFedAvg.__name__)
"""


def run(*command, cwd):
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_the_wheel_installs_into_a_clean_environment_and_both_packages_import(tmp_path):
    run(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, ROOT, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert tops == {"dpfl_flower", "dpfl_strategies", wheel.name.split("-py3")[0] + ".dist-info"}
    venv.create(tmp_path / "clean", with_pip=True)
    python = tmp_path / "clean" / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    # The dependencies are those of this environment; its editable install of us is not reached,
    # because a path that a .pth file names has no .pth files of its own.
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path)
    (Path(site.strip()) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    assert "imported DPFedAvg" in run(python, "-c", CHECK, cwd=tmp_path)
    assert "Usage" in run(tmp_path / "clean" / "bin" / "dpfl", "--help", cwd=tmp_path)
