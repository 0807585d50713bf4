"""What runs in a district: one bounded sum of its units' updates, and NOT PRIVATE measurements."""

from functools import lru_cache

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from dpfl_flower import records
from dpfl_flower.client import NodeError, NodeErrorCode
from dpfl_flower.client.users import LocalTraining, UserCohort, user_cohort_app
from dpfl_flower.layout import ArrayLayout
from dpfl_flower.wire import read_array

from .counts import hour_of
from .data import HOURS
from .district import District
from .evaluation import HELD_OUT, SENSOR_WEEK, HeldOutAnswer, SensorWeek
from .features import FEATURES, Rows
from .task import Settings, evaluate, forecast, loss, new_model, tensors

_WEEK = HOURS // 2

_Frozen = tuple[tuple[str, bool | float | int | str], ...]


def cohort_fn(context: Context) -> UserCohort:
    """Return the node's sensor-fortnights, each a privacy unit; some may have no rows."""
    training = Settings.parse(context.run_config).training
    return UserCohort(
        {unit.key: tensors(unit.rows) for unit in District.of(context.node_config).units},
        model_fn=new_model,
        training=LocalTraining(
            lr=training.learning_rate,
            epochs=training.epochs,
            batch_size=training.batch_size,
            loss_fn=loss,
            shuffle=False,  # a batch holds all rows
        ),
        example=(np.zeros(len(FEATURES), np.float32), np.zeros(2, np.float32)),
        device="cpu",  # a few thousand numbers
    )


app = user_cohort_app(cohort_fn)


@app.query(HELD_OUT)
def evaluate_held_out(message: Message, context: Context) -> Message:
    """Answer the absolute errors on held-out hours. NOT PRIVATE.

    A node whose config says ``share-held-out=false`` refuses.
    """
    held_out = _shared(context)
    errors = evaluate(_model(message), held_out.values())
    answer = HeldOutAnswer(errors, packaged=District.of(context.node_config).packaged)
    reply = RecordDict({records.METRICS: MetricRecord({**answer.to_metrics()})})
    return Message(reply, reply_to=message)


@app.query(SENSOR_WEEK)
def week_of_a_sensor(message: Message, context: Context) -> Message:
    """Answer the week to draw, counted and forecast, if its sensor is here. NOT PRIVATE."""
    settings = Settings.parse(context.run_config)
    rows = _shared(context).get(settings.figure_sensor)
    reply = RecordDict()
    if rows is not None:
        expected = forecast(_model(message), rows)
        start = first_hour(settings)
        shown = (rows.hours >= start) & (rows.hours < start + _WEEK)
        week = SensorWeek(rows.hours[shown], rows.counts[shown], expected[shown])
        reply[records.ARRAYS] = week.to_record()
    return Message(reply, reply_to=message)


def first_hour(settings: Settings) -> int:
    """Return the number of the first hour of the week to draw."""
    day = settings.figure_day
    return hour_of(day.year, day.month, day.day, 0)


def _shared(context: Context) -> dict[str, Rows]:
    if context.node_config.get("share-held-out", True) is not True:
        raise NodeError(NodeErrorCode.NOT_IMPLEMENTED, "share-held-out=false in the node config")
    return _held_out(tuple(sorted(context.node_config.items())))


@lru_cache(maxsize=8)
def _held_out(node_config: _Frozen) -> dict[str, Rows]:
    # Flower unpickles the app for every message; what was computed stays in the process.
    return District.of(dict(node_config)).held_out


def _model(message: Message) -> dict[str, NDArray[np.float32]]:
    record: ArrayRecord = message.content.array_records[records.ARRAYS]
    arrays = {name: read_array(array) for name, array in record.items()}
    ArrayLayout.of(new_model().state_dict()).check(arrays)
    return {name: array.astype(np.float32) for name, array in arrays.items()}
