"""ClientApps that worker processes can import."""

import logging
import os
import signal
import sys
import time

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()
log = logging.getLogger("flwr.tests")


@app.train()
def train(message: Message, context: Context) -> Message:
    """Move towards the node's number, and do what the node's config says."""
    calls = int(context.state.metric_records.get("calls", MetricRecord({"n": 0}))["n"]) + 1
    context.state["calls"] = MetricRecord({"n": calls})
    number = int(context.node_config["partition-id"])
    arrays = {name: array.numpy() for name, array in message.content["arrays"].items()}
    message.content["arrays"] = ArrayRecord()
    on = int(context.node_config.get("from-call", 1))
    mode = str(context.node_config.get("mode", "")) if calls >= on else ""
    if mode == "raises":
        raise RuntimeError("planted")
    if mode == "dies":
        if os.fork() == 0:  # a child that outlives the worker, with the worker's sockets
            time.sleep(3)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "sleeps":
        time.sleep(600)
    if mode == "unpicklable":
        reply = Message(RecordDict(), reply_to=message)
        reply.__dict__["lock"] = sys._getframe()
        return reply
    if mode == "talks":
        log.warning("node %d says", number)
        try:
            raise KeyError("detail")
        except KeyError:
            logging.getLogger("dpfl_flower.node").exception("node %d fails", number)
        print("node", number, "prints")
    moved = {
        name: Array(array + (number + 1 - array) / 8 if array.dtype.kind == "f" else array)
        for name, array in arrays.items()
    }
    numbers = {
        "num-examples": 1,
        "calls": calls,
        "partition": number,
        "setting": int(context.run_config["setting"]),
        "pid": os.getpid(),
        "threads": sys.modules["torch"].get_num_threads() if "torch" in sys.modules else 0,
    }
    content = {"arrays": ArrayRecord(moved), "metrics": MetricRecord(numbers)}
    return Message(RecordDict(content), reply_to=message)


def load() -> ClientApp:
    return app


def load_with_torch() -> ClientApp:
    import torch  # noqa: F401 - most tests need none, and it takes long

    return app


def cannot_load() -> ClientApp:
    raise ImportError("there is no such client")


def dies_loading() -> ClientApp:
    os._exit(3)


def zeros(size: int) -> ArrayRecord:
    return ArrayRecord({"a": Array(np.zeros(size, np.float32)), "n": Array(np.array(3))})
