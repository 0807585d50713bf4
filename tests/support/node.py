"""What a SuperNode does around a ClientApp: contexts in, messages in, bytes out."""

from flwr.app import Context, Message, RecordDict

from dpfl_flower._flower import TaskIdentity


def context(*, run_id=5, node_id=42, **node_config):
    """A context whose node config is given with underscores for dashes."""
    config = {key.replace("_", "-"): value for key, value in node_config.items()}
    return Context(
        run_id=run_id, node_id=node_id, node_config=config, state=RecordDict(), run_config={}
    )


def message(kind, content, *, node_id=42):
    """A message as a node receives it."""
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 5, 1, 1
    return Message(content, dst_node_id=node_id, message_type=kind)


def all_bytes(reply):
    """Every byte that a SuperNode would push for ``reply``."""
    parts = []
    waiting = [reply]
    while waiting:
        thing = waiting.pop()
        parts.append(thing.deflate())
        waiting += (thing.children or {}).values()
    return b"".join(parts)
