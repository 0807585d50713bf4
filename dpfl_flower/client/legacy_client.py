"""A Flower ``Client``, the class under NumPyClient, seen as a NumPyClient.

>>> from flwr.client import Client
>>> LegacyClient(Client()).get_properties({})
Traceback (most recent call last):
    ...
dpfl_flower.client.errors.NodeError: Client.get_properties answered GET_PROPERTIES_NOT_IMPLEMENTED
"""

from flwr.client import Client, NumPyClient
from flwr.common import (
    Code,
    Config,
    EvaluateIns,
    FitIns,
    GetParametersIns,
    GetPropertiesIns,
    NDArrays,
    Scalar,
    Status,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)

from dpfl_flower.client.errors import NodeError, NodeErrorCode


class LegacyClient(NumPyClient):
    """Call a ``Client`` through its ``Ins`` and ``Res`` types; a status other than OK raises.

    Parameters
    ----------
    client : Client
        The client to call.
    """

    def __init__(self, client: Client) -> None:
        self._client = client

    def get_properties(self, config: Config) -> dict[str, Scalar]:
        """Return the client's properties."""
        result = self._client.get_properties(GetPropertiesIns(config))
        self._require_ok(result.status, "get_properties")
        return result.properties

    def get_parameters(self, config: Config) -> NDArrays:
        """Return the client's current arrays."""
        result = self._client.get_parameters(GetParametersIns(config))
        self._require_ok(result.status, "get_parameters")
        return parameters_to_ndarrays(result.parameters)

    def fit(self, parameters: NDArrays, config: Config) -> tuple[NDArrays, int, dict[str, Scalar]]:
        """Train from ``parameters``."""
        result = self._client.fit(FitIns(ndarrays_to_parameters(parameters), config))
        self._require_ok(result.status, "fit")
        return parameters_to_ndarrays(result.parameters), result.num_examples, result.metrics

    def evaluate(
        self, parameters: NDArrays, config: Config
    ) -> tuple[float, int, dict[str, Scalar]]:
        """Evaluate ``parameters``."""
        result = self._client.evaluate(EvaluateIns(ndarrays_to_parameters(parameters), config))
        self._require_ok(result.status, "evaluate")
        return result.loss, result.num_examples, result.metrics

    def _require_ok(self, status: Status, method: str) -> None:
        if status.code is Code.OK:
            return
        # The codes that Flower has all say so; the text beside them stays here.
        name = type(self._client).__name__
        raise NodeError(
            NodeErrorCode.NOT_IMPLEMENTED, f"{name}.{method} answered {status.code.name}"
        )
