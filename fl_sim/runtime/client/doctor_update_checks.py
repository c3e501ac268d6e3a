"""Checks of what a client returned: is it an update of this model, and does it say what is true?"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from fl_sim.core.types import Update
from fl_sim.models.parameters import COUNTER
from fl_sim.runtime.client.trial import Examination
from fl_sim.runtime.client.update_validation import BadUpdate, examples, numbers
from fl_sim.runtime.client.update_validation import kept as state_tensors


def listed(names: list[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def refused(check: Callable[[], object]) -> str:
    """Run a check of the framework's own; returns its complaint, empty where it has none."""
    try:
        check()
    except BadUpdate as error:
        return str(error)
    return ""


def runs(e: Examination) -> str:
    """It runs and returns an Update."""
    update: object = e.plain.update
    return "" if isinstance(update, Update) else f"it returned {type(update).__name__}, not an fl_sim.Update"


def complete(e: Examination) -> str:
    """It returns every parameter in its shape."""
    got: object = e.plain.update.params
    if not isinstance(got, Mapping):
        return f"params is a {type(got).__name__}, not tensors by name; return fl_sim.snapshot(model)"
    if foreign := [name for name, value in got.items() if not isinstance(value, Tensor)]:
        return f"params[{foreign[0]!r}] is a {type(got[foreign[0]]).__name__}, not a torch.Tensor"
    missing = [name for name in e.plain.received if name not in got]
    if missing:
        return f"parameters missing: {listed(missing)}; return fl_sim.snapshot(model)"
    wrong = [name for name, value in e.plain.received.items() if got[name].shape != value.shape]
    return f"other shapes than received: {listed(wrong)}" if wrong else ""


def no_counters(e: Examination) -> str:
    """It keeps counters of its own out of the mean."""
    extra = [name for name in e.plain.update.params if name not in e.plain.received]
    if any(name.endswith(COUNTER) for name in extra):
        return (
            f"buffers averaged: the update holds {COUNTER}, which counts one process's batches; "
            "return fl_sim.snapshot(model) instead of model.state_dict()"
        )
    return f"names that nobody asked for: {listed(extra)}" if extra else ""


def same_dtypes(e: Examination) -> str:
    """It keeps every dtype, or a wider one."""
    got = e.plain.update.params
    other = [n for n, v in e.plain.received.items() if torch.promote_types(got[n].dtype, v.dtype) != got[n].dtype]
    return (
        f"dtype changed: {other[0]} is {got[other[0]].dtype}, was {e.plain.received[other[0]].dtype}" if other else ""
    )


def finite(e: Examination) -> str:
    """Its values are finite."""
    bad = [name for name in e.plain.received if not bool(e.plain.update.params[name].isfinite().all())]
    return f"NaN or infinite values in {listed(bad)}; lower the learning rate" if bad else ""


def sends_what_it_declares(e: Examination) -> str:
    """It sends the extra tensors that it declares."""
    update = e.plain.update
    try:
        e.extra.encode(e.extra.up, update.extra, update.mask, values="float32", seed=0)
    except ValueError as error:
        return str(error)
    return ""


def returns_parameters(e: Examination) -> str:
    """It returns parameters, not differences."""
    got, received = (_flat(e, params) for params in (e.plain.update.params, e.plain.received))
    far, size = float((got - received).norm()), float(received.norm())
    if float(got.norm()) < size / 2 < far:
        return "differences returned: add task.params to them; an update holds the parameters after training"
    return ""


def _flat(e: Examination, params: Mapping[str, Tensor]) -> Tensor:
    """Flatten the trained parameters, without statistics, to one vector."""
    return torch.cat([params[name].detach().float().reshape(-1) for name, _ in e.model.named_parameters()])


def keeps_tensors(e: Examination) -> str:
    """It keeps tensors, arrays or numbers of its own in ctx.state, nothing else."""
    kept: Mapping[str, object] = dict(e.plain.state)
    for name, value in kept.items():
        if isinstance(value, Tensor) and value.requires_grad:
            return (
                f"ctx.state[{name!r}] is a live parameter, which training goes on changing; keep value.detach().clone()"
            )
    return refused(lambda: state_tensors(kept))


def measures_numbers(e: Examination) -> str:
    """Its metrics are numbers."""
    if problem := refused(lambda: numbers(e.plain.update.metrics)):
        return problem
    for name, value in numbers(e.plain.update.metrics).items():
        if not np.isfinite(value):
            return f"metrics[{name!r}] = {value}: the log shows null in its place"
    return ""


def learns(e: Examination) -> str:
    """It learns something."""
    got = e.plain.update.params
    same = all(torch.equal(got[name], value) for name, value in e.plain.received.items())
    return "nothing changed: it returned the parameters that it received" if same else ""


def trains_statistics(e: Examination) -> str:
    """It updates BatchNorm statistics."""
    if learns(e):
        return ""  # said already
    names = [name for name in e.plain.received if name.endswith(("running_mean", "running_var"))]
    got = e.plain.update.params
    still = names and all(torch.equal(got[name], e.plain.received[name]) for name in names)
    return "BatchNorm statistics did not change: it trains in evaluation mode; call model.train()" if still else ""


def counts_examples(e: Examination) -> str:
    """It says how many examples it has."""
    said = e.plain.update.num_examples
    if problem := refused(lambda: examples(said)):
        return problem
    return (
        ""
        if examples(said) == len(e.samples)
        else f"num_examples = {said}, but it has {len(e.samples)}: its weight in the mean is wrong"
    )


def masks_what_is_prunable(e: Examination) -> str:
    """Its upload mask fits the model."""
    for update in (e.plain.update, e.masked.update):
        for name, mask in (update.mask or {}).items():
            if name not in e.mask:
                return f"mask of {name}, which is not prunable; allowed: {listed(list(e.mask))}"
            if not isinstance(mask, Tensor):
                return f"mask of {name} is a {type(mask).__name__}; needed: a torch.Tensor of bool"
            if mask.dtype != torch.bool or mask.shape != e.mask[name].shape:
                return f"mask of {name} is {mask.dtype} {tuple(mask.shape)}, not bool {tuple(e.mask[name].shape)}"
    return ""
