"""Context managers that leave a model as it was: its parameters, its modes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def restored(parameter: nn.Parameter) -> Iterator[Tensor]:
    """The parameter's values, to be changed in place during the block and given back afterwards."""
    weight = parameter.detach()
    original = weight.clone()
    try:
        yield weight
    finally:
        weight.copy_(original)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the block; every module gets its own mode back."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode
