"""The one module that names private parts of Flower."""

from flwr.supercore.task_identity import TaskIdentity

__all__ = ["TaskIdentity"]
