"""DP-SGD on a node: every record's gradient is clipped, every step noised and charged.

>>> records = TensorDataset(torch.randn(40, 3), torch.randn(40, 1))
>>> client = DPSGDClient(
...     nn.Linear(3, 1),
...     records,
...     config=DPSGDConfig(
...         sampling_rate=0.5, steps_per_round=2, planned_rounds=10, clip_norm=1.0,
...         expected_batch_size=20, delta=1e-3, noise_multiplier=2.0,
...     ),
...     loss_fn=nn.MSELoss(reduction="none"),
...     optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
...     ledger=NodeLedger("demo"),
... )
>>> arrays, weight, metrics = client.fit(client.get_parameters({}), {})
>>> [array.shape for array in arrays], weight, metrics
([(1, 3), (1,)], 1, {})
>>> client.privacy_claim()["durable"]
False
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from flwr.app import ConfigRecord
from flwr.client import NumPyClient
from flwr.common import Config, NDArrays, Scalar
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from dpfl_flower import checks
from dpfl_flower.client.clip_norms import ClipNorms
from dpfl_flower.client.dp_sgd_charge import charge_round, resolve_noise
from dpfl_flower.client.dp_sgd_config import DPSGDConfig
from dpfl_flower.client.engine_choice import choose_engine
from dpfl_flower.client.errors import NodeError, NodeErrorCode
from dpfl_flower.client.node_ledger import NodeLedger
from dpfl_flower.client.noise_source import require_noise_source
from dpfl_flower.client.noisy_gradient import NoisyGradient
from dpfl_flower.client.per_example import Clip, GradientEngine, LossFunction, PerExampleClipper
from dpfl_flower.client.per_sample.ghost_limits import require_ghost_bound
from dpfl_flower.client.policy import NodePolicy
from dpfl_flower.client.record_set import RecordSet
from dpfl_flower.client.sample_sum import SampleSum
from dpfl_flower.client.separable import buffer_places, require_trainable, restored_buffers
from dpfl_flower.client.torch_seed import forked_seeds, seed_torch
from dpfl_flower.client.training_device import training_device
from dpfl_flower.rng import RandomSource, secure


class Steps(Protocol):
    """What is used of an optimizer: any of ``torch.optim``, or one of the app's own."""

    def step(self) -> object:
        """Move the parameters by their gradients."""

    def zero_grad(self, *, set_to_none: bool) -> None:
        """Forget the gradients."""


OptimizerFactory = Callable[[Iterable[nn.Parameter]], Steps]

__all__ = ["DPSGDClient", "DPSGDConfig", "NodeLedger", "OptimizerFactory", "TensorDataset"]


class DPSGDClient(NumPyClient):
    """Trains on a node's records with DP-SGD; its answers are private already.

    Each of ``steps_per_round`` steps takes every record by its own coin, sums the clipped gradients
    of the sample (which may be empty), adds Gaussian noise, divides by the public
    ``expected_batch_size`` and takes one step of ``optimizer``. All steps of a round are charged to
    the node's ledger before the first one; a round that fails afterwards stays charged. What the
    server sends beside the arrays is not read.

    A record that cannot be read or trained on contributes zeros, as if it were absent: an answer
    that failed would tell the server that the record is there. The node's own log says why.

    An answer holds the model's arrays and the public ``weight``, and no metric: a training loss
    would be the one un-noised number in it. ``evaluate`` is left to subclasses: what it returns
    about a node's records is not private.

    Coins and noise come from `dpfl_flower.rng`, which no seed of torch, numpy or random moves. The
    clipped sum is floating point, and moves by a clip norm but for its last bits, and for what a
    matrix product rounds otherwise in a batch of another size (docs/maths.md); it is rounded to
    integers with a fresh dither, and the noise is integers from a table, so that what leaves is
    the Gaussian mechanism that is charged (see `SumGrid`), and the low bits of a sum never leave.

    Parameters
    ----------
    model : nn.Module
        Arrays travel in the order of its ``state_dict``. Frozen parameters stay as the server sent
        them. It is trained in place.
    dataset : Dataset
        Map-style. An item is ``(*inputs, target)``, tensors or numbers; a `TensorDataset` is
        indexed as a whole. An item may depend on its own record only, and on public constants.
    config : DPSGDConfig
        The public constants.
    loss_fn : Callable[[outputs, targets], Tensor]
        One loss per record (``reduction="none"``).
    optimizer : Callable[[Iterable[Parameter]], Optimizer]
        Builds the optimizer over the trainable parameters, anew in each round.
    ledger : NodeLedger
        Where the steps are charged.
    policy : NodePolicy, optional
        What the node agrees to, beside what its own config says: a ledger `NodeLedger.from_context`
        brings that along, and it holds without being named here.
    engine : GradientEngine
        How per-example gradients are bounded. Default: in one backward pass ("book-keeping") where
        there is a rule for every layer that is trained, else by Opacus, else by functorch: the
        first that is seen to be right, which one line in the node's log names.
    example : sequence of Tensor or array, optional
        Inputs and target of one record, of which only shapes and dtypes count: public constants. A
        model that cannot be trained privately on such records is refused. Without it the shapes are
        those of the first record that can be read, and nothing that they decide leaves the node: a
        model that does not pass is trained one record at a time, which is private and slow.
    device : torch.device or str, optional
        Default: ``cuda`` where there is one, else ``cpu``.
    rng : RandomSource, optional
        A source that does not protect (a seeded one) is charged as no noise at all.

    Raises
    ------
    ModelRefused
        If the model cannot be trained record by record; see `require_trainable`. With ghost
        clipping also in half or mixed precision, or clipped per layer: see `require_ghost_bound`.
    ValueError
        If a ``target_epsilon`` is to be met with a seeded ``rng``, the device is neither the CPU
        nor CUDA, or noise is to be drawn on one that is not CUDA.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: Dataset[Any],
        *,
        config: DPSGDConfig,
        loss_fn: LossFunction,
        optimizer: OptimizerFactory,
        ledger: NodeLedger,
        policy: NodePolicy | None = None,
        engine: GradientEngine = GradientEngine.AUTO,
        example: Sequence[Tensor | NDArray[Any]] | None = None,
        device: torch.device | str | None = None,
        rng: RandomSource | None = None,
    ) -> None:
        self._engine = checks.choice(GradientEngine, engine=engine)
        require_trainable(model, engine=self._engine)
        if self._engine is GradientEngine.GHOST:
            require_ghost_bound(
                (p for p in model.parameters() if p.requires_grad),
                config.clip_style,
                autocast=config.mixed_precision,
            )
        self._rng = secure() if rng is None else rng
        if config.target_epsilon is not None and not self._rng.protects:
            raise ValueError(
                f"target_epsilon={config.target_epsilon!r} needs noise that nobody can reproduce, "
                "not a seeded rng"
            )
        self._device = training_device(device)
        require_noise_source(config.noise_source, self._device)
        self._model = model.to(self._device)
        self._records = RecordSet(dataset, self._device)
        self._config = config
        self._loss_fn = loss_fn
        self._optimizer = optimizer
        self._ledger = ledger
        self._policy = policy
        self._example = None if example is None else [_one(part, self._device) for part in example]
        self._claim: ConfigRecord | None = None
        self._clipper: type[PerExampleClipper] | None = None

    def get_parameters(self, config: Config) -> NDArrays:
        """Return the model's arrays: as they were built, received or privately trained."""
        return [_to_numpy(tensor) for tensor in self._model.state_dict().values()]

    def fit(self, parameters: NDArrays, config: Config) -> tuple[NDArrays, int, dict[str, Scalar]]:
        """Charge a round, train it from ``parameters``, and return the arrays and the weight.

        Raises
        ------
        NodeError
            MALFORMED_REQUEST where the arrays are not the model's, POLICY_REFUSED,
            BUDGET_EXHAUSTED, LEDGER_REFUSED or MODEL_REFUSED; nothing is trained then.
        """
        self._claim = None
        self._load(parameters)
        clipper = self._choose_clipper()
        trained = sum(p.numel() for p in self._model.parameters() if p.requires_grad)
        noise_multiplier = resolve_noise(self._config, trained)
        self._claim = charge_round(
            self._config,
            self._ledger,
            self._policy,
            noise_multiplier=noise_multiplier,
            dimension=trained,
            rng=self._rng,
        )
        self._train(clipper, noise_multiplier)
        return self.get_parameters(config), self._config.weight, {}

    def privacy_claim(self) -> ConfigRecord | None:
        """Return what the data set has spent up to the last answer; see `node_ledger.claim`."""
        return self._claim

    def _load(self, parameters: NDArrays) -> None:
        tensors = self._model.state_dict()
        arrays = [np.asarray(array) for array in parameters]
        expected = [tuple(tensor.shape) for tensor in tensors.values()]
        if [array.shape for array in arrays] != expected:
            raise NodeError(
                NodeErrorCode.MALFORMED_REQUEST,
                f"the model's arrays {list(tensors)} have the shapes {expected}, "
                f"not {[array.shape for array in arrays]}",
            )
        with torch.no_grad():
            for tensor, array in zip(tensors.values(), arrays, strict=True):
                tensor.copy_(torch.tensor(array))

    def _choose_clipper(self) -> type[PerExampleClipper]:
        if self._clipper is None:
            public = self._example is not None
            example = self._example if public else self._records.first()
            with torch.autocast(self._device.type, enabled=False):
                self._clipper = choose_engine(
                    self._model,
                    self._loss_fn,
                    self._engine,
                    example,
                    public=public,
                    style=self._config.clip_style,
                    autocast=self._config.mixed_precision,
                )
        return self._clipper

    def _train(self, kind: type[PerExampleClipper], noise_multiplier: float) -> None:
        config = self._config
        clip_norms = ClipNorms(
            config, self._ledger, noise_multiplier=noise_multiplier, rng=self._rng
        )
        release = NoisyGradient(
            clip_norms.noise_multiplier,
            config.expected_batch_size,
            self._rng,
            steps=config.steps_per_round,
            source=config.noise_source,
        )
        self._model.train()
        with (
            forked_seeds(self._device),
            torch.autocast(self._device.type, enabled=False),  # an app's own would round the sums
            kind(
                self._model,
                self._loss_fn,
                clip=Clip(clip_norms.current, config.clip_style),
                autocast=config.mixed_precision,
            ) as clipper,
        ):
            optimizer = self._optimizer(clipper.parameters)
            buffers = buffer_places(self._model)
            for _ in range(config.steps_per_round):
                clipper.clip = Clip(clip_norms.current, config.clip_style)
                sample = SampleSum(clipper, self._records.gather)
                for indices in self._records.sample(
                    config.sampling_rate, self._rng, at_most=config.max_physical_batch_size
                ):
                    # Dropout masks that somebody can foretell would tie records to their places.
                    seed_torch(int.from_bytes(self._rng.random_bytes(7), "little"), self._device)
                    with restored_buffers(buffers):
                        sample.add(indices)
                noisy = release(sample.total, clip_norm=clip_norms.current)
                clip_norms.update(sample.fitting)
                for parameter, gradient in zip(clipper.parameters, noisy, strict=True):
                    parameter.grad = gradient.to(parameter.dtype)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)


def _one(part: Tensor | NDArray[Any], device: torch.device) -> Tensor:
    tensor = part.detach() if isinstance(part, Tensor) else torch.as_tensor(part)
    return tensor.unsqueeze(0).to(device)


def _to_numpy(tensor: Tensor) -> Any:
    tensor = tensor.detach().cpu()
    if tensor.dtype is torch.bfloat16:  # numpy has none
        tensor = tensor.float()
    return tensor.numpy().copy()
