"""What goes wrong with a data set.

>>> issubclass(DatasetError, RuntimeError)
True
"""


class DatasetError(RuntimeError):
    """A data set cannot be had; the message names it, what was expected and how to proceed."""
