"""Reads the replies of one round; whatever is wrong with one becomes a dropout.

A reply counts once, from a node that was asked, in this round. Nothing a client wrote is logged:
texts of errors, names of extra records and shapes are the client's and may carry its data.
"""

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from flwr.app import Message, MetricRecord
from numpy.typing import NDArray

from dpfl_flower import records
from dpfl_flower.client.errors import NodeErrorCode
from dpfl_flower.layout import ArrayLayout
from dpfl_flower.wire import (
    answered_arrays,
    answered_metrics,
    array_record,
    num_examples,
    read_array,
)

log = logging.getLogger("flwr.dpfl")


@dataclass(frozen=True)
class TrainReply:
    """One valid training reply.

    ``num_examples`` is what the client reports, NaN where it reports none: never a trusted number.
    """

    node_id: int
    arrays: Mapping[str, NDArray[np.generic]]
    num_examples: float
    metrics: MetricRecord


def accepted(
    replies: Iterable[Message], *, asked: Collection[int], group: str
) -> Iterator[Message]:
    """Yield each reply that carries content, from a node in ``asked``, once, of this ``group``."""
    waiting = set(asked)
    for reply in replies:
        node_id = reply.metadata.src_node_id
        if reply.metadata.group_id != group or node_id not in waiting:
            log.warning("A reply that nobody waits for was ignored (node %d)", node_id)
            continue
        waiting.discard(node_id)
        if reply.has_error():
            log.info(
                "NOT PRIVATE: node %d answered error code %s", node_id, _told(reply.error.code)
            )
            continue
        yield reply


def _told(code: int) -> str:
    """Return the code and, of one of ours, the sentence fixed for it; never the reply's own."""
    try:
        return f"{code}, {NodeErrorCode(code).reason}"
    except ValueError:
        return str(code)


def parse_train(reply: Message, layout: ArrayLayout) -> TrainReply | None:
    """Return the reply's arrays, checked against ``layout``, or None where they do not fit it."""
    try:
        arrays = answered_arrays(reply.content)
        layout.check(arrays)
        metrics = answered_metrics(reply.content)
        return TrainReply(
            node_id=reply.metadata.src_node_id,
            arrays=arrays,
            num_examples=num_examples(metrics),
            metrics=metrics,
        )
    except Exception as malformed:
        dropout(reply, malformed)
        return None


def parse_sum(reply: Message, *, width: int, bound: int) -> NDArray[np.int64] | None:
    """Return a node's integer sum, or None where it is not int64 of shape ``(width,)``.

    No entry may exceed ``bound``, so that sums of such parts cannot wrap around.
    """
    try:
        total = read_array(array_record(reply.content, records.INTEGER_SUM)[records.SUM])
        if total.dtype != np.int64 or total.shape != (width,):
            raise ValueError(f"expected int64 of shape {(width,)}")
        if total.min() < -bound or total.max() > bound:
            raise ValueError(f"expected entries within {bound}")
        return total.astype(np.int64, copy=False)
    except Exception as malformed:
        dropout(reply, malformed)
        return None


def dropout(reply: Message, malformed: Exception) -> None:
    """Log that a reply does not count, without a word of what it says."""
    log.warning(
        "NOT PRIVATE: a malformed reply of node %d counts as a dropout (%s)",
        reply.metadata.src_node_id,
        type(malformed).__name__,
    )
