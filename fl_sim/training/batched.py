"""Several clients' local SGD as one computation: parameters stacked along a client axis, one `vmap` per step.

Every client keeps its own data order, augmentation draws, mask, number of steps and BatchNorm statistics; the results equal
those of `fl_sim.training.loop.local_sgd`, client by client, up to rounding. Each step runs the clients whose batches have equal
size together, so that no sample is padded and batch statistics are exact. A linear layer becomes one batched matrix product,
which pays where a client's step is mostly the calls of its operations: small models on a CPU. A batched convolution is a
grouped one: this pays on a device that one client's batch leaves idle, such as a GPU, and hardly on a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.functional import cross_entropy

from fl_sim.core.types import Mask, Params
from fl_sim.data import Split
from fl_sim.gating import Gated
from fl_sim.models.parameters import COUNTER, entries, load, tensors
from fl_sim.training.draws import Rows, draws
from fl_sim.training.loop import SCHEDULES, Training
from fl_sim.training.precision import PRECISIONS
from fl_sim.training.recurrent import unrolled
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


@dataclass(frozen=True)
class Together(Sequence[Trained]):
    """What came out of clients that trained as one, on the CPU: a `Trained` of each, made when it is asked for.

    Attributes:
        stacked: their entries.
        counters: their buffers that no state dict holds.
        metrics: of each client.
        order: for each client, its position in `stacked`.
    """

    stacked: Stacked
    counters: Stacked
    metrics: Sequence[Mapping[str, float]]
    order: Sequence[int]

    def __len__(self) -> int:
        return len(self.metrics)

    def __getitem__(self, i: int) -> Trained:  # type: ignore[override]  # no slices
        at = self.order[i]
        taken = ({name: value[at] for name, value in each.items()} for each in (self.stacked, self.counters))
        return Trained(next(taken), self.metrics[i], next(taken))

    def flat(self, names: Sequence[str]) -> Tensor | None:
        """All clients' float32 entries side by side, (clients, values), in the order of `names`; None where that is not all of
        them."""
        if any(name not in self.stacked or self.stacked[name].dtype != torch.float32 for name in names):
            return None
        count = len(self)
        wide = torch.cat([self.stacked[name].reshape(count, -1) for name in names], dim=1)
        return wide if list(self.order) == list(range(count)) else wide.index_select(0, torch.tensor(self.order))


def fit(
    model: nn.Module,
    starts: Sequence[Params],
    members: Sequence[Member],
    training: Training,
    criterion: Criterion = cross_entropy,
) -> Together:
    """Train every member from its own start (the entries of `model` that change, on its device); `model` lends its structure only.

    `criterion` is the loss of outputs beside targets. A start that stands for several clients may be one object.

    Generators end in the state that `local_sgd` leaves them in.
    """
    samples = [training.samples_of_a_pass(model, member.data) for member in members]
    steps = [training.steps_of(count) for count in samples]
    # Longest first: the clients of a step are then mostly the first few, a view instead of a copy.
    order = sorted(range(len(members)), key=lambda i: -steps[i])
    for member in members:
        torch.randint(2**62, (), generator=member.rng)  # `local_sgd` seeds dropout first
    sorted_members = [members[i] for i in order]
    batch = _Batch(model, [starts[i] for i in order], sorted_members, [steps[i] for i in order], training, criterion)
    batches = draws(
        [m.data for m in sorted_members], [m.rng for m in sorted_members], [samples[i] for i in order], training
    )
    model.train()
    with unrolled(model):
        for step in range(max(steps)):
            for rows, inputs, targets in batches.next(sum(one > step for one in steps)):
                batch.step(step, rows, inputs, targets)
    if isinstance(model, Gated):
        model.forget_masks()  # those of a whole cohort
    return batch.trained(order)


class _Batch:
    """The stacked state of all clients while they train."""

    def __init__(
        self,
        model: nn.Module,
        starts: Sequence[Params],
        members: Sequence[Member],
        steps: Sequence[int],
        training: Training,
        criterion: Criterion,
    ) -> None:
        self.model, self.steps, self.training, self.criterion = model, steps, training, criterion
        self.precision = PRECISIONS[training.precision]
        named = dict(model.named_parameters())
        self.trainable = [name for name, parameter in named.items() if parameter.requires_grad]
        self.fixed = {name: p.detach() for name, p in named.items() if not p.requires_grad}
        own = [name for name in entries(model) if name not in self.fixed]
        stacked = {name: _stacked([start[name] for start in starts]) for name in own}
        self.params = {name: stacked[name] for name in self.trainable}
        kept = tensors(model).keys()  # constant buffers: the model's own serve all clients
        self.counters = {
            name: _stacked([buffer] * len(starts))
            for name, buffer in model.named_buffers()
            if name not in stacked and name not in kept and not name.endswith(COUNTER)
        }
        self.buffers = {name: value for name, value in stacked.items() if name not in self.params} | self.counters
        self.momentum = {n: torch.zeros_like(p) for n, p in self.params.items()} if training.momentum else {}
        self.total = torch.zeros(len(starts), device=next(iter(stacked.values())).device)
        self.seen = [0] * len(starts)
        self.dead = self._dead(members)
        self._project(slice(0, len(starts)))

    def _dead(self, members: Sequence[Member]) -> Stacked:
        """What the clients' masks have pruned; of one mask that all clients have, (1, *shape)."""
        masks = [member.mask or {} for member in members]
        masks = masks[:1] if all(mask is masks[0] for mask in masks) else masks
        dead = {}
        for name in {name for mask in masks for name in mask}:
            whole = torch.ones(self.params[name].shape[1:], dtype=torch.bool)
            dead[name] = ~torch.stack([mask.get(name, whole) for mask in masks]).to(self.total.device)
        return dead

    def _project(self, rows: Rows) -> None:
        """Zero what the clients' masks have pruned."""
        for name, dead in self.dead.items():
            own = dead if len(dead) == 1 else dead[rows]
            if isinstance(rows, slice):
                self.params[name][rows].masked_fill_(own, 0.0)
            else:
                self.params[name][rows] = self.params[name][rows].masked_fill(own, 0.0)

    def step(self, step: int, rows: Rows, inputs: Tensor, targets: Tensor) -> None:
        """Take one SGD step for some clients, as `torch.optim.SGD` does it."""
        params = {name: value[rows].detach().requires_grad_() for name, value in self.params.items()}
        buffers = {name: value[rows] for name, value in self.buffers.items()}

        def logits(own: Stacked, statistics: Stacked, x: Tensor) -> Tensor:
            return functional_call(self.model, ({**self.fixed, **own}, statistics), (x,))  # type: ignore[no-any-return]

        with self.precision.context(inputs.device):
            out = vmap(logits)(params, buffers, inputs)
            losses = vmap(self.criterion)(out, targets)
        # A client's loss depends on its own parameters only: the gradient of the sum is every client's own.
        grads = torch.autograd.grad(losses.sum(), list(params.values()), allow_unused=True)
        moved = {name: grad for name, grad in zip(params, grads, strict=True) if grad is not None}
        with torch.no_grad():
            self._descend(self._rates(step, rows), rows, moved)
            self._project(rows)
            for name, value in buffers.items():
                self.buffers[name][rows] = value
            self.total[rows] += losses.detach() * targets.shape[1]
        for i in self._positions(rows):
            self.seen[i] += targets.shape[1]

    def _positions(self, rows: Rows) -> Sequence[int]:
        return range(len(self.steps))[rows] if isinstance(rows, slice) else rows.tolist()

    def _rates(self, step: int, rows: Rows) -> float | Tensor:
        """The clients' learning rate at this step: one, or one of each, (K,)."""
        schedule = SCHEDULES[self.training.schedule]
        rates = {steps: self.training.lr * schedule(step / steps) for steps in set(self.steps)}
        if len(set(rates.values())) == 1:
            return next(iter(rates.values()))
        return torch.tensor([rates[self.steps[i]] for i in self._positions(rows)], device=self.total.device)

    def _descend(self, rates: float | Tensor, rows: Rows, grads: Stacked) -> None:
        options = self.training
        for name, gradient in grads.items():
            value = self.params[name][rows]
            if options.weight_decay:
                gradient = gradient.add(value, alpha=options.weight_decay)
            if options.momentum:
                velocity = self.momentum[name][rows].mul_(options.momentum).add_(gradient)
                self.momentum[name][rows] = velocity
                gradient = gradient.add(velocity, alpha=options.momentum) if options.nesterov else velocity
            if isinstance(rates, float):
                value.add_(gradient, alpha=-rates)
            else:
                value.sub_(rates.view(-1, *(1,) * (gradient.dim() - 1)) * gradient)
            if not isinstance(rows, slice):  # a copy, not a view
                self.params[name][rows] = value

    def trained(self, order: Sequence[int]) -> Together:
        """Every client's result, in one transfer per entry; `order` gives the number of each client of the stack."""
        total = self.total.tolist()
        metrics: list[Mapping[str, float]] = [{}] * len(order)
        position = [0] * len(order)
        for at, i in enumerate(order):
            metrics[i] = {"loss": total[at] / self.seen[at], "steps": self.steps[at], "examples": self.seen[at]}
            position[i] = at
        stacked = {name: value.cpu() for name, value in {**self.params, **self.buffers}.items()}
        counters = {name: stacked.pop(name) for name in self.counters}
        return Together(stacked, counters, metrics, position)


def _stacked(values: Sequence[Tensor]) -> Tensor:
    """The values of all clients, (clients, *shape); one that all share is copied at once."""
    first = values[0].detach()
    if all(value is values[0] for value in values):
        return first.expand(len(values), *first.shape).clone(memory_format=torch.contiguous_format)
    return torch.stack([value.detach() for value in values])
