"""Gradient of a loss over all samples of a client."""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from torch import nn

from fl_sim.core.types import Params
from fl_sim.data import Split
from fl_sim.data.weights import weights_of
from fl_sim.training.losses import Loss

BATCH = 512
"""Samples of one backward pass."""


def mean_gradient(model: nn.Module, data: Split, loss: Loss, names: Collection[str]) -> Params:
    """Gradient of the mean loss over all samples, not augmented, by parameter name; the model stays as it is.

    BatchNorm normalises by the statistics of each batch, as in training. Parameters that have no gradient get zeros.
    """
    model = copy.deepcopy(model).train()
    named = {name: parameter for name, parameter in model.named_parameters() if name in names}
    total: Params = {name: torch.zeros(parameter.shape) for name, parameter in named.items()}
    counted = 0.0
    for batch in data.augmented(None).batches(BATCH):
        weights = weights_of(batch)
        count = len(batch[1]) if weights is None else float(weights.sum())
        model.zero_grad()
        loss(model, batch).backward()
        counted += count
        for name, parameter in named.items():
            if parameter.grad is not None:
                total[name].add_(parameter.grad.detach().cpu(), alpha=count)
    return {name: value / counted for name, value in total.items()}
