"""DP-SGD for a node that holds many small models: one per ward, sensor or user, trained at once.

>>> models = [nn.Sequential(nn.Linear(3, 1)) for _ in range(4)]
>>> datasets = [TensorDataset(torch.randn(40, 3), torch.randn(40, 1)) for _ in models]
>>> stack = StackedDPSGD(
...     models,
...     datasets,
...     config=DPSGDConfig(
...         sampling_rate=0.5, steps_per_round=2, planned_rounds=10, clip_norm=1.0,
...         expected_batch_size=20, delta=1e-3, noise_multiplier=2.0,
...     ),
...     loss_fn=nn.MSELoss(reduction="none"),
...     optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
...     ledgers=[NodeLedger(f"ward-{number}") for number in range(4)],
...     example=(torch.zeros(3), torch.zeros(1)),
... )
>>> outcomes = stack.train()
>>> [outcome.trained for outcome in outcomes], outcomes[3].claim["dataset"]
([True, True, True, True], 'ward-3')
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from dpfl_flower.client.dp_sgd import DPSGDClient, OptimizerFactory
from dpfl_flower.client.dp_sgd_charge import charge_round, resolve_noise
from dpfl_flower.client.dp_sgd_config import DPSGDConfig
from dpfl_flower.client.engine_choice import choose_engine
from dpfl_flower.client.errors import NODE_LOGGER, NodeError
from dpfl_flower.client.merged_optimizer import merged
from dpfl_flower.client.node_ledger import NodeLedger
from dpfl_flower.client.noisy_gradient import NoisyGradient
from dpfl_flower.client.per_example import Clip, ClipStyle, GradientEngine, LossFunction
from dpfl_flower.client.per_sample.bookkeeping import BookKeepingClipper
from dpfl_flower.client.per_sample.full_precision import full_precision
from dpfl_flower.client.per_sample.stacked import StackedClipper, unstackable
from dpfl_flower.client.policy import NodePolicy
from dpfl_flower.client.record_set import RecordSet
from dpfl_flower.client.stacked_sample import StackedSample, padded_width
from dpfl_flower.client.torch_seed import forked_seeds, seed_torch
from dpfl_flower.client.training_device import training_device
from dpfl_flower.rng import RandomSource, secure

logger = logging.getLogger(NODE_LOGGER)

__all__ = [
    "DPSGDConfig",
    "NodeLedger",
    "StackedDPSGD",
    "StackedOutcome",
    "TensorDataset",
    "nn",
    "torch",
]


@dataclass(frozen=True)
class StackedOutcome:
    """What became of one model in a round.

    Attributes
    ----------
    claim : ConfigRecord, optional
        What its data set has spent in all; see `node_ledger.claim`. None where it was refused.
    refused : NodeError, optional
        Why its ledger or the node's policy refused: the model is as it was.
    """

    claim: ConfigRecord | None = None
    refused: NodeError | None = None

    @property
    def trained(self) -> bool:
        """Whether the model was charged for and trained."""
        return self.refused is None


class StackedDPSGD:
    """Trains many models, each by DP-SGD on records of its own, charged to a ledger of its own.

    What each model gets is what a `DPSGDClient` would give it: coins of its own for its own
    records, its own integer noise on its own dithered sum, the same grid, the same charge. The
    models only share the calls: one batched product per layer. No number of one model depends on
    a record of another, and to the last bit a clipped sum depends on its own data set alone.

    Epsilon is each data set's. Someone whose records are in several of them gets the composition.

    Models that cannot be stacked (see `unstackable`), per-layer or adaptive clipping and mixed
    precision are trained one model at a time, which one line in the node's log says.

    Parameters
    ----------
    models : sequence of nn.Module
        Of one architecture, trained in place; no two share a parameter.
    datasets : sequence of Dataset
        One per model, as `DPSGDClient` takes them.
    config : DPSGDConfig
        The public constants, the same for all.
    loss_fn : Callable[[outputs, targets], Tensor]
        One loss per record.
    optimizer : Callable[[Iterable[Parameter]], Optimizer]
        Builds the optimizer over one model's trainable parameters, anew in each round.
    ledgers : sequence of NodeLedger
        One per model, each of another data set.
    example : sequence of Tensor or array
        Inputs and target of one record, of which only shapes and dtypes count: public constants.
    policy : NodePolicy, optional
        What the node agrees to for each data set, beside what its own config says: see
        `DPSGDClient`.
    device : torch.device or str, optional
        Default: ``cuda`` where there is one, else ``cpu``.
    rng : RandomSource, optional
        A source that does not protect (a seeded one) is charged as no noise at all.

    Raises
    ------
    ModelRefused
        If a model cannot be trained record by record.
    ValueError
        If there is not one data set and one ledger per model, two models share a parameter or a
        data set, a ``target_epsilon`` is to be met with a seeded ``rng``, the device is neither the
        CPU nor CUDA, or noise is to be drawn on one that is not CUDA.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        datasets: Sequence[Dataset[Any]],
        *,
        config: DPSGDConfig,
        loss_fn: LossFunction,
        optimizer: OptimizerFactory,
        ledgers: Sequence[NodeLedger],
        example: Sequence[Tensor | NDArray[Any]],
        policy: NodePolicy | None = None,
        device: torch.device | str | None = None,
        rng: RandomSource | None = None,
    ) -> None:
        if not len(models) == len(datasets) == len(ledgers) or not models:
            raise ValueError(
                f"models={len(models)}, datasets={len(datasets)} and ledgers={len(ledgers)} must "
                "be as many of each, and at least one"
            )
        _require_own_parameters(models)
        _require_own_ledgers(ledgers)
        self._device = training_device(device)
        self._rng = secure() if rng is None else rng
        self._policy = policy
        self._models, self._ledgers = list(models), list(ledgers)
        self._config, self._loss_fn, self._optimizer = config, loss_fn, optimizer
        self._records = [RecordSet(dataset, self._device) for dataset in datasets]
        self._alone = [
            DPSGDClient(
                model,
                dataset,
                config=config,
                loss_fn=loss_fn,
                optimizer=optimizer,
                ledger=ledger,
                policy=policy,
                example=example,
                device=self._device,
                rng=self._rng,
            )
            for model, dataset, ledger in zip(models, datasets, ledgers, strict=True)
        ]
        self._example = [torch.as_tensor(part).detach().to(self._device) for part in example]
        self._reason = self._why_alone()
        if self._reason is not None:
            logger.info("Training one model at a time: %s", self._reason)

    @property
    def stacked(self) -> bool:
        """Whether the models are trained at once."""
        return self._reason is None

    def train(self) -> list[StackedOutcome]:
        """Charge a round to every data set, then train it, and return what became of each model.

        A model whose ledger or policy refuses stays as it is; the others are trained. A round that
        fails after the charges stays charged, and leaves stacked models as they were.

        Raises
        ------
        ModelRefused
            If a model is none that can be trained record by record; nothing is charged then.
        """
        if not self.stacked:
            return [_outcome_alone(client) for client in self._alone]
        dimension = sum(p.numel() for p in self._models[0].parameters() if p.requires_grad)
        noise_multiplier = resolve_noise(self._config, dimension)
        outcomes = []
        for ledger in self._ledgers:
            try:
                claimed = charge_round(
                    self._config,
                    ledger,
                    self._policy,
                    noise_multiplier=noise_multiplier,
                    dimension=dimension,
                    rng=self._rng,
                )
            except NodeError as error:
                outcomes.append(_refused(ledger, error))
            else:
                outcomes.append(StackedOutcome(claimed))
        charged = [index for index, outcome in enumerate(outcomes) if outcome.trained]
        if charged:
            self._train(charged, noise_multiplier)
        return outcomes

    def _why_alone(self) -> str | None:
        config = self._config
        asked_for = {
            "the clip norm is adaptive": config.adaptive_clipping is not None,
            "clipping is per layer": config.clip_style is ClipStyle.PER_LAYER,
            "precision is mixed": config.mixed_precision,
        }
        reason = next((reason for reason, is_so in asked_for.items() if is_so), None)
        return reason or unstackable(self._models, self._example) or self._unchecked()

    def _unchecked(self) -> str | None:
        example = [part.unsqueeze(0) for part in self._example]
        # The models are alike, so what holds for the gradients of one holds for all.
        engine = choose_engine(
            self._models[0],
            self._loss_fn,
            GradientEngine.AUTO,
            example,
            public=True,
            style=self._config.clip_style,
        )
        if engine is not BookKeepingClipper:
            return "book-keeping could not be checked on made-up records"
        try:
            # A loss that raises on padding would raise in every pass.
            self._stack(range(len(self._models)))[1].pass_of_padding()
        except Exception as error:
            return f"the model or the loss does not run on zeros: {error}"
        return None

    def _stack(self, indices: Sequence[int]) -> tuple[StackedClipper, StackedSample]:
        config = self._config
        clipper = StackedClipper(
            [self._models[index] for index in indices],
            self._loss_fn,
            clip=Clip(config.clip_norm, config.clip_style),
        )
        sample = StackedSample(
            clipper,
            [self._records[index] for index in indices],
            self._example,
            width=padded_width(config.expected_batch_size, at_most=config.max_physical_batch_size),
        )
        return clipper, sample

    def _train(self, charged: Sequence[int], noise_multiplier: float) -> None:
        config = self._config
        clipper, sample = self._stack(charged)
        records = [self._records[index] for index in charged]
        release = NoisyGradient(
            noise_multiplier,
            config.expected_batch_size,
            self._rng,
            steps=config.steps_per_round,
            source=config.noise_source,
        )
        optimizers = merged(self._optimizer, clipper.parameters)
        # An app's own autocast would round the sums.
        with forked_seeds(self._device), torch.autocast(self._device.type, enabled=False):
            for _ in range(config.steps_per_round):
                chosen = [of.chosen(config.sampling_rate, self._rng) for of in records]
                # What a loss draws from torch must be foretold by nobody: see `DPSGDClient`.
                seed_torch(int.from_bytes(self._rng.random_bytes(7), "little"), self._device)
                with full_precision(clipper.parameters[0][0]):
                    sums = sample.sums(chosen)
                noisy = release.rows(sums, clip_norm=config.clip_norm)
                clipper.hand_out(noisy)
                for optimizer in optimizers:
                    optimizer.step()
        clipper.write_back()


def _outcome_alone(client: DPSGDClient) -> StackedOutcome:
    try:
        client.fit(client.get_parameters({}), {})
    except NodeError as error:
        return StackedOutcome(refused=error)
    return StackedOutcome(client.privacy_claim())


def _refused(ledger: NodeLedger, error: NodeError) -> StackedOutcome:
    logger.warning("The model of %r is left as it is: %s", ledger.dataset, error)
    return StackedOutcome(refused=error)


def _require_own_parameters(models: Sequence[nn.Module]) -> None:
    owner: dict[int, int] = {}
    for index, model in enumerate(models):
        for p in model.parameters():
            other = owner.setdefault(p.data_ptr() if p.numel() else id(p), index)
            if other != index:
                raise ValueError(f"models {other} and {index} share a parameter")


def _require_own_ledgers(ledgers: Sequence[NodeLedger]) -> None:
    # Two models of one data set compose: side by side, each would claim half of what was spent.
    owner: dict[object, int] = {}
    for index, ledger in enumerate(ledgers):
        names: list[object] = [ledger.dataset]
        if ledger.path is not None:
            names.append(Path(ledger.path).resolve())
        for name in names:
            other = owner.setdefault(name, index)
            if other != index:
                raise ValueError(
                    f"ledgers {other} and {index} are of one data set, {str(name)!r}: each model "
                    "needs records of its own"
                )
