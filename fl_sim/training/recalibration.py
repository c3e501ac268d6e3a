"""BatchNorm statistics measured anew: what a model needs whose statistics did not travel or no longer fit."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from fl_sim.data import Split
from fl_sim.models.layers import BATCHNORM
from fl_sim.training.precision import PRECISIONS


def recalibrate(model: nn.Module, data: Split, *, batch_size: int = 512, precision: str = "float32") -> nn.Module:
    """Replace the running statistics by those of `data` under the present weights, in place; return the model.

    Mean and variance are the averages over full batches of at most `batch_size` samples, as in PyTorch's cumulative
    mode; a smaller rest of the data is left out, so that every batch weighs the same. Labels are not used.

    Args:
        model: on its device; its mode and its BatchNorm momentum are restored.
        data: samples of the kind the model will see, on the same device.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, BATCHNORM) and layer.track_running_stats]
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
        layer.momentum = None
    with torch.no_grad(), chosen.context(device):
        for images, labels in data.batches(size, layout=chosen.layout):
            if len(labels) == size:
                model(images)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    return model.train(was_training)
