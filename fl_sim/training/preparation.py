"""What training changes for its own time: the generator of dropout, which parameters learn, and what stays pruned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fl_sim.core.types import Mask, UserError
from fl_sim.models.parameters import UNWRAPPED


@contextmanager
def dropout_from(rng: torch.Generator | None) -> Iterator[None]:
    """Dropout has no generator argument: seed the global one for the block from `rng`, then put it back as it was."""
    if rng is None:
        yield
        return
    seed = int(torch.randint(2**62, (), generator=rng))
    # Not `torch.manual_seed`: where CUDA has not started, it writes down a stack trace for each backend, at every call.
    used = [torch.default_generator, *(torch.cuda.default_generators if torch.cuda.is_initialized() else ())]
    before = [generator.get_state() for generator in used]
    for generator in used:
        generator.manual_seed(seed)
    try:
        yield
    finally:
        for generator, state in zip(used, before, strict=True):
            generator.set_state(state)


@contextmanager
def trained_alone(model: nn.Module, trainable: Iterable[str] | None) -> Iterator[list[nn.Parameter]]:
    """Require gradients of the named parameters alone; all others are restored to what they were afterwards."""
    named = dict(model.named_parameters())
    unfrozen = {name for name, parameter in named.items() if parameter.requires_grad}
    chosen = unfrozen if trainable is None else set(trainable)
    if unknown := chosen - named.keys():
        raise ValueError(f"no such parameters to train: {', '.join(sorted(unknown))}")
    before = {name: p.requires_grad for name, p in named.items()}
    for name, parameter in named.items():
        parameter.requires_grad_(name in chosen)
    try:
        yield [p for name, p in named.items() if name in chosen]
    finally:
        for name, parameter in named.items():
            parameter.requires_grad_(before[name])
            parameter.grad = None


def projection(model: nn.Module, mask: Mask | None) -> Callable[[], None]:
    """A function that zeroes pruned coordinates, in place."""
    if not mask:
        return lambda: None
    named = dict(model.named_parameters())
    if unknown := [name for name in mask if name not in named]:
        raise UserError(f"the mask names {unknown[0]!r}, which {type(model).__name__} does not have; {UNWRAPPED}")
    weights = [named[name].detach() for name in mask]
    # Multiplying would turn a pruned -x into -0.0, which counts as a value in a sparse payload.
    dead = [~alive.to(weight.device) for alive, weight in zip(mask.values(), weights, strict=True)]

    def project() -> None:
        for weight, pruned in zip(weights, dead, strict=True):
            weight.masked_fill_(pruned, 0.0)

    return project
