"""What runs in a hospital, under either trust model.

Torch is imported where a message needs it: Flower starts a process for every message, and of five
stages of a masked sum one trains.
"""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from dpfl_flower.client import numpy_client_app

from . import distributed
from .settings import Settings, Trust

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train on this hospital's patients, with all of the noise or a share of it."""
    if _trust(context) is Trust.DISTRIBUTED:
        return distributed.app_for(context)(message, context)
    return _alone()(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Count held-out patients by score, NOT PRIVATE; say what the others have spent."""
    reply = _alone()(message, context)
    if _trust(context) is Trust.DISTRIBUTED:
        return distributed.with_claim(reply, context)
    return reply


def _trust(context: Context) -> Trust:
    return Settings.parse(context.run_config).trust


def _alone() -> ClientApp:
    from .hospital_client import client_fn  # noqa: PLC0415

    return numpy_client_app(client_fn)
