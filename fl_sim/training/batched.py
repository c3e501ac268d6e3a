"""Several clients' local SGD as one computation: parameters stacked along a client axis, one `vmap` per step.

Every client keeps its own data order, augmentation draws, mask, number of steps and BatchNorm statistics; the results equal
those of `fl_sim.training.loop.local_sgd`, client by client, up to rounding. Each step runs the clients whose batches have equal
size together, so that no sample is padded and batch statistics are exact. A batched convolution is a grouped one: this
pays on a device that one client's batch leaves idle, such as a GPU, and not on a CPU.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.functional import cross_entropy

from fl_sim.core.errors import USERS_OWN, in_one_line
from fl_sim.core.types import Mask, Params
from fl_sim.data import Split
from fl_sim.gating import Gated
from fl_sim.models.layers import statistics_layers
from fl_sim.models.module_state import ModuleState
from fl_sim.models.parameters import COUNTER, entries, load, tensors
from fl_sim.training.loop import SCHEDULES, Training, endless
from fl_sim.training.precision import PRECISIONS
from fl_sim.training.tasks import Criterion

Stacked = dict[str, Tensor]
"""Name -> (clients, *shape)."""


@dataclass(frozen=True)
class Member:
    """A client of a batch: its data, the mask it trains under, and its CPU generator."""

    data: Split
    mask: Mask | None
    rng: torch.Generator


@dataclass(frozen=True)
class Trained:
    """A client's entries after training, and its metrics as `local_sgd` returns them; the loss may be infinite or NaN.

    `counters` are the buffers that no state dict holds, such as what gates counted.
    """

    entries: Params
    metrics: Mapping[str, float]
    counters: Params

    def put(self, model: nn.Module) -> None:
        """Make a model the client's, as training would have."""
        load(model, self.entries)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in self.counters:
                    buffer.copy_(self.counters[name])


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
    `vmap` has no rule for some operations (LSTM), and cannot run what looks into a value (`.item()`). A buffer that the
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


def fitting(model: nn.Module, data: Split, training: Training) -> int:
    """Count how many clients fit into memory together: half of a GPU's free memory, 1 GB on a CPU; at least one.

    Counted: parameters, their gradients, momentum and a copy, and the outputs of all layers for a batch with gradients.
    """
    device = next(model.parameters()).device
    sizes: list[int] = []
    probe = copy.deepcopy(model).eval()
    for module in probe.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda m, x, out: sizes.append(out.numel()) if torch.is_tensor(out) else None)
    images, _ = next(data.batches(training.batch_size))
    with torch.no_grad():
        probe(images)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    room = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 1_000_000_000
    return max(1, room // (4 * (4 * parameters + 2 * sum(sizes) * training.batch_size // len(images))))


def fit(
    model: nn.Module,
    starts: Sequence[Params],
    members: Sequence[Member],
    training: Training,
    criterion: Criterion = cross_entropy,
) -> list[Trained]:
    """Train every member from its own start (the entries of `model` that change, on its device); `model` lends its structure only.

    `criterion` is the loss of outputs beside targets.

    Generators end in the state that `local_sgd` leaves them in.
    """
    work = [_Work(member, training, model) for member in members]
    # Longest first: the clients of a step are then mostly the first few, a view instead of a copy.
    order = sorted(range(len(work)), key=lambda i: -work[i].steps)
    batch = _Batch(model, [starts[i] for i in order], [work[i] for i in order], training, criterion)
    model.train()
    for step in range(max(w.steps for w in work)):
        for rows, images, labels in batch.draw(step):
            batch.step(step, rows, images, labels)
    if isinstance(model, Gated):
        model.forget_masks()  # those of a whole cohort
    done = batch.trained()
    return [done[order.index(i)] for i in range(len(work))]


class _Work:
    """Work of one client: its number of steps, and its batches."""

    def __init__(self, member: Member, training: Training, model: nn.Module) -> None:
        self.member = member
        samples = training.samples_of_a_pass(model, member.data)
        self.steps = training.steps_of(samples)
        torch.randint(2**62, (), generator=member.rng)  # `local_sgd` seeds dropout first
        self.batches = endless(member.data, training, samples, member.rng)
        self.seen = 0


Rows = slice | Tensor
"""Which clients: the first few (a view), or any (int64 positions)."""


class _Batch:
    """The stacked state of all clients while they train."""

    def __init__(
        self, model: nn.Module, starts: Sequence[Params], work: list[_Work], training: Training, criterion: Criterion
    ) -> None:
        self.model, self.work, self.training, self.criterion = model, work, training, criterion
        self.precision = PRECISIONS[training.precision]
        named = dict(model.named_parameters())
        self.trainable = [name for name, parameter in named.items() if parameter.requires_grad]
        self.fixed = {name: p.detach() for name, p in named.items() if not p.requires_grad}
        own = [name for name in entries(model) if name not in self.fixed]
        stacked = {name: torch.stack([start[name].detach() for start in starts]) for name in own}
        self.params = {name: stacked[name] for name in self.trainable}
        kept = tensors(model).keys()  # constant buffers: the model's own serve all clients
        self.counters = {
            name: torch.stack([buffer.detach()] * len(starts))
            for name, buffer in model.named_buffers()
            if name not in stacked and name not in kept and not name.endswith(COUNTER)
        }
        self.buffers = {name: value for name, value in stacked.items() if name not in self.params} | self.counters
        self.momentum = {n: torch.zeros_like(p) for n, p in self.params.items()} if training.momentum else {}
        self.total = torch.zeros(len(work), device=next(iter(stacked.values())).device)
        self.dead = self._dead()
        self._project(slice(0, len(work)))

    def _dead(self) -> Stacked:
        masks = [work.member.mask or {} for work in self.work]
        dead = {}
        for name in {name for mask in masks for name in mask}:
            whole = torch.ones(self.params[name].shape[1:], dtype=torch.bool)
            dead[name] = ~torch.stack([mask.get(name, whole) for mask in masks]).to(self.total.device)
        return dead

    def _project(self, rows: Rows) -> None:
        """Zero what the clients' masks have pruned."""
        for name, dead in self.dead.items():
            self.params[name][rows] = self.params[name][rows].masked_fill(dead[rows], 0.0)

    def draw(self, step: int) -> Iterator[tuple[Rows, Tensor, Tensor]]:
        """The clients that still train, by the size of their batch: (which, images (K, B, C, H, W), labels (K, B))."""
        sizes: dict[int, list[int]] = {}
        drawn: dict[int, tuple[Tensor, Tensor]] = {}
        for i, work in enumerate(self.work):
            if step < work.steps:
                drawn[i] = images, labels = next(work.batches)
                work.seen += len(labels)
                sizes.setdefault(len(labels), []).append(i)
        for group in sizes.values():
            images, labels = (torch.stack([drawn[i][part] for i in group]) for part in (0, 1))
            first = group == list(range(len(group)))
            yield slice(0, len(group)) if first else torch.tensor(group, device=self.total.device), images, labels

    def step(self, step: int, rows: Rows, images: Tensor, labels: Tensor) -> None:
        """Take one SGD step for some clients, as `torch.optim.SGD` does it."""
        params = {name: value[rows].detach().requires_grad_() for name, value in self.params.items()}
        buffers = {name: value[rows] for name, value in self.buffers.items()}

        def logits(own: Stacked, statistics: Stacked, x: Tensor) -> Tensor:
            return functional_call(self.model, ({**self.fixed, **own}, statistics), (x,))  # type: ignore[no-any-return]

        with self.precision.context(images.device):
            out = vmap(logits)(params, buffers, images)
            losses = vmap(self.criterion)(out, labels)
        # A client's loss depends on its own parameters only: the gradient of the sum is every client's own.
        grads = torch.autograd.grad(losses.sum(), list(params.values()), allow_unused=True)
        moved = {name: grad for name, grad in zip(params, grads, strict=True) if grad is not None}
        with torch.no_grad():
            self._descend(self._rates(step, rows), rows, moved)
            self._project(rows)
            for name, value in buffers.items():
                self.buffers[name][rows] = value
            self.total[rows] += losses.detach() * labels.shape[1]

    def _rates(self, step: int, rows: Rows) -> Tensor:
        """Each client's learning rate at this step, (K,)."""
        schedule = SCHEDULES[self.training.schedule]
        positions = range(len(self.work))[rows] if isinstance(rows, slice) else rows.tolist()
        return torch.tensor(
            [self.training.lr * schedule(step / self.work[i].steps) for i in positions], device=self.total.device
        )

    def _descend(self, rates: Tensor, rows: Rows, grads: Stacked) -> None:
        options = self.training
        for name, gradient in grads.items():
            value = self.params[name][rows]
            if options.weight_decay:
                gradient = gradient.add(value, alpha=options.weight_decay)
            if options.momentum:
                velocity = self.momentum[name][rows].mul_(options.momentum).add_(gradient)
                self.momentum[name][rows] = velocity
                gradient = gradient.add(velocity, alpha=options.momentum) if options.nesterov else velocity
            rate = rates.view(-1, *(1,) * (gradient.dim() - 1))
            self.params[name][rows] = value - rate * gradient

    def trained(self) -> list[Trained]:
        """Every client's result, in one transfer per entry."""
        stacked = {name: value.cpu() for name, value in {**self.params, **self.buffers}.items()}
        total = self.total.tolist()
        return [
            Trained(
                {name: value[i] for name, value in stacked.items() if name not in self.counters},
                {"loss": total[i] / work.seen, "steps": work.steps, "examples": work.seen},
                {name: value[i] for name, value in stacked.items() if name in self.counters},
            )
            for i, work in enumerate(self.work)
        ]
