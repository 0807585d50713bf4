"""What runs at a shop: one bounded sum of its users' updates, and films for one of them."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from flwr.app import Context, Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from dpfl_flower import records
from dpfl_flower.client import NodeError, NodeErrorCode
from dpfl_flower.client.users import UserCohort, user_cohort_app
from dpfl_flower.layout import ArrayLayout
from dpfl_flower.wire import read_array

from .catalogue import Catalogue
from .data import Split, UserRatings
from .evaluation import HELD_OUT, SHOW_FILMS, HeldOutAnswer
from .shop import NodeConfig, Shop
from .task import BIAS, Recommendation, Settings, evaluate, local_update, new_model, recommend


def cohort_fn(context: Context) -> UserCohort:
    """Return the node's users, each a privacy unit, with the ratings they learn from."""
    settings = Settings.parse(context.run_config)
    splits = _splits(_frozen(context.node_config), settings.split_seed)
    return UserCohort({s.training.user: s.training for s in splits}, local_update=trained)


def trained(
    arrays: Mapping[str, NDArray[Any]], ratings: UserRatings
) -> dict[str, NDArray[np.float32]]:
    """Return the biases as one user would have them."""
    return {name: arrays[name] + move for name, move in local_update(arrays, ratings).items()}


app = user_cohort_app(cohort_fn)


@app.query(HELD_OUT)
def evaluate_held_out(message: Message, context: Context) -> Message:
    """Answer the squared errors on held-out ratings. NOT PRIVATE.

    A node whose config says ``share-held-out=false`` refuses.
    """
    if context.node_config.get("share-held-out", True) is not True:
        raise NodeError(NodeErrorCode.NOT_IMPLEMENTED, "share-held-out=false in the node config")
    settings = Settings.parse(context.run_config)
    shop = Shop.of(context.node_config)
    splits = _splits(_frozen(context.node_config), settings.split_seed)
    errors = evaluate(_model(message, shop.catalogue), splits)
    answer = HeldOutAnswer(errors, packaged=shop.packaged)
    reply = RecordDict({records.METRICS: MetricRecord({**answer.to_metrics()})})
    return Message(reply, reply_to=message)


@app.query(SHOW_FILMS)
def show_recommendations(message: Message, context: Context) -> Message:
    """Show films to the ``sample-user``, if it is one of this node's; the answer is empty.

    What is shown reflects that user's own ratings: it is printed here, for the user, and not sent.
    """
    user = Settings.parse(context.run_config).sample_user
    shop = Shop.of(context.node_config)
    model = _model(message, shop.catalogue)
    for ratings in shop.users:
        if ratings.user == user:
            best = recommend(model, ratings, shop.catalogue)
            print(recommendations_table(user, best), flush=True)
    return Message(RecordDict(), reply_to=message)


def recommendations_table(user: str, best: Sequence[Recommendation]) -> str:
    """Return the films as text, labelled as the user's own."""
    lines = [f"For user {user} only, from this user's own ratings, at this user's node:"]
    for number, one in enumerate(best, start=1):
        year = "" if one.film.year is None else f" ({one.film.year})"
        lines.append(f"{number:3}. {one.stars:.1f} stars  {one.film.title}{year}")
    return "\n".join(lines)


def _model(message: Message, catalogue: Catalogue) -> dict[str, NDArray[np.float32]]:
    arrays = {
        name: read_array(array)
        for name, array in message.content.array_records[records.ARRAYS].items()
    }
    ArrayLayout.of(new_model(catalogue)).check(arrays)
    return {BIAS: arrays[BIAS].astype(np.float32)}


def _frozen(node_config: NodeConfig) -> tuple[tuple[str, bool | float | int | str], ...]:
    return tuple(sorted(node_config.items()))


@lru_cache(maxsize=16)
def _splits(
    node_config: tuple[tuple[str, bool | float | int | str], ...], seed: int
) -> tuple[Split, ...]:
    # Flower unpickles the app for every message; the users stay in the process.
    return Shop.of(dict(node_config)).splits(seed=seed)
