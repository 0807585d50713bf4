"""The server's step: 50 replies of 1 M parameters, from messages to the noisy mean.

Theirs: Flower's ``DifferentialPrivacyServerSideFixedClipping`` around ``FedAvg``, its real
``aggregate_train`` on real messages. Ours, on the same messages: read the arrays, subtract the
global model, clip, round to integers, check the bound in integers, sum exactly, add the rounded
Gaussian, convert to a float mean. A cohort of 50 is rounded to the nearest integer; the public
dither of large cohorts is timed beside it. One thread, taking turns.

Run it with ``python -m benchmarks.server_step``.
"""

import logging
import os
import time
import tracemalloc

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"  # numpy reads it when it is first imported

import numpy as np  # noqa: E402
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict  # noqa: E402
from flwr.serverapp.strategy import (  # noqa: E402
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
)
from numpy.typing import NDArray  # noqa: E402

from benchmarks import compare  # noqa: E402
from dpfl_flower import records  # noqa: E402
from dpfl_flower._flower import TaskIdentity  # noqa: E402
from dpfl_flower.noise import RoundedGaussian  # noqa: E402
from dpfl_flower.quantize import BoundedSum, IntegerGrid, Rounding, to_float  # noqa: E402
from dpfl_flower.rng import secure  # noqa: E402
from dpfl_flower.wire import read_array  # noqa: E402

DIMENSION = 1_000_000
UPDATES = 50
NOISE_MULTIPLIER = 1.0
CLIP_NORM = 1.0
BAR = 0.40

Vector = NDArray[np.float32]


def replies(updates: list[Vector]) -> list[Message]:
    """Return one reply message for each update, as a ClientApp would send it."""
    asked = Message(RecordDict(), dst_node_id=1, message_type="train")
    return [
        Message(
            RecordDict(
                {
                    records.ARRAYS: ArrayRecord({"weight": Array(update)}),
                    records.METRICS: MetricRecord({records.NUM_EXAMPLES: 1}),
                }
            ),
            reply_to=asked,
        )
        for update in updates
    ]


def flower_step(model: Vector, messages: list[Message]) -> ArrayRecord | None:
    """Aggregate with Flower's wrapper, which puts new records into the messages it is given."""
    strategy = DifferentialPrivacyServerSideFixedClipping(
        FedAvg(),
        noise_multiplier=NOISE_MULTIPLIER,
        clipping_norm=CLIP_NORM,
        num_sampled_clients=len(messages),
    )
    strategy.current_arrays = ArrayRecord({"weight": Array(model)})
    copies = [Message(RecordDict(dict(m.content)), reply_to=_ASKED) for m in messages]
    return strategy.aggregate_train(1, copies)[0]


def our_step(
    model: Vector, messages: list[Message], *, rounding: Rounding = Rounding.DITHERED
) -> NDArray[np.float64]:
    """Read, bound, sum, noise and convert."""
    grid = IntegerGrid.for_noise_multiplier(NOISE_MULTIPLIER, model.size, rounding=rounding)
    seed = secure().random_bytes(16) if rounding is Rounding.DITHERED else None
    bounded = BoundedSum(grid, clip_norm=CLIP_NORM, dither_seed=seed)
    for message in messages:
        record = message.content.array_records[records.ARRAYS]
        bounded.add([read_array(array) for array in record.values()], [model])
    noisy = bounded.total
    noisy += RoundedGaussian(grid.noise_units).sample(noisy.size, secure())
    return to_float(noisy, grid.unit_size(CLIP_NORM), len(messages))


def peak_in_models(model: Vector, messages: list[Message]) -> float:
    """Return the most memory that our step holds at once, in float32 models."""
    tracemalloc.start()  # numpy reports its arrays to it
    our_step(model, messages)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / model.nbytes


def main() -> None:
    """Print the table of memory, the table of times and the ratio."""
    compare.one_thread()
    rng = np.random.default_rng(0)
    model = rng.standard_normal(DIMENSION, dtype=np.float32)
    updates = [
        model + np.float32(0.01) * rng.standard_normal(DIMENSION, dtype=np.float32)
        for _ in range(UPDATES)
    ]
    messages = replies(updates)
    del updates
    RoundedGaussian(IntegerGrid.for_noise_multiplier(NOISE_MULTIPLIER, 1).noise_units).sample(
        1, secure()
    )  # the table is built once per process

    memory = [
        [str(cohort), f"{peak_in_models(model, messages[:cohort]):.2f}"] for cohort in (10, UPDATES)
    ]
    timings = compare.compare(
        {
            "dpfl-flower, dithered": lambda: our_step(model, messages),
            "dpfl-flower, nearest": lambda: our_step(model, messages, rounding=Rounding.NEAREST),
            "Flower": lambda: flower_step(model, messages),
        },
        repeats=15,
        clock=time.process_time,  # one thread: CPU time, which other loads disturb least
    )
    compare.print_table(["cohort", "our peak memory (float32 models)"], memory)
    print()
    compare.report(
        timings,
        ours="dpfl-flower, nearest",
        theirs="Flower",
        bar=BAR,
        title=f"server step, CPU time, {UPDATES} x {DIMENSION:,} parameters, noise included",
    )


if __name__ == "__main__":
    logging.getLogger("flwr").setLevel(logging.WARNING)
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    _ASKED = Message(RecordDict(), dst_node_id=1, message_type="train")
    main()
