"""Statistics of normalisation layers measured anew: for a model whose statistics did not travel or no longer fit."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from fl_sim.core.types import UserError
from fl_sim.data import Split
from fl_sim.models.layers import statistics_layers
from fl_sim.training.precision import PRECISIONS


def recalibrate(model: nn.Module, data: Split, *, batch_size: int = 512, precision: str = "float32") -> nn.Module:
    """Replace the running statistics by those of `data` under the present weights, in place; return the model.

    Mean and variance are the averages over full batches of at most `batch_size` samples, as in PyTorch's cumulative
    mode; a smaller rest of the data is left out, so that every batch weighs the same. Labels are not used.

    Args:
        model: on its device; its mode and its layers' momentum are restored.
        data: samples of the kind the model will see, on the same device.

    Raises:
        UserError: a layer whose statistics cannot be measured; see `measurable`.
    """
    layers = measurable(model)
    momenta = [layer.momentum for layer in layers]
    was_training, chosen = model.training, PRECISIONS[precision]
    size = min(batch_size, len(data))
    device = next(model.parameters()).device
    model.train()
    for layer in model.modules():
        if isinstance(layer, _DropoutNd):
            layer.eval()  # it would draw from a generator that nobody seeded
    chosen.place(model)
    for layer in layers:
        layer.reset_running_stats()
    count = 0
    with torch.no_grad(), chosen.context(device):
        for images, labels in data.batches(size, layout=chosen.layout):
            if len(labels) == size:
                count += 1
                for layer in layers:
                    layer.momentum = 1 / count  # the mean of all batches so far; InstanceNorm has no cumulative mode
                model(images)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    return model.train(was_training)


def measurable(model: nn.Module) -> list[_NormBase]:
    """Layers whose statistics `recalibrate` measures: subclasses of PyTorch's batch and instance normalisation.

    Raises:
        UserError: a layer of another class has running statistics.
    """
    layers = []
    for name, layer in statistics_layers(model).items():
        if not isinstance(layer, _NormBase):
            kind = type(layer).__name__
            raise UserError(
                f"model.statistics: {name} ({kind}) has statistics that cannot be measured anew, only averaged; "
                "allowed: model.statistics = 'average', or layers derived from PyTorch's BatchNorm and InstanceNorm"
            )
        layers.append(layer)
    return layers
