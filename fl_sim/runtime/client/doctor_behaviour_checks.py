"""Checks of how a client behaves: called again, after another client, under a mask, for several rounds."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fl_sim.models.parameters import load, snapshot
from fl_sim.runtime.client.doctor_update_checks import learns, listed, masks_what_is_prunable, returns_parameters
from fl_sim.runtime.client.trial import Attempt, Examination
from fl_sim.training.loop import Training, local_sgd

ROUNDS, RISE = 3, 2.0
"""A client's loss after so many rounds of its own may be so many times the first model's at most."""
SLOW = 3.0
"""Times the one training loop's own time from which a client is called slow."""


def leaves_the_task(e: Examination) -> str:
    """It leaves the task as it was."""
    now = e.plain.task.params
    changed = [name for name, value in e.plain.received.items() if name not in now or not torch.equal(now[name], value)]
    return f"it changed task.params in place: {listed(changed)}; other clients share them" if changed else ""


def leaves_nothing(e: Examination) -> str:
    """It leaves the model and the process to the next client as they were."""
    return e.plain.left


def owns_its_update(e: Examination) -> str:
    """Its update is its own memory."""
    attempt = e.attempt(e.fresh)
    before = {name: value.detach().clone() for name, value in attempt.update.params.items()}
    with torch.no_grad():
        for tensor in attempt.model.state_dict().values():
            tensor.zero_()
    shared = [name for name, value in before.items() if not torch.equal(attempt.update.params[name], value)]
    tells = "the next client overwrites; return fl_sim.snapshot(model)"
    return f"it returned the model's own tensors ({listed(shared)}), which {tells}" if shared else ""


def _differ(one: Attempt, other: Attempt) -> str:
    """Difference of two updates in words; empty = equal bit for bit."""
    pairs = [(one.update.params[name], other.update.params[name]) for name in one.received]
    count = sum(int(((a != b) & ~(a.isnan() & b.isnan())).sum()) for a, b in pairs)
    if not count:
        return ""
    largest = max(float((a - b).abs().max()) for a, b in pairs if a.numel())
    return f"{count} of {sum(a.numel() for a, _ in pairs)} values differ, by up to {largest:.2g}"


def keeps_nothing(e: Examination) -> str:
    """It keeps nothing between calls but ctx.state."""
    if difference := _differ(e.plain, e.repeated):
        return (
            f"it depends on the clients before it: {difference} between equal calls around another one; what it keeps in a "
            "module global or on itself belongs into ctx.state"
        )
    if not learns(e) and not _differ(e.plain, e.another):
        return (
            "two clients with other data got the same result: it keeps a result, or uses neither ctx.data nor ctx.rng"
        )
    return ""


def deterministic(e: Examination) -> str:
    """Check determinism: the same task gives the same update."""
    if _differ(e.plain, e.repeated):
        return ""  # said already
    difference = _differ(e.plain, e.again)
    return (
        f"non-deterministic: {difference} between two runs of one task; draw from ctx.rng alone" if difference else ""
    )


def starts_from_the_task(e: Examination) -> str:
    """It starts from the parameters that it received."""
    if _differ(e.plain, e.again) or _differ(e.plain, e.repeated):
        return ""  # said already
    difference = _differ(e.plain, e.after_another)
    return (
        f"it depends on what another client left in the model ({difference}); call fl_sim.load(ctx.model, task.params)"
        if difference
        else ""
    )


def obeys_the_mask(e: Examination) -> str:
    """It trains under the mask that it received."""
    if masks_what_is_prunable(e):
        return ""  # said already
    update, pruned = e.masked.update, {name: ~alive for name, alive in e.mask.items()}
    sent = {name: dead if update.mask is None else dead & update.mask[name] for name, dead in pruned.items()}
    regrown = sum(int((update.params[name] != 0)[where].sum()) for name, where in sent.items())
    total = sum(int(dead.sum()) for dead in pruned.values())
    if regrown:
        return f"mask ignored: {regrown} of {total} pruned weights came back non-zero; pass mask=task.mask to local_sgd"
    if update.mask is None:
        return f"mask ignored: it uploads {total} pruned weights as zeros; return Update(mask=task.mask, ...)"
    return ""


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


def _steps(e: Examination) -> float:
    """Batches that it says it trained on, or as many as an epoch has."""
    told = e.plain.update.metrics.get("steps") if isinstance(e.plain.update.metrics, Mapping) else None
    return told if isinstance(told, (int, float)) else -(-len(e.samples) // Training().batch_size)
