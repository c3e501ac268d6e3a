"""Runs a client on tiny data and says in plain words what is wrong with it.

for finding in examine(my_client):
    print(finding.check, finding.problem or "ok")

The client runs on a few digits and a small network with BatchNorm: as it is, again with other global random numbers, on
a model that another client left behind, and under a mask. Nothing travels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fl_sim import data, models
from fl_sim.core.errors import told
from fl_sim.core.types import Scalar, Update
from fl_sim.models.parameters import COUNTER, load, snapshot
from fl_sim.runtime.client.trial import Attempt, Examination
from fl_sim.training.client import Client
from fl_sim.training.loop import Training, local_sgd

SAMPLES = 96
ROUNDS, RISE = 3, 2.0
"""A client's loss after so many rounds of its own may be so many times the first model's at most."""
SLOW = 3.0
"""Times the one training loop's own time from which a client is called slow."""


@dataclass(frozen=True)
class Finding:
    """One check: what is right, and what is wrong with this client; empty = nothing."""

    check: str
    problem: str


def examine(client: Client, *, model: str = "cnn_bn", config: Mapping[str, Scalar] | None = None) -> list[Finding]:
    """Try a client; one finding a check, in order. Where the client gives nothing usable, only the checks that say so.

    Raises:
        UserError: no such model.
    """
    torch.set_num_threads(1)
    digits = data.load("digits")
    channels, height, _ = digits.shape
    built = models.build(model, num_classes=digits.num_classes, in_channels=channels, image_size=height)
    samples = digits.train.subset(np.arange(SAMPLES))
    examination = Examination(client, built, samples, config or {})
    findings = []
    for checks in (NEEDED, CHECKS):
        for check in checks:
            try:
                problem = check(examination)
            except Exception as error:  # the client's own, whatever it is: this is what a doctor is for
                problem = f"it raised {told(error)}"
            findings.append(Finding((check.__doc__ or "").rstrip("."), problem))
        if any(finding.problem for finding in findings):
            break
    return findings


def _names(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def runs(e: Examination) -> str:
    """It runs and returns an Update."""
    update: object = e.plain.update
    return "" if isinstance(update, Update) else f"it returned {type(update).__name__}, not an fl_sim.Update"


def complete(e: Examination) -> str:
    """It returns every parameter in its shape."""
    if not isinstance(e.plain.update, Update):
        return "there is no update to look at"
    got: object = e.plain.update.params
    if not isinstance(got, Mapping):
        return f"params is a {type(got).__name__}, not tensors by name; return fl_sim.snapshot(model)"
    if foreign := [name for name, value in got.items() if not isinstance(value, Tensor)]:
        return f"params[{foreign[0]!r}] is a {type(got[foreign[0]]).__name__}, not a torch.Tensor"
    missing = [name for name in e.plain.received if name not in got]
    if missing:
        return f"parameters missing: {_names(missing)}; return fl_sim.snapshot(model)"
    wrong = [name for name, value in e.plain.received.items() if got[name].shape != value.shape]
    return f"other shapes than received: {_names(wrong)}" if wrong else ""


def no_counters(e: Examination) -> str:
    """It keeps counters of its own out of the mean."""
    extra = [name for name in e.plain.update.params if name not in e.plain.received]
    if any(name.endswith(COUNTER) for name in extra):
        return (
            f"buffers averaged: the update holds {COUNTER}, which counts one process's batches; "
            "return fl_sim.snapshot(model) instead of model.state_dict()"
        )
    return f"names that nobody asked for: {_names(extra)}" if extra else ""


def same_dtypes(e: Examination) -> str:
    """It keeps every dtype."""
    got = e.plain.update.params
    other = [name for name, value in e.plain.received.items() if got[name].dtype != value.dtype]
    return (
        f"dtype changed: {other[0]} is {got[other[0]].dtype}, was {e.plain.received[other[0]].dtype}" if other else ""
    )


def finite(e: Examination) -> str:
    """Its values are finite."""
    bad = [name for name in e.plain.received if not bool(e.plain.update.params[name].isfinite().all())]
    return f"NaN or infinite values in {_names(bad)}; lower the learning rate" if bad else ""


def returns_parameters(e: Examination) -> str:
    """It returns parameters, not differences."""
    got, received = (_flat(e, params) for params in (e.plain.update.params, e.plain.received))
    far, size = float((got - received).norm()), float(received.norm())
    if float(got.norm()) < size / 2 < far:
        return "differences returned: add task.params to them; an update holds the parameters after training"
    return ""


def _flat(e: Examination, params: Mapping[str, Tensor]) -> Tensor:
    """What is trained, without statistics, as one vector."""
    return torch.cat([params[name].detach().float().reshape(-1) for name, _ in e.model.named_parameters()])


def descends(e: Examination) -> str:
    """Its loss does not rise over three rounds."""
    if returns_parameters(e):
        return ""  # said already
    start, params = _loss(e, e.plain.received), e.plain.update.params
    for _ in range(ROUNDS - 1):
        params = e.attempt(e.fresh, start={name: params[name] for name in e.plain.received}).update.params
    end = _loss(e, params)
    if not end <= RISE * start:  # NaN as well
        return f"training diverges: loss {start:.2f} before, {end:.2f} after {ROUNDS} rounds; lower the learning rate"
    return ""


def _loss(e: Examination, params: Mapping[str, Tensor]) -> float:
    """Cross-entropy on the samples, with the batch's own BatchNorm statistics."""
    images, labels = next(e.samples.batches(len(e.samples)))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        model = load(e.fresh, {name: params[name] for name in e.plain.received}).train()
        return float(nn.functional.cross_entropy(model(images), labels))


def keeps_tensors(e: Examination) -> str:
    """It keeps tensors of its own in ctx.state, nothing else."""
    kept: Mapping[str, object] = dict(e.plain.state)
    for name, value in kept.items():
        where = f"ctx.state[{name!r}]"
        if not isinstance(value, Tensor):
            return (
                f"{where} is a {type(value).__name__}: only tensors are kept between rounds; use torch.as_tensor(...)"
            )
        if value.requires_grad:
            return f"{where} is a live parameter, which training goes on changing; keep value.detach().clone()"
        if value.dtype == torch.bfloat16:
            return f"{where} is torch.bfloat16, which cannot be kept; use .float()"
    return ""


def measures_numbers(e: Examination) -> str:
    """Its metrics are numbers."""
    metrics: object = e.plain.update.metrics
    if not isinstance(metrics, Mapping):
        return f"metrics is a {type(metrics).__name__}; needed: numbers by name, {{}} for none"
    for name, value in metrics.items():
        if not isinstance(value, (int, float, np.integer, np.floating)):
            return f"metrics[{name!r}] is a {type(value).__name__}; needed: a number, such as float(loss)"
        if not np.isfinite(value):
            return f"metrics[{name!r}] = {value}: the log holds finite numbers"
    return ""


def leaves_nothing(e: Examination) -> str:
    """It leaves the model and the process to the next client as they were."""
    return e.plain.left


def learns(e: Examination) -> str:
    """It learns something."""
    got = e.plain.update.params
    same = all(torch.equal(got[name], value) for name, value in e.plain.received.items())
    return "nothing changed: it returned the parameters that it received" if same else ""


def trains_statistics(e: Examination) -> str:
    """It updates BatchNorm statistics."""
    names = [name for name in e.plain.received if name.endswith(("running_mean", "running_var"))]
    got = e.plain.update.params
    still = names and all(torch.equal(got[name], e.plain.received[name]) for name in names)
    return "BatchNorm statistics did not change: it trains in evaluation mode; call model.train()" if still else ""


def counts_examples(e: Examination) -> str:
    """It says how many examples it has."""
    said: object = e.plain.update.num_examples
    if isinstance(said, bool) or not isinstance(said, (int, np.integer)):
        return f"num_examples is a {type(said).__name__}; needed: an integer, such as ctx.num_examples"
    return (
        ""
        if said == len(e.samples)
        else f"num_examples = {said}, but it has {len(e.samples)}: its weight in the mean is wrong"
    )


def leaves_the_task(e: Examination) -> str:
    """It leaves the task as it was."""
    changed = [name for name, value in e.plain.received.items() if not torch.equal(e.plain.task.params[name], value)]
    return f"it changed task.params in place: {_names(changed)}; other clients share them" if changed else ""


def owns_its_update(e: Examination) -> str:
    """Its update is its own memory."""
    attempt = e.attempt(e.fresh)
    before = {name: value.detach().clone() for name, value in attempt.update.params.items()}
    with torch.no_grad():
        for tensor in attempt.model.state_dict().values():
            tensor.zero_()
    shared = [name for name, value in before.items() if not torch.equal(attempt.update.params[name], value)]
    tells = "the next client overwrites; return fl_sim.snapshot(model)"
    return f"it returned the model's own tensors ({_names(shared)}), which {tells}" if shared else ""


def _differ(one: Attempt, other: Attempt) -> str:
    """How two updates differ; empty = bit for bit the same."""
    pairs = [(one.update.params[name], other.update.params[name]) for name in one.received]
    count = sum(int(((a != b) & ~(a.isnan() & b.isnan())).sum()) for a, b in pairs)
    if not count:
        return ""
    largest = max(float((a - b).abs().max()) for a, b in pairs if a.numel())
    return f"{count} of {sum(a.numel() for a, _ in pairs)} values differ, by up to {largest:.2g}"


def deterministic(e: Examination) -> str:
    """The same task gives the same update."""
    difference = _differ(e.plain, e.again)
    return (
        f"non-deterministic: {difference} between two runs of one task; draw from ctx.rng alone" if difference else ""
    )


def starts_from_the_task(e: Examination) -> str:
    """It starts from the parameters that it received."""
    if _differ(e.plain, e.again):
        return ""  # said already
    difference = _differ(e.plain, e.after_another)
    return (
        f"it depends on what another client left in the model ({difference}); call fl_sim.load(ctx.model, task.params)"
        if difference
        else ""
    )


def obeys_the_mask(e: Examination) -> str:
    """It trains under the mask that it received."""
    update, pruned = e.masked.update, {name: ~alive for name, alive in e.mask.items()}
    sent = {name: dead if update.mask is None else dead & update.mask[name] for name, dead in pruned.items()}
    regrown = sum(int((update.params[name] != 0)[where].sum()) for name, where in sent.items())
    total = sum(int(dead.sum()) for dead in pruned.values())
    if regrown:
        return f"mask ignored: {regrown} of {total} pruned weights came back non-zero; pass mask=task.mask to local_sgd"
    if update.mask is None:
        return f"mask ignored: it uploads {total} pruned weights as zeros; return Update(mask=task.mask, ...)"
    return ""


def masks_what_is_prunable(e: Examination) -> str:
    """Its upload mask fits the model."""
    for update in (e.plain.update, e.masked.update):
        for name, mask in (update.mask or {}).items():
            if name not in e.mask:
                return f"mask of {name}, which is not prunable; allowed: {_names(list(e.mask))}"
            if not isinstance(mask, Tensor):
                return f"mask of {name} is a {type(mask).__name__}; needed: a torch.Tensor of bool"
            if mask.dtype != torch.bool or mask.shape != e.mask[name].shape:
                return f"mask of {name} is {mask.dtype} {tuple(mask.shape)}, not bool {tuple(e.mask[name].shape)}"
    return ""


def _steps(e: Examination) -> float:
    """Batches that it says it trained on, or as many as an epoch has."""
    told = e.plain.update.metrics.get("steps") if isinstance(e.plain.update.metrics, Mapping) else None
    return told if isinstance(told, (int, float)) else -(-SAMPLES // Training().batch_size)


def fast(e: Examination) -> str:
    """It is about as fast as the one training loop."""
    steps = int(_steps(e))
    reference, own = [], [e.plain.seconds, e.again.seconds]
    for _ in range(3):
        model = e.fresh
        start = time.perf_counter()
        local_sgd(model, e.samples, steps=max(1, steps), rng=torch.Generator())
        snapshot(model)
        reference.append(time.perf_counter() - start)
        own.append(e.attempt(e.fresh).seconds)
    times = min(own) / min(reference)
    return f"slow: {times:.1f} times the time of local_sgd for {steps} steps" if times > SLOW else ""


Check = Callable[[Examination], str]
NEEDED: tuple[Check, ...] = (runs, complete, finite)
CHECKS: tuple[Check, ...] = (
    no_counters,
    same_dtypes,
    learns,
    returns_parameters,
    trains_statistics,
    counts_examples,
    measures_numbers,
    keeps_tensors,
    leaves_the_task,
    leaves_nothing,
    owns_its_update,
    deterministic,
    starts_from_the_task,
    masks_what_is_prunable,
    obeys_the_mask,
    descends,
    fast,
)
