"""One round of secure aggregation of 1 M parameters: CPU of a node and of the server.

Theirs: Flower's own code, called as it is: ``secaggplus_mod`` for all four stages of one node, and
``SecAggPlusWorkflow``'s two stages that touch vectors at the server, on a grid that hands out
prepared replies. Ours: ``secure_aggregation_mod`` for all four stages of
one node, from weights to packed vector, and all stages of the server, records read and written. 20
nodes on the complete graph, and 100 nodes with 20 neighbours each; nobody drops out. The key and
share stages of all nodes are gone through beforehand; all masked vectors that Flower's server gets
are one node's, which costs it the same. And the masks alone: 20 for 1 M parameters in the words of
20 nodes, expanded and added. Interleaved in one run, one thread, CPU time.

Run it with ``python -m benchmarks.secagg``.
"""

import logging
import os
import time
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"  # numpy reads it when it is first imported

import numpy as np  # noqa: E402
from flwr.app import (  # noqa: E402
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.client.mod import secaggplus_mod  # noqa: E402
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters  # noqa: E402
from flwr.common.secure_aggregation.ndarrays_arithmetic import (  # noqa: E402
    parameters_addition,
    parameters_mod,
)
from flwr.common.secure_aggregation.secaggplus_constants import (  # noqa: E402
    RECORD_KEY_CONFIGS,
    RECORD_KEY_STATE,
    Key,
)
from flwr.common.secure_aggregation.secaggplus_constants import Stage as TheirStage  # noqa: E402
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen  # noqa: E402
from flwr.compat.common.recorddict_compat import fitres_to_recorddict  # noqa: E402
from flwr.server.workflow import SecAggPlusWorkflow  # noqa: E402
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD  # noqa: E402
from flwr.server.workflow.secure_aggregation.secaggplus_workflow import (  # noqa: E402
    WorkflowState,
)
from numpy.typing import NDArray  # noqa: E402

from benchmarks import compare  # noqa: E402
from dpfl_flower import records  # noqa: E402
from dpfl_flower._flower import acting_as  # noqa: E402
from dpfl_flower.client import secure_aggregation_mod  # noqa: E402
from dpfl_flower.client.contribution import UpdateRequest  # noqa: E402
from dpfl_flower.quantize import IntegerGrid  # noqa: E402
from dpfl_flower.rng import secure  # noqa: E402
from dpfl_flower.secagg import (  # noqa: E402
    SecAggPlus,
    SecureSum,
    Session,
    SumRequest,
    masked_grid,
)
from dpfl_flower.secagg.lanes import encoding_without_wrap  # noqa: E402
from dpfl_flower.secagg.masks import apply_masks  # noqa: E402
from dpfl_flower.secagg.modulus import bits_without_wrap  # noqa: E402
from dpfl_flower.secagg.terms import terms_of  # noqa: E402

DIMENSION = 1_000_000
CASES = ((20, None), (100, 20))
THRESHOLD = 2 / 3
RUN = 1
BAR = 0.1
REPEATS = 5
NODE_REPEATS = 41  # a node is done in 25 milliseconds, which other loads disturb more

Vector = NDArray[np.float32]


class Theirs:
    """Flower's SecAgg+: one node's four stages, and the server's two that touch vectors."""

    def __init__(self, nodes: int, neighbours: int | None, weights: Vector) -> None:
        self.ids = list(range(1, nodes + 1))
        shares = nodes if neighbours is None else neighbours + 1
        half = shares // 2
        self.peers = {
            n: {self.ids[(i + step) % nodes] for step in range(-half, half + 1)}
            for i, n in enumerate(self.ids)
        }
        self.workflow = SecAggPlusWorkflow(shares, round(THRESHOLD * shares), max_weight=1.0)
        self.setup = {
            Key.SAMPLE_NUMBER: nodes,
            Key.SHARE_NUMBER: shares,
            Key.THRESHOLD: self.workflow.reconstruction_threshold,
            Key.CLIPPING_RANGE: self.workflow.clipping_range,
            Key.TARGET_RANGE: self.workflow.quantization_range,
            Key.MOD_RANGE: self.workflow.modulus_range,
            Key.MAX_WEIGHT: self.workflow.max_weight,
        }
        self.fit = _fit(weights)
        self.contexts = {n: _context(n) for n in self.ids}
        self.keys = {n: self._ask(c, TheirStage.SETUP, self.setup) for n, c in self._all()}
        self.sealed: dict[int, list[tuple[int, bytes]]] = {n: [] for n in self.ids}
        for n, context in self._all():
            reply = self._ask(context, TheirStage.SHARE_KEYS, self._keys_for(n))
            found = reply[Key.DESTINATION_LIST], reply[Key.CIPHERTEXT_LIST]
            for receiver, sealed in zip(*found, strict=True):
                self.sealed[receiver].append((n, sealed))
        self.ready = ConfigRecord(dict(self.contexts[1].state.config_records[RECORD_KEY_STATE]))
        # One node's vector for all; the others go through the stage with a vector of one entry.
        small = _fit(np.zeros(1, np.float32))
        vector = self._mask(self.contexts[1], self.fit)
        for n in self.ids[1:]:
            self._mask(self.contexts[n], small)
        self.masked = dict.fromkeys(self.ids, vector)
        self.unmasked = {
            n: RecordDict({RECORD_KEY_CONFIGS: self._unmask(context)}) for n, context in self._all()
        }

    def node(self) -> None:
        """All four stages of one node, from weights to masked vector.

        Keys and shares are a new node's in the place of node 1, whose peers' shares then open.
        """
        fresh = _context(1)
        keys = self._ask(fresh, TheirStage.SETUP, self.setup)
        self._ask(fresh, TheirStage.SHARE_KEYS, self._keys_for(1, own=keys))
        context = self.contexts[1]
        context.state.config_records[RECORD_KEY_STATE] = ConfigRecord(dict(self.ready))
        self._mask(context, self.fit)
        self._unmask(context)

    def server(self) -> None:
        """Collect and unmask: the stages in which the server handles vectors."""
        state = WorkflowState(
            nid_to_proxies=dict.fromkeys(self.ids, SimpleNamespace()),
            nid_to_fitins={n: RecordDict() for n in self.ids},
            sampled_node_ids=set(self.ids),
            active_node_ids=set(self.ids),
            num_shares=self.setup[Key.SHARE_NUMBER],
            threshold=self.setup[Key.THRESHOLD],
            clipping_range=self.workflow.clipping_range,
            quantization_range=self.workflow.quantization_range,
            mod_range=self.workflow.modulus_range,
            max_weight=1.0,
            nid_to_neighbours={n: set(peers) for n, peers in self.peers.items()},
            forward_srcs={n: [s for s, _ in sealed] for n, sealed in self.sealed.items()},
            forward_ciphertexts={n: [c for _, c in sealed] for n, sealed in self.sealed.items()},
        )
        context = SimpleNamespace(
            state=RecordDict({MAIN_CONFIGS_RECORD: ConfigRecord({"current_round": 1})}),
            strategy=SimpleNamespace(aggregate_fit=lambda *_: (None, {})),
        )
        with np.errstate(all="ignore"):
            assert self.workflow.collect_masked_vectors_stage(_Grid(self.masked), context, state)
            assert self.workflow.unmask_stage(_Grid(self.unmasked), context, state)

    def _all(self) -> Iterable[tuple[int, Context]]:
        return self.contexts.items()

    def _ask(
        self, context: Context, stage: str, fields: Mapping[str, Any], fit: FitRes | None = None
    ) -> ConfigRecord:
        record = ConfigRecord({**fields, Key.STAGE: stage})
        message = Message(RecordDict({RECORD_KEY_CONFIGS: record}), context.node_id, "train")

        def train(message: Message, context: Context) -> Message:
            return Message(fitres_to_recorddict(fit, True), reply_to=message)

        reply = secaggplus_mod(message, context, train)
        self.last = reply.content
        return reply.content.config_records[RECORD_KEY_CONFIGS]

    def _keys_for(self, n: int, own: ConfigRecord | None = None) -> dict[str, list[bytes]]:
        keys = {**self.keys, n: own or self.keys[n]}
        return {
            str(p): [keys[p][Key.PUBLIC_KEY_1], keys[p][Key.PUBLIC_KEY_2]] for p in self.peers[n]
        }

    def _mask(self, context: Context, fit: FitRes) -> RecordDict:
        sealed = self.sealed[context.node_id]
        fields = {
            Key.CIPHERTEXT_LIST: [c for _, c in sealed],
            Key.SOURCE_LIST: [s for s, _ in sealed],
        }
        self._ask(context, TheirStage.COLLECT_MASKED_VECTORS, fields, fit)
        return self.last

    def _unmask(self, context: Context) -> ConfigRecord:
        active = list(self.peers[context.node_id])
        fields = {Key.ACTIVE_NODE_ID_LIST: active, Key.DEAD_NODE_ID_LIST: []}
        return self._ask(context, TheirStage.UNMASK, fields)


class _Grid:
    """Hands out prepared replies."""

    def __init__(self, contents: Mapping[int, RecordDict]) -> None:
        self._contents = contents

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        replies = []
        for message in messages:
            n = message.metadata.dst_node_id
            with acting_as(n, run_id=RUN):
                replies.append(Message(RecordDict(dict(self._contents[n])), reply_to=message))
        return replies


def _context(n: int) -> Context:
    return Context(RUN, n, {}, RecordDict(), {})


def _fit(weights: Vector) -> FitRes:
    return FitRes(Status(Code.OK, ""), ndarrays_to_parameters([weights]), 1, {})


class Ours:
    """All stages of one node, and all stages of the server."""

    def __init__(self, nodes: int, neighbours: int | None, weights: Vector) -> None:
        grid = _grid(nodes, weights.size)
        self.largest = largest = grid.sensitivity_units
        self.encoding = encoding_without_wrap(largest, nodes, grid.width)
        self.task = RecordDict(
            {
                records.ARRAYS: ArrayRecord({"w": Array(np.zeros_like(weights))}),
                records.UPDATE: UpdateRequest(
                    grid=grid, clip_norm=1.0, largest=largest, parties=nodes
                ).to_config(),
            }
        )
        self.answer = RecordDict(
            {
                records.ARRAYS: ArrayRecord({"w": Array(weights)}),
                records.METRICS: MetricRecord({records.NUM_EXAMPLES: 1}),
            }
        )
        self.request = SumRequest(
            session=Session(RUN, 1, terms_of(self.task)),
            nodes=tuple(range(1, nodes + 1)),
            width=grid.width,
            bits=self.encoding.bits,
            lanes=self.encoding.lanes,
            seconds=3600.0,
            largest=largest,
        )
        self.protocol = SecAggPlus(threshold=THRESHOLD, neighbours=neighbours)
        self.requests: dict[str, Mapping[int, RecordDict]] = {}
        self.before: dict[str, Mapping[str, Any]] = {}
        self.replies: dict[str, Mapping[int, RecordDict]] = {}
        self.rehearse()

    def rehearse(self) -> None:
        """Go through a round, keeping what was said."""
        contexts = {n: _context(n) for n in self.request.nodes}
        exchange: Any = self.protocol.begin(self.request)
        self.stages = []
        while not isinstance(exchange, SecureSum):
            self.stages.append(exchange)
            requests = self.requests[exchange.stage] = {
                n: RecordDict({**content, **(self.task if exchange.carries_task else {})})
                for n, content in exchange.requests.items()
            }
            self.before[exchange.stage] = dict(contexts[1].state)
            replies = {n: self.ask(contexts[n], content) for n, content in requests.items()}
            self.replies[exchange.stage] = replies
            exchange = exchange.receive(replies)

    def ask(self, context: Context, content: RecordDict) -> RecordDict:
        """Answer a request as a ClientApp with the mod around its train function does."""
        message = Message(content, context.node_id, "train")

        def train(message: Message, context: Context) -> Message:
            return Message(self.answer, reply_to=message)

        reply = secure_aggregation_mod(message, context, train)
        assert not reply.has_error(), reply.error
        return reply.content

    def node(self) -> None:
        """All stages of one node, from weights to packed vector."""
        context = _context(1)
        for stage, requests in self.requests.items():
            context.state = RecordDict(dict(self.before[stage]))
            self.ask(context, requests[1])

    def server(self) -> None:
        """All stages of the server, from terms to sum, requests written and replies read."""
        terms_of(self.task)
        for exchange in self.stages:
            _ = exchange.requests
            exchange.receive(self.replies[exchange.stage])

    @property
    def sent(self) -> tuple[int, int]:
        """Bytes of node 1's packed vector, and of all else that it sends."""
        vector = rest = 0
        for replies in self.replies.values():
            for record in replies[1].values():
                if isinstance(record, ArrayRecord):
                    vector += sum(len(array.data) for array in record.values())
                else:
                    rest += len(record.deflate())
        return vector, rest


def _grid(nodes: int, dimension: int) -> IntegerGrid:
    """Return the grid that a strategy's noise of one clip norm has under masks."""
    return masked_grid(
        lambda least: IntegerGrid.for_noise_multiplier(1.0, dimension, least_noise_units=least),
        parties=nodes,
    )


def masks_alone() -> float:
    """Print the table for 20 masks of one vector, and return the ratio."""
    keys = [secure().random_bytes(32) for _ in range(20)]
    grid = _grid(20, DIMENSION)
    encoding = encoding_without_wrap(grid.sensitivity_units, 20, DIMENSION)

    def ours() -> None:
        apply_masks(encoding.zeros(DIMENSION), add=keys)

    def theirs() -> None:
        vector = [np.zeros(DIMENSION, np.int64)]
        for key in keys:
            mask = pseudo_rand_gen(key, 1 << 32, [(DIMENSION,)])
            vector = parameters_addition(vector, mask)
        parameters_mod(vector, 1 << 32)

    timings = compare.compare(
        {"dpfl-flower": ours, "Flower SecAgg+": theirs}, repeats=REPEATS, clock=time.process_time
    )
    ratio = compare.report(
        timings,
        ours="dpfl-flower",
        theirs="Flower SecAgg+",
        bar=BAR,
        title=f"20 masks for {DIMENSION:,} parameters",
    )
    print()
    return ratio


def main() -> None:
    """Print, for each case, what a node sends, two tables of times and two ratios."""
    compare.one_thread()
    weights = np.float32(1e-3) * np.random.default_rng(0).standard_normal(DIMENSION, np.float32)
    ratios = [("20 masks", 20, masks_alone())]
    for nodes, neighbours in CASES:
        ours = Ours(nodes, neighbours, weights)
        theirs = Theirs(nodes, neighbours, weights)
        graph = "complete graph" if neighbours is None else f"{neighbours} neighbours each"
        vector, rest = ours.sent
        bits = ours.encoding.bits
        plain = bits_without_wrap(ours.largest, nodes) // 8  # whole bytes in which no sum wraps
        print(f"{nodes} nodes, {graph}: a node sends a masked vector of {vector:,} bytes")
        print(
            f"  ({vector / (DIMENSION * plain):.4f} x {DIMENSION:,} entries of {plain} bytes, "
            f"{8 * vector / (DIMENSION * bits):.4f} x of {bits} bits), {rest:,} else"
        )
        for who, repeats in (("node", NODE_REPEATS), ("server", REPEATS)):
            timings = compare.compare(
                {
                    "dpfl-flower": getattr(ours, who),
                    "Flower SecAgg+": getattr(theirs, who),
                },
                repeats=repeats,
                warmups=1,
                clock=time.process_time,
            )
            print()
            ratio = compare.report(
                timings,
                ours="dpfl-flower",
                theirs="Flower SecAgg+",
                bar=BAR,
                title=f"{who}, one round, {nodes} nodes, {graph}, {DIMENSION:,} parameters",
            )
            ratios.append((who, nodes, ratio))
        print()
        del ours, theirs
    for who, nodes, ratio in ratios:
        print(f"{who}, {nodes} nodes:")
        compare.print_ratio(ratio, bar=BAR)


if __name__ == "__main__":
    logging.getLogger("flwr").setLevel(logging.ERROR)
    with acting_as(1, run_id=RUN):
        main()
