"""pfl-research on a workload: python -m torch.distributed.run --standalone --nproc_per_node=2 with_pfl.py FOLDER."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.internal.ops import pytorch_ops
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn
from torch.nn import functional


def network(layers: list[list[object]], dropout: bool) -> Net:
    """The layers of work.json as modules."""
    net = Net(*(getattr(nn, str(kind))(*numbers) for kind, *numbers in layers))
    for layer in net:
        if isinstance(layer, nn.Dropout) and not dropout:
            layer.p = 0.0
    return net


class Net(nn.Sequential):
    """What pfl wants of a model."""

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy, in training mode."""
        self.train()
        return functional.cross_entropy(self(inputs), targets)

    @torch.no_grad()
    def metrics(self, inputs: Tensor, targets: Tensor) -> dict[str, Weighted]:
        """Loss of a client; pfl asks for it in its first round."""
        self.eval()
        return {"loss": Weighted(float(functional.cross_entropy(self(inputs), targets)) * len(targets), len(targets))}


class Clock(TrainingProcessCallback):
    """Prints the seconds of every round, and how many clients pfl has counted in it."""

    def on_train_begin(self, *, model: PyTorchModel) -> Metrics:
        """Start the clock."""
        self.start = time.perf_counter()
        return Metrics()

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        """Read the clock."""
        now = time.perf_counter()
        if pytorch_ops.distributed.global_rank == 0:
            fits = next(
                value for name, value in aggregate_metrics.to_simple_dict().items() if "number of devices" in name
            )
            print("ROUND", json.dumps({"fits": int(fits), "seconds": now - self.start}), flush=True)
        self.start = time.perf_counter()
        return False, Metrics()


def main(place: Path) -> None:
    """Run the rounds."""
    torch.set_num_threads(1)
    np.random.seed(0)  # noqa: NPY002 (pfl draws users from the global generator, which has to be alike in all processes)
    torch.manual_seed(pytorch_ops.distributed.global_rank)
    work = json.loads((place / "work.json").read_text())
    data = np.load(place / "data.npz")
    inputs, targets = torch.from_numpy(data["inputs"]), torch.from_numpy(data["targets"])
    net = network(work["layers"], work["dropout"])
    net.load_state_dict({name: torch.from_numpy(value) for name, value in np.load(place / "initial.npz").items()})
    model = PyTorchModel(
        net,
        local_optimizer_create=lambda parameters, lr: torch.optim.SGD(parameters, lr, fused=True),
        central_optimizer=torch.optim.SGD(net.parameters(), 1.0),
    )
    dataset = FederatedDataset(
        lambda user: PyTorchTensorDataset((inputs[user], targets[user]), user_id=str(user)),
        get_user_sampler("minimize_reuse", list(range(len(inputs)))),
    )
    rounds = work["warmup"] + work["rounds"]
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=rounds,
            evaluation_frequency=rounds,
            train_cohort_size=work["cohort"],
            val_cohort_size=None,
        ),
        SimulatedBackend(training_data=dataset, val_data=None),
        model,
        NNTrainHyperParams(local_num_epochs=1, local_learning_rate=work["lr"], local_batch_size=work["batch"]),
        callbacks=[Clock()],
        send_metrics_to_platform=False,
    )
    if pytorch_ops.distributed.global_rank == 0:
        np.savez(place / "answer.npz", **{name: value.numpy() for name, value in net.state_dict().items()})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
