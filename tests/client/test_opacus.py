"""Importing the clients leaves the logging of the whole process alone."""

import subprocess
import sys

import pytest

SCRIPT = """
import logging
root = logging.getLogger()
own = logging.NullHandler()
if {configured}:
    root.addHandler(own)
    root.setLevel(logging.ERROR)
before = (root.level, list(root.handlers))
import dpfl_flower.client
import sys
assert "opacus" not in sys.modules, "it takes seconds, and most models do without it"
import dpfl_flower.client._opacus
assert "opacus.utils.module_utils" in sys.modules
assert (root.level, root.handlers) == before, (root.level, root.handlers)
"""


@pytest.mark.parametrize("configured", [False, True])
def test_the_root_logger_is_as_it_was(configured):
    script = SCRIPT.format(configured=configured)
    subprocess.run([sys.executable, "-c", script], check=True)
