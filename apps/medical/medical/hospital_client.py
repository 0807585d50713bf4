"""A hospital on its own: DP-SGD on its training patients, a NOT PRIVATE count of the others."""

from typing import cast

from flwr.app import Context
from flwr.common import Config, NDArrays, Scalar
from torch import nn, tensor
from torch.utils.data import TensorDataset

from dpfl_flower.client import (
    DPSGDClient,
    NodeError,
    NodeErrorCode,
    NodeLedger,
)

from .evaluation import ScoreHistogram
from .hospital import Hospital
from .settings import Settings
from .split import Split
from .task import LOSS, GradientDescent, new_model, probabilities, tensors


class HospitalClient(DPSGDClient):
    """Trains privately, as `DPSGDClient` does, and counts held-out patients by score.

    What ``evaluate`` returns is NOT PRIVATE for held-out patients, who are never trained on. A node
    whose config says ``share-held-out=false`` refuses it.
    """

    def __init__(
        self, hospital: Hospital, settings: Settings, context: Context, *, model: nn.Linear
    ) -> None:
        split = Split.of(hospital.patients, seed=settings.split_seed)
        super().__init__(
            model,
            tensors(split.training),
            config=settings.dp_sgd(),
            loss_fn=LOSS,
            optimizer=lambda parameters: GradientDescent(parameters, lr=settings.learning_rate),
            ledger=NodeLedger.from_context(
                context, dataset=hospital.dataset, path=hospital.ledger_path
            ),
            device="cpu",  # sixteen numbers
        )
        self._logistic = model
        self._held_out: TensorDataset = tensors(split.held_out)
        self._shares = context.node_config.get("share-held-out", True) is True

    def evaluate(
        self, parameters: NDArrays, config: Config
    ) -> tuple[float, int, dict[str, Scalar]]:
        """Return the histograms of held-out patients' scores. NOT PRIVATE."""
        if not self._shares:
            raise NodeError(
                NodeErrorCode.NOT_IMPLEMENTED, "share-held-out=false in the node config"
            )
        names = self._logistic.state_dict()
        arrays = dict(zip(names, map(tensor, parameters), strict=True))
        self._logistic.load_state_dict(arrays)
        histogram = ScoreHistogram.of(
            probabilities(self._logistic, self._held_out), self._held_out.tensors[1][:, 0].numpy()
        )
        metrics = cast(
            dict[str, Scalar], histogram.to_metrics()
        )  # numpy_client_app sends lists too
        return 0.0, histogram.patients, metrics


def client_fn(context: Context) -> HospitalClient:
    """Return the client of the hospital that this node is."""
    settings = Settings.parse(context.run_config)
    hospital = Hospital.of(context, run_dir=settings.run_dir)
    return HospitalClient(hospital, settings, context, model=new_model())
