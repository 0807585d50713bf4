"""What a node agrees to, whatever the app it was sent asks for.

Whoever runs a node writes it into the node's config, for example
``flower-supernode --node-config "max-epsilon=3.0 max-delta=1e-5 ledger-path='/srv/ledger.jsonl'"``.

>>> policy = NodePolicy.from_node_config({"min-noise-multiplier": 0.8})
>>> policy.check(noise_multiplier=0.5, epsilon=1.0)
Traceback (most recent call last):
    ...
dpfl_flower.client.errors.NodeError: noise_multiplier=0.5 must be >= 0.8, this node's policy
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from dpfl_flower import checks, records
from dpfl_flower.accounting import Event, Ledger
from dpfl_flower.accounting.charges import priced
from dpfl_flower.client.errors import NodeError, NodeErrorCode


@dataclass(frozen=True, kw_only=True)
class NodePolicy:
    """The least noise and the most epsilon that a node trains with.

    Parameters
    ----------
    min_noise_multiplier : float, optional
        The node refuses to train with less noise.
    max_epsilon : float, optional
        The node refuses a round after which its data set would have spent more, over all runs in
        its ledger, at the delta and under the relation of that ledger; and every round without a
        ledger that ``ledger-path`` names, in its own config: any other could start from zero in
        each run.
    max_delta : float, optional
        The largest delta of a ledger at which ``max_epsilon`` means anything to the node: the two
        are given together.
    allow_device_noise : bool
        Whether noise may be drawn on the node's accelerator, which is not cryptographic: see
        `NoiseSource`. Unless the node says so, it may not.

    Raises
    ------
    ValueError
        If a bound is not a finite number, the noise >= 0, the epsilon > 0 and the delta between 0
        and 1; if only one of ``max_epsilon`` and ``max_delta`` is given.
    """

    min_noise_multiplier: float | None = None
    max_epsilon: float | None = None
    max_delta: float | None = None
    allow_device_noise: bool = False

    def __post_init__(self) -> None:
        if self.min_noise_multiplier is not None:
            checks.non_negative(min_noise_multiplier=self.min_noise_multiplier)
        if self.max_epsilon is not None:
            checks.positive(max_epsilon=self.max_epsilon)
        if self.max_delta is not None:
            checks.probability(max_delta=self.max_delta)
        if (self.max_epsilon is None) != (self.max_delta is None):
            raise ValueError(
                f"{records.MAX_EPSILON}={self.max_epsilon!r} and "
                f"{records.MAX_DELTA}={self.max_delta!r} must be given together: an epsilon bounds "
                "nothing at a delta that the app chooses"
            )

    @classmethod
    def from_node_config(cls, node_config: Mapping[str, object]) -> Self:
        """Read ``min-noise-multiplier``, ``max-epsilon``, ``max-delta``, ``allow-device-noise``.

        A missing key is no bound; the second and third are given together. The last is a boolean,
        and False where it is missing.
        """
        return cls(
            min_noise_multiplier=_number(node_config, records.MIN_NOISE_MULTIPLIER),
            max_epsilon=_number(node_config, records.MAX_EPSILON),
            max_delta=_number(node_config, records.MAX_DELTA),
            allow_device_noise=_boolean(node_config, records.ALLOW_DEVICE_NOISE),
        )

    def check_release(
        self,
        ledger: Ledger,
        event: Event,
        *,
        noise_multiplier: float,
        total_variation: float,
        chosen_by_node: bool,
        cryptographic: bool = True,
    ) -> None:
        """Raise NodeError, POLICY_REFUSED, unless ``event`` may be charged to ``ledger`` next.

        Parameters
        ----------
        ledger : Ledger
            With all that was charged before.
        event : Event
        noise_multiplier : float
        total_variation : float
            Of the event's noise from its exact law.
        chosen_by_node : bool
            Whether the node's own config names the ledger.
        cryptographic : bool
        """
        spent_after = 0.0
        if self.max_epsilon is not None:
            spent_after = priced(
                (*ledger.events(), event),
                ledger.delta,
                ledger.relation,
                ledger.total_variation + total_variation,
            )
        self.check(
            noise_multiplier=noise_multiplier,
            epsilon=spent_after,
            delta=ledger.delta,
            durable=ledger.durable and chosen_by_node,
            cryptographic=cryptographic,
        )

    def check(
        self,
        *,
        noise_multiplier: float,
        epsilon: float,
        delta: float = 1.0,
        durable: bool = False,
        cryptographic: bool = True,
    ) -> None:
        """Raise unless this node trains with ``noise_multiplier``, up to ``epsilon`` in all.

        ``delta`` is that of the ledger that the epsilon was read from, ``durable`` whether the node
        chose that ledger and it outlives the run; without them nothing is within ``max_epsilon``.
        ``cryptographic`` is False for noise that is drawn on a device.

        Raises
        ------
        NodeError
            With the code POLICY_REFUSED.
        """
        if not (cryptographic or self.allow_device_noise):
            raise _refused(
                "noise that is drawn on the device is not cryptographic: it needs "
                f"{records.ALLOW_DEVICE_NOISE}=true in the node config"
            )
        least = self.min_noise_multiplier
        if least is not None and not noise_multiplier >= least:
            raise _refused(f"noise_multiplier={noise_multiplier!r} must be >= {least!r}")
        most = self.max_epsilon
        if most is None or self.max_delta is None:
            return
        if not durable:
            raise _refused(
                f"{records.MAX_EPSILON}={most!r} needs a ledger that outlives the run, where this "
                f"node wants it: set {records.LEDGER_PATH} in the node config"
            )
        if not delta <= self.max_delta:
            raise _refused(f"delta={delta!r} must be <= {self.max_delta!r}")
        if not epsilon <= most:
            raise _refused(f"epsilon={epsilon!r} must be <= {most!r}")


def _refused(detail: str) -> NodeError:
    return NodeError(NodeErrorCode.POLICY_REFUSED, f"{detail}, this node's policy")


def _number(node_config: Mapping[str, object], key: str) -> float | None:
    value = node_config.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"node config {key}={value!r} must be a number")
    return float(value)


def _boolean(node_config: Mapping[str, object], key: str) -> bool:
    value = node_config.get(key, False)
    if not isinstance(value, bool):
        raise ValueError(f"node config {key}={value!r} must be true or false")
    return value
