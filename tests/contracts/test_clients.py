import torch
from torch import nn

from dpfl_flower.client import DPSGDClient, DPSGDConfig, NodeLedger, numpy_client_app
from tests.support.contracts.clients import ClientContract, ClientIsolation


def squared_error(outputs, targets):
    return (outputs[:, 0] - targets) ** 2


class DPSGD:
    engine = "auto"

    def app(self, training, dataset, *, ledger=None):
        config = DPSGDConfig(
            sampling_rate=training.sampling_rate,
            steps_per_round=training.steps,
            planned_rounds=1000,
            clip_norm=training.clip_norm,
            expected_batch_size=training.expected_batch_size,
            delta=training.delta,
            noise_multiplier=training.noise_multiplier,
        )

        def client_fn(node):
            return DPSGDClient(
                nn.Linear(training.features, 1, bias=False),
                dataset,
                config=config,
                loss_fn=squared_error,
                optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
                engine=self.engine,
                ledger=NodeLedger.from_context(node, dataset="test", path=ledger),
                device="cpu",
            )

        return numpy_client_app(client_fn)


class TestDPSGDClient(DPSGD, ClientContract):
    """Gradients by the default engine."""


class TestDPSGDClientWithGhostClipping(DPSGD, ClientIsolation):
    """Norms by ghost clipping: what bounds a record is another code."""

    engine = "ghost"


class TestDPSGDClientWithHooks(DPSGD, ClientIsolation):
    """Gradients held by Opacus."""

    engine = "hooks"
