"""A workload as files, for programs that know nothing of fl_sim: settings, samples of its clients, initial parameters.

`work.json` names the layers of the network, the clients, and what each of them does in a round. `data.npz` has `inputs`,
float32 (clients, samples, ...) as a model gets them, and `targets`, int64 (clients, samples). `initial.npz` has the parameters
by the names that PyTorch gives them. A program trains a client on its samples in their order, in batches, by plain SGD.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fl_sim.core.types import Params, UserError
from fl_sim.data import Split
from fl_sim.simulation.federation import Federation

SETTINGS, DATA, INITIAL, ANSWER = "work.json", "data.npz", "initial.npz", "answer.npz"
Layer = tuple[str | int | float, ...]
"""Class of `torch.nn`, and its arguments: ("Conv2d", 3, 32, 3), ("Linear", 128, 10), ("ReLU", True), ("Flatten",)."""


@dataclass(frozen=True)
class Settings:
    """What `work.json` says.

    Attributes:
        layers: of the network, one after the other.
        clients: in the federation; the server draws among them.
        cohort: clients a round.
        batch: samples a step.
        steps: SGD steps of a client in a round.
        lr: learning rate; the server takes the mean of the clients' parameters.
        processes: that train side by side.
        warmup: rounds that nobody times.
        rounds: that are timed.
        dropout: whether the network's dropout is on.
    """

    layers: tuple[Layer, ...]
    clients: int
    cohort: int
    batch: int
    steps: int
    lr: float
    processes: int
    warmup: int
    rounds: int
    dropout: bool


def layers_of(model: nn.Module) -> tuple[Layer, ...]:
    """The layers of a plain feed-forward network.

    Raises:
        UserError: a layer that no name is known for.
    """
    return tuple(_layer(module) for module in model.children())


def _layer(module: nn.Module) -> Layer:
    if isinstance(module, nn.Conv2d):
        plain = nn.Conv2d(module.in_channels, module.out_channels, module.kernel_size[0])
        if repr(plain) == repr(module):
            return "Conv2d", module.in_channels, module.out_channels, module.kernel_size[0]
    elif isinstance(module, nn.Linear) and module.bias is not None:
        return "Linear", module.in_features, module.out_features
    elif isinstance(module, nn.MaxPool2d) and repr(module) == repr(nn.MaxPool2d(module.kernel_size)):
        return "MaxPool2d", int(str(module.kernel_size))
    elif isinstance(module, nn.Dropout):
        return "Dropout", module.p
    elif isinstance(module, nn.ReLU):
        return "ReLU", module.inplace
    elif isinstance(module, nn.Flatten):
        return ("Flatten",)
    raise UserError(f"layer {module}: a peer's network has plain Conv2d, Linear, MaxPool2d, Dropout, ReLU and Flatten")


def write(place: Path, federation: Federation, settings: Settings) -> None:
    """Write the first clients of a federation, each with the samples of one round, and its initial parameters.

    Raises:
        UserError: a client has fewer samples than it trains on.
    """
    samples = settings.batch * settings.steps
    parts = [federation.data.train.subset(federation.partitions[client]) for client in range(settings.clients)]
    if short := [number for number, part in enumerate(parts) if len(part) < samples]:
        count = len(parts[short[0]])
        raise UserError(f"client {short[0]} has {count} samples; needed: {samples}, for {settings.steps} steps")
    inputs, targets = zip(*(_first(part, samples) for part in parts), strict=True)
    place.mkdir(parents=True, exist_ok=True)
    (place / SETTINGS).write_text(json.dumps(asdict(settings), indent=1), encoding="utf-8")
    np.savez(place / DATA, inputs=np.stack(inputs), targets=np.stack(targets))
    save(place / INITIAL, federation.first.initial)


def _first(part: Split, samples: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    inputs, targets = next(iter(part.batches(samples)))
    return inputs.numpy(), targets.numpy()


def save(path: Path, params: Params) -> None:
    """Write parameters, each under its name."""
    np.savez(path, **{name: value.numpy() for name, value in params.items()})  # type: ignore[arg-type]


def read(path: Path) -> dict[str, NDArray[np.float32]]:
    """Parameters of a file, by name."""
    with np.load(path, allow_pickle=False) as held:
        return {name: held[name] for name in held.files}
