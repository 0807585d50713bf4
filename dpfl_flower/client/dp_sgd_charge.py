"""What a round of DP-SGD costs a data set, written down before a record is read.

>>> config = DPSGDConfig(
...     sampling_rate=0.1, steps_per_round=5, planned_rounds=40, clip_norm=1.0,
...     expected_batch_size=20, delta=1e-4, noise_multiplier=1.2,
... )
>>> claimed = charge_round(
...     config, NodeLedger("demo"), noise_multiplier=1.2, dimension=8, rng=secure()
... )
>>> claimed["dataset"], claimed["durable"], round(float(str(claimed["epsilon"])), 2)
('demo', False, 1.21)
"""

from collections.abc import Iterable

from flwr.app import ConfigRecord

from dpfl_flower.accounting import Composed, PrivacyUnit
from dpfl_flower.client.clip_norms import ClipNorms
from dpfl_flower.client.dp_sgd_config import DPSGDConfig
from dpfl_flower.client.node_ledger import NodeLedger, claim
from dpfl_flower.client.noise_source import charge_note
from dpfl_flower.client.policy import NodePolicy
from dpfl_flower.client.sum_grid import most_total_variation
from dpfl_flower.rng import RandomSource, secure

__all__ = ["charge_round", "resolve_noise", "secure"]


def resolve_noise(config: DPSGDConfig, dimension: int) -> float:
    """Return the noise multiplier for a model with so many trained parameters."""
    # The grid of the step is not known yet: no table strays further than the largest one's.
    return config.resolve_noise_multiplier(total_variation=most_total_variation(dimension))


def charge_round(
    config: DPSGDConfig,
    ledger: NodeLedger,
    policy: NodePolicy | None = None,
    *,
    noise_multiplier: float,
    dimension: int,
    rng: RandomSource,
) -> ConfigRecord:
    """Charge ``steps_per_round`` steps to the data set of ``ledger`` and return the public claim.

    Parameters
    ----------
    policy : NodePolicy, optional
        Asked beside the ledger's own, which a node's config sets.
    noise_multiplier : float
        As `resolve_noise` returns it. It is charged as none where ``rng`` does not protect.
    dimension : int
        Trained parameters.

    Raises
    ------
    NodeError
        POLICY_REFUSED, BUDGET_EXHAUSTED or LEDGER_REFUSED; nothing is charged then.
    """
    clip_norms = ClipNorms(config, ledger, noise_multiplier=noise_multiplier, rng=rng)
    astray = clip_norms.total_variation(dimension)
    # Noise that a seed reproduces can be subtracted: it is charged as none.
    charged = noise_multiplier if rng.protects else 0.0
    step = config.event(charged)
    with ledger.open(
        delta=config.delta,
        unit=PrivacyUnit.EXAMPLE,
        relation=config.relation,
        budget=config.budget,
    ) as opened:
        for asked in _asked(ledger.policy, policy):
            asked.check_release(
                opened,
                Composed(step, config.steps_per_round),
                noise_multiplier=charged,
                total_variation=astray * config.steps_per_round,
                chosen_by_node=ledger.chosen_by_node,
                cryptographic=config.noise_source.cryptographic,
            )
        opened.plan(
            ledger.run,
            step,
            config.planned_steps,
            max_charge=config.steps_per_round,
            total_variation=astray,
        )
        opened.charge(ledger.run, config.steps_per_round, charge_note(config.noise_source))
        return claim(opened)


def _asked(*policies: NodePolicy | None) -> Iterable[NodePolicy]:
    """Return the policies there are, each once: all must agree. Without any, the default one."""
    return dict.fromkeys(policy for policy in policies if policy is not None) or (NodePolicy(),)
