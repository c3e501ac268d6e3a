"""Whether clients of a model can train as one batch (`fl_sim.training.batched`), tried on two of them, and how many fit."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fl_sim.core.errors import USERS_OWN, in_one_line
from fl_sim.core.types import Params
from fl_sim.data import Split
from fl_sim.gating import Gated
from fl_sim.models.layers import statistics_layers
from fl_sim.models.module_state import ModuleState
from fl_sim.models.parameters import entries, load
from fl_sim.training.batched import Member, fit
from fl_sim.training.loop import Training
from fl_sim.training.tasks import Criterion


def obstacle(model: nn.Module, training: Training) -> str | None:
    """Why clients of this model cannot be trained as one batch; None = they can."""
    if training.optimizer != "sgd":
        return f"training.optimizer = {training.optimizer!r}"
    if training.clip_norm is not None:
        return "training.clip_norm"
    if training.accumulate > 1:
        return "training.accumulate"
    if any(isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 for module in model.modules()):
        return "dropout, whose draws are one client's alone"
    if any(getattr(layer, "momentum", 0.0) is None for layer in statistics_layers(model).values()):
        return "a normalisation layer that counts batches: its momentum is None"
    if isinstance(model, Gated) and not all(gate.silences for gate in model.gates.values()):
        return "gates that mask gradients alone"
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        return "a scripted module"
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return "forward hooks"
    return None


def failure(model: nn.Module, data: Split, training: Training, criterion: Criterion = cross_entropy) -> str | None:
    """Train two clients for one step as a batch, on a copy of the model; why that fails or gives other values, or None.

    A forward pass that counts or remembers is one pass of all clients here, and one of each client elsewhere.
    `vmap` has no rule for some operations, and cannot run what looks into a value (`.item()`). A buffer that the
    forward pass replaces, rather than writes into, stays as it was.
    """
    probe = copy.deepcopy(model)
    built = ModuleState(probe)
    start = {n: v.detach() for n, v in entries(probe).items() if v.requires_grad or not isinstance(v, nn.Parameter)}
    start = {name: value.clone() for name, value in start.items()}
    few, once = data.subset(np.arange(min(len(data), 2))), replace(training, epochs=1, steps=1)
    members = [Member(few, None, torch.Generator().manual_seed(0)) for _ in range(2)]
    try:
        together = fit(probe, [start for _ in members], members, once, criterion)
        load(probe, start)  # a module under two names keeps the tensors of the batch
    except USERS_OWN as error:  # whatever PyTorch says of a model that is the user's own
        return f"torch.func.vmap cannot run this model ({in_one_line(error)})"
    finally:
        left_something = not isinstance(probe, Gated) and not built.is_as_built()  # gates remember their last mask
        built.put_back()
    if left_something:
        return "its forward pass leaves something on the model"
    if isinstance(probe, Gated):
        return None  # what its gates are set to is known where it trains
    try:
        once.fit(
            probe, few, lambda own, batch: criterion(own(batch[0]), batch[1]), rng=torch.Generator().manual_seed(0)
        )
    except USERS_OWN as error:  # each client will say so
        return f"a step of one client alone fails ({in_one_line(error)})"
    differing = _differing(start, together[0].entries, entries(probe))
    return f"{differing!r} comes out otherwise when clients train together" if differing else None


TOLERANCE = 0.05
"""Of the largest change of an entry: what two orders of summation may differ in after a step on two samples, and more."""


def _differing(start: Params, together: Params, alone: Params) -> str | None:
    """The first entry whose values after a step differ by more than rounding."""
    for name, before in start.items():
        one, other = together[name].to(before.device).double(), alone[name].detach().double()
        largest = (other - before).abs().max() if before.numel() else torch.tensor(0.0)
        if not torch.allclose(one, other, rtol=1e-4, atol=1e-6 + TOLERANCE * float(largest), equal_nan=True):
            return name
    return None


MOST_ON_CPU = 512
"""Clients that train together on a CPU: more were no faster, and each is held in memory until the last has trained."""
PER_STATE = 12
"""Values that a step of a recurrent layer leaves for the backward pass, for each unit of its output."""


def fitting(model: nn.Module, data: Split, training: Training) -> int:
    """Count how many clients fit into memory together: half of a GPU's free memory, 1 GB on a CPU and at most `MOST_ON_CPU`; at
    least one.

    Counted: parameters, their gradients, momentum and a copy, and the outputs of all layers for a batch with gradients.
    """
    device = next(model.parameters()).device
    sizes: list[int] = []

    def count(module: nn.Module, inputs: object, output: object) -> None:
        if torch.is_tensor(output):
            sizes.append(output.numel())
        elif isinstance(module, nn.RNNBase) and isinstance(output, tuple) and torch.is_tensor(output[0]):
            sizes.append(PER_STATE * output[0].numel())

    probe = copy.deepcopy(model).eval()
    for module in probe.modules():
        if not list(module.children()):
            module.register_forward_hook(count)
    images, _ = next(data.batches(training.batch_size))
    with torch.no_grad():
        probe(images)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    room = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 1_000_000_000
    fit_in = max(1, room // (4 * (4 * parameters + 2 * sum(sizes) * training.batch_size // len(images))))
    return fit_in if device.type == "cuda" else min(fit_in, MOST_ON_CPU)
