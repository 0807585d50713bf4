"""One rival of ``benchmarks.user_round`` in a process of its own, told by pipe when to run a round.

``python -m benchmarks.user_round_rivals RIVAL MODEL``. A line on the standard input asks for one
round; a line of JSON on the standard output says what it took. Runs in two environments, so what
one of them lacks is imported where it is used.
"""

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import user_round_task as task_of


class Pipe:
    """Waits for a line, times what comes until the next wait, and answers."""

    def __init__(self, versions: dict[str, str]) -> None:
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)  # what libraries print does not belong in the answers
        self._began: tuple[float, float] | None = None
        self._say(versions)

    def wait(self) -> bool:
        """Answer for the round that is over, if one is, and wait; False: there is no next one."""
        if self._began is not None:
            gc.enable()
            wall, cpu = time.perf_counter(), time.process_time()
            self._say({"wall": wall - self._began[0], "cpu": cpu - self._began[1]})
        if not sys.stdin.readline():
            return False
        gc.collect()
        gc.disable()
        self._began = time.perf_counter(), time.process_time()
        return True

    def _say(self, what: dict[str, Any]) -> None:
        print(json.dumps(what), file=self._out)


def ours(task: task_of.Task, pipe: Callable[[], bool]) -> None:
    """Ask a node of 1000 users for a list of 50, add the noise and take the step."""
    from dpfl_flower.client.users import CohortRequest, LocalTraining, UserCohort
    from dpfl_flower.layout import ArrayLayout
    from dpfl_flower.noise import RoundedGaussian
    from dpfl_flower.quantize import IntegerGrid, to_float
    from dpfl_flower.rng import secure

    model = {name: tensor.numpy().copy() for name, tensor in task.model.state_dict().items()}
    layout = ArrayLayout.of(model)
    cohort = UserCohort(
        dict(enumerate(zip(task.inputs, task.targets, strict=True))),
        model_fn=lambda: task.model,
        training=LocalTraining(
            lr=task_of.LEARNING_RATE,
            batch_size=task_of.BATCH_SIZE,
            loss_fn=nn.CrossEntropyLoss(reduction="none"),
            shuffle=False,
        ),
        example=(task.inputs[0][0], task.targets[0][0]),
        device="cpu",
        obeys_lists=True,
    )
    grid = IntegerGrid.for_noise_multiplier(task_of.NOISE_MULTIPLIER, layout.dimension)
    noise = RoundedGaussian(grid.noise_units)
    server_round = 0
    while pipe():
        server_round += 1
        request = CohortRequest(
            grid=grid,
            clip_norm=task_of.CLIP_NORM,
            server_round=server_round,
            users=tuple(secure().sample(range(task_of.USERS), task_of.COHORT)),
        )
        total = cohort.answer(request, model)
        total += noise.sample(total.size, secure())
        mean = to_float(total, grid.unit_size(task_of.CLIP_NORM), task_of.COHORT)
        model = layout.restore(layout.flatten(model) + mean, template=model)


def plain(task: task_of.Task, pipe: Callable[[], bool]) -> None:
    """Do by hand: a loop over users, an optimizer each, clip, sum, noise."""
    model = task.model
    parameters = list(model.parameters())
    loss_fn = nn.CrossEntropyLoss()
    with torch.no_grad():
        base = [p.clone() for p in parameters]
        total = [torch.zeros_like(p) for p in parameters]
    while pipe():
        for part in total:
            part.zero_()
        for user in np.random.choice(task_of.USERS, task_of.COHORT, replace=False):
            optimizer = torch.optim.SGD(parameters, lr=task_of.LEARNING_RATE)
            for start in range(0, task_of.SAMPLES, task_of.BATCH_SIZE):
                batch = slice(start, start + task_of.BATCH_SIZE)
                optimizer.zero_grad()
                loss_fn(model(task.inputs[user, batch]), task.targets[user, batch]).backward()
                optimizer.step()
            with torch.no_grad():
                update = [p - start for p, start in zip(parameters, base, strict=True)]
                norm = torch.cat([u.reshape(-1) for u in update]).norm().item()
                for part, u in zip(total, update, strict=True):
                    part.add_(u, alpha=min(1.0, task_of.CLIP_NORM / (norm + 1e-12)))
                for p, origin in zip(parameters, base, strict=True):
                    p.copy_(origin)
        with torch.no_grad():
            for p, origin, part in zip(parameters, base, total, strict=True):
                noise = task_of.NOISE_MULTIPLIER * task_of.CLIP_NORM * torch.randn(part.shape)
                origin.add_(part + noise, alpha=1 / task_of.COHORT)
                p.copy_(origin)


def pfl(task: task_of.Task, pipe: Callable[[], bool]) -> None:
    """Run pfl's own simulation: FederatedAveraging with its central Gaussian mechanism."""
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.aggregate.weighting import WeightByUser
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.pytorch import PyTorchTensorDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
    from pfl.metrics import Metrics, Weighted
    from pfl.model.pytorch import PyTorchModel
    from pfl.privacy.gaussian_mechanism import GaussianMechanism
    from pfl.privacy.privacy_mechanism import CentrallyAppliedPrivacyMechanism

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = task.model
            self.cross_entropy = nn.CrossEntropyLoss()

        def loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            self.train()
            return self.cross_entropy(self.net(x), y)  # type: ignore[no-any-return]

        @torch.no_grad()
        def metrics(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, Any]:
            return {"loss": Weighted(float(self.loss(x, y)) * len(x), len(x))}

    class Turns(TrainingProcessCallback):  # type: ignore[misc]
        def on_train_begin(self, *, model: Any) -> Any:
            self.more = pipe()
            return Metrics()

        def after_central_iteration(
            self, aggregate_metrics: Any, model: Any, *, central_iteration: int
        ) -> tuple[bool, Any]:
            return not pipe(), Metrics()

    def user(uid: int) -> Any:
        return PyTorchTensorDataset((task.inputs[uid], task.targets[uid]), user_id=str(uid))

    net = Net()
    data = FederatedDataset(user, get_user_sampler("random", list(range(task_of.USERS))))
    mechanism = GaussianMechanism(task_of.CLIP_NORM, task_of.NOISE_MULTIPLIER)
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=10**6,
            evaluation_frequency=10**9,
            train_cohort_size=task_of.COHORT,
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(
            training_data=data,
            val_data=data,
            postprocessors=[WeightByUser(), CentrallyAppliedPrivacyMechanism(mechanism)],
        ),
        model=PyTorchModel(
            net,
            local_optimizer_create=torch.optim.SGD,
            central_optimizer=torch.optim.SGD(net.parameters(), lr=1.0),
        ),
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1,
            local_learning_rate=task_of.LEARNING_RATE,
            local_batch_size=task_of.BATCH_SIZE,
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=task_of.SAMPLES),
        callbacks=[Turns()],
        send_metrics_to_platform=False,
    )


def main() -> None:
    """Run the rival named on the command line until the pipe closes."""
    rival, model = sys.argv[1:]
    torch.set_num_threads(1)
    np.random.seed(0)
    task = task_of.build(model)
    pipe = Pipe({"torch": torch.__version__, "records": f"{float(task.inputs.sum()):.6f}"})
    {"dpfl-flower": ours, "plain PyTorch": plain, "pfl": pfl}[rival](task, pipe.wait)


if __name__ == "__main__":
    main()
