"""Samples of one pass over a client's data: which are left out so that every batch can be trained on."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fl_sim.data import Split
from fl_sim.models.layers import statistics_layers


def samples_of_a_pass(count: int, batch_size: int, *, drop_last: bool, refuses_one: Callable[[], bool]) -> int:
    """Count the samples that one pass trains on, of `count`.

    Args:
        count: samples of the client.
        batch_size: samples of a batch.
        drop_last: whether a smaller last batch is left out, unless it is the only one.
        refuses_one: whether the model cannot train on a batch of one sample, which is then left out where it is the last of
            several; asked only where it matters.
    """
    rest = count % batch_size
    if rest == count or rest == 0:
        return count
    return count - rest if drop_last or (rest == 1 and refuses_one()) else count


_known: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def refuses_batch_of_one(model: nn.Module, data: Split) -> bool:
    """Whether BatchNorm cannot train on one sample of `data`: some such layer of the model gets one value a channel of it.

    PyTorch raises there: the variance of one value is 0. The model is left as it was; the answer is kept with it.
    """
    if model not in _known:
        _known[model] = _has_single_values(model, data.example(1, next(model.parameters()).device))
    return _known[model]


def _has_single_values(model: nn.Module, one: Tensor) -> bool:
    layers = [
        layer for layer in statistics_layers(model).values() if isinstance(layer, nn.modules.batchnorm._BatchNorm)
    ]
    if not layers:
        return False
    found: list[bool] = []
    hooks = [
        layer.register_forward_pre_hook(lambda layer, inputs: found.append(inputs[0].numel() == inputs[0].shape[1]))
        for layer in layers
    ]
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()(one)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    return any(found)
