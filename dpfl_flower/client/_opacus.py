"""What is used of Opacus, imported without what the import does to everybody's logging.

``opacus.utils.module_utils`` calls ``logging.basicConfig``: every line of a logger that has its own
handler, such as Flower's, would be written twice.
"""

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def _unchanged_root_logger() -> Iterator[None]:
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    try:
        yield
    finally:
        root.setLevel(level)
        for handler in list(root.handlers):
            if handler not in handlers:
                root.removeHandler(handler)


with _unchanged_root_logger():
    from opacus.grad_sample import (
        GradSampleModule,
        GradSampleModuleFastGradientClipping,
    )
    from opacus.validators import ModuleValidator

__all__ = [
    "GradSampleModule",
    "GradSampleModuleFastGradientClipping",
    "ModuleValidator",
]
