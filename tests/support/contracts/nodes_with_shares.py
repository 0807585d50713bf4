"""Puts distributed noise behind each node, so that its strategy obeys the contracts of others.

The contracts speak to nodes that answer weights. Here those weights are what a node's app answers
behind the library's own mods: the node bounds its update, adds its share of the noise, masks, and
takes part in every exchange of secure aggregation. The node is the unit.
"""

import secrets
from collections.abc import Iterable
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from dpfl_flower._flower import Run
from dpfl_flower.accounting import Composed, PrivacyBudget, epsilon
from dpfl_flower.client import noise_share_mod, secure_aggregation_mod
from dpfl_flower.clipping import FixedClipping
from dpfl_flower.distributed import design
from dpfl_flower.secagg import SecAggPlus
from dpfl_flower.simulation.local_grid import answer
from dpfl_strategies import DistributedDPFedAvg
from tests.support.contracts.strategy import DELTA, StrategySubject
from tests.support.recording_grid import RecordingGrid
from tests.support.scripted_grid import ScriptedGrid

RELATION = "zero-out"
PLANNED_ROUNDS = 5


class NodesWithShares(Grid):
    """Turns the apps behind ``grid``'s nodes into nodes that add a share and mask.

    An app that answers nothing, or an error, costs its node the round. Of several answers the first
    counts: an app returns once.

    Attributes
    ----------
    late : set of int
        Nodes that answer nothing in time, from the first message of a round on.
    """

    def __init__(self, grid: RecordingGrid, *, min_cohort: int) -> None:
        self._grid = grid
        self._run = Run.create_empty(run_id=1 + secrets.randbelow(2**62))
        share = noise_share_mod(dataset="contract", delta=DELTA)
        self._app = ClientApp(mods=[secure_aggregation_mod, share])
        self._app.train()(self._train)
        self._contexts: dict[int, Context] = {}
        self._min_cohort = min_cohort
        self.late: set[int] = set()
        if isinstance(grid, ScriptedGrid):
            self._inner, grid.script = grid.script, self._answer
        else:
            self._inner, grid.client = grid.client, self._answer

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        return self._run

    def create_message(self, content, message_type, dst_node_id, group_id, ttl=None):
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self):
        return self._grid.get_node_ids()

    def push_messages(self, messages):
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids):
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None):
        return self._grid.send_and_receive(messages, timeout=timeout)

    def _answer(self, message: Message) -> RecordDict | Error | None:
        node = message.metadata.dst_node_id
        if node in self.late:
            return None
        context = self._contexts.get(node) or self._new_context(node)
        # Messages of one round share their records, which a node may write over.
        copied = Message(
            RecordDict(dict(message.content)),
            node,
            message.metadata.message_type,
            group_id=message.metadata.group_id,
        )
        reply, self._contexts[node] = answer(self._app, copied, context, run_id=self._run.run_id)
        return reply.error if reply.has_error() else reply.content

    def _new_context(self, node: int) -> Context:
        return Context(
            run_id=self._run.run_id,
            node_id=node,
            node_config={"secagg-min-cohort": self._min_cohort},
            state=RecordDict(),
            run_config={},
        )

    def _train(self, message: Message, context: Context) -> Message:
        del context
        answered = self._inner(message)
        if isinstance(answered, list):
            answered = answered[0]
        if not isinstance(answered, RecordDict):
            raise RuntimeError(answered.reason if isinstance(answered, Error) else "no answer")
        return Message(answered, reply_to=message)


class WithShares:
    """The strategy, started on a grid whose nodes add shares of the noise."""

    def __init__(self, strategy: DistributedDPFedAvg, *, min_cohort: int, clip_norm: float) -> None:
        self._strategy = strategy
        self._min_cohort = min_cohort
        self.clip_norm = clip_norm

    def start(self, grid: RecordingGrid, *arguments: Any, **settings: Any) -> Any:
        nodes = NodesWithShares(grid, min_cohort=self._min_cohort)
        return self.start_on(nodes, *arguments, **settings)

    def start_on(self, nodes: NodesWithShares, *arguments: Any, **settings: Any) -> Any:
        """Start on nodes that the test goes on holding."""
        return self._strategy.start(nodes, *arguments, **settings)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._strategy, name)


class DistributedSubject(StrategySubject):
    """`DistributedDPFedAvg`, as the contracts get at a strategy.

    Attributes
    ----------
    bits : int
        Of the modulus. With few, the noise is narrow in grid units and its tables are cheap.
    spare : int
        How many nodes may drop out of a round. Noise is planned for the others.
    """

    bits = 20
    spare = 0
    share_noise = "discrete-gaussian"

    def strategy(self, **settings: Any) -> WithShares:
        nodes = settings["sampling"].population
        min_cohort = nodes - self.spare
        settings = {"unit": "node", "relation": RELATION, "delta": DELTA} | settings
        if settings.get("budget") is not None:
            del settings["unit"], settings["relation"], settings["delta"]
        strategy = DistributedDPFedAvg(
            clipping=FixedClipping(self.clip_norm),
            num_nodes=nodes,
            secure_aggregation=SecAggPlus(min_cohort=min_cohort, threshold=0.51),
            bits=self.bits,
            noise=self.share_noise,
            **settings,
        )
        return WithShares(strategy, min_cohort=min_cohort, clip_norm=self.clip_norm)

    def planned_rounds(self, rounds: int) -> int:
        """Nodes' ledgers plan for the number of rounds, which a resumed run may not change."""
        return max(rounds, PLANNED_ROUNDS)

    def budget_for(self, releases: int, *, nodes: int, dimension: int) -> PrivacyBudget:
        """Return what so many releases cost at noise multiplier 1, and a hair more."""
        plan = design(
            noise_multiplier=1.0,
            unit="node",
            relation=RELATION,
            rounds=1,
            dimension=dimension,
            clip_norm=self.clip_norm,
            num_nodes=nodes,
            min_survivors=nodes - self.spare,
            max_units=nodes,
            bits=self.bits,
            noise=self.share_noise,
        )
        spent = epsilon([Composed(plan.event, releases)], delta=DELTA, relation=RELATION)
        return PrivacyBudget(spent * 1.0001, DELTA, "node", RELATION)
