"""Distillation on the server: the new global model learns from a teacher on data that the server holds.

    method = Method(adjust_mask=PruneTo(...), distil=Distil(Distillation(2.0, 0.5), Training(lr=0.05, steps=100)))

Runs after aggregation and pruning, under the mask. The teacher is asked for its logits on the proxy data once a round;
the updates it may listen to are those that travel anyway, so no teacher costs a byte on the wire.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fl_sim.codecs import mask_hash
from fl_sim.core.seeding import Purpose, generator
from fl_sim.core.types import Params, Update, UserError
from fl_sim.data import Split
from fl_sim.models.parameters import snapshot
from fl_sim.runtime.server_context import ServerContext
from fl_sim.training.evaluation import logits
from fl_sim.training.loop import Training
from fl_sim.training.losses import Distillation, FromLogits
from fl_sim.training.model_file import read_model, require
from strategies.server_step import Refine, ServerState, no_refinement

ServerDistillation = Callable[[ServerContext, ServerState, Iterable[Update]], tuple[Iterable[Update], Refine]]
"""(run, state before the round, updates) -> (the same updates, what happens to the new state once they are folded)."""
Teacher = Callable[["Lab", Iterable[Update]], tuple[Iterable[Update], Callable[[Params], Tensor]]]
"""(lab, updates) -> (the same updates, a function from the aggregate to logits (N, K) on the proxy data)."""
CoupleModels = Callable[[Sequence[tuple[ServerContext, ServerState]]], Sequence[Params]]
"""(run, state after the round) of each capacity -> the parameters of each."""
When = Callable[[ServerState, ServerState], bool]
"""(state before the round, state after it) -> whether to distil."""


def no_distillation(
    context: ServerContext, state: ServerState, updates: Iterable[Update]
) -> tuple[Iterable[Update], Refine]:
    """The aggregate, pruned where there is a mask, is the next model."""
    return updates, no_refinement


def no_exchange(capacities: Sequence[tuple[ServerContext, ServerState]]) -> Sequence[Params]:
    """Models of different capacity know nothing of each other."""
    return [state.params for _, state in capacities]


@dataclass(frozen=True, eq=False)
class Lab:
    """Server-side computation: the server's own model, the proxy data, and the state before the round."""

    context: ServerContext
    proxy: Split
    state: ServerState

    def logits(self, params: Params) -> Tensor:
        """Logits (N, K), float32, of the federation's model with these parameters."""
        return logits(self.context.model(params), self.proxy, precision=self.context.precision)

    def taught(self, new: ServerState, teacher: Tensor, objective: Distillation, training: Training) -> Params:
        """Parameters of `new` after training on the proxy data with these logits (N, K), under its mask."""
        labels = torch.where(self.proxy.labels < 0, teacher.argmax(dim=1), self.proxy.labels)
        numbered = replace(self.proxy, labels=torch.arange(len(labels), device=labels.device))
        student = self.context.model(new.params)
        rng = generator(self.context.seed, new.round, Purpose.DISTILLATION)
        training = replace(training, precision=self.context.precision)
        training.fit(student, numbered, FromLogits(teacher, labels, objective), mask=new.mask, rng=rng)
        return new.schema.view(new.schema.flat(snapshot(student)))

    def reconstructed(self, update: Update) -> Params:
        """A client's model as the server knows it: what did not travel is as the client received it."""
        return self.context.exchange.reconstructed(update.params, update.mask, self.state.params)


def lab_of(context: ServerContext, state: ServerState) -> Lab:
    """The lab of a run.

    Raises:
        UserError: the server holds no data.
    """
    if context.proxy is None:
        raise UserError("distillation on the server needs data there: set data.proxy (a share) or data.noise (images)")
    return Lab(context, context.proxy, state)


def aggregate(lab: Lab, updates: Iterable[Update]) -> tuple[Iterable[Update], Callable[[Params], Tensor]]:
    """The aggregate before pruning teaches what is left of it."""
    return updates, lab.logits


def ensemble(lab: Lab, updates: Iterable[Update]) -> tuple[Iterable[Update], Callable[[Params], Tensor]]:
    """The mean of the clients' logits teaches (FedDF; Lin et al., 2020). Each update is asked as it passes: O(N K) memory."""
    heard: list[Tensor] = []

    def listen() -> Iterator[Update]:
        for update in updates:
            value = lab.logits(lab.reconstructed(update)).double()
            heard[:] = [heard[0] + value, heard[1] + 1] if heard else [value, torch.ones((), dtype=torch.float64)]
            yield update

    return listen(), lambda aggregated: (heard[0] / heard[1]).float()


@dataclass(frozen=True)
class ServerTeacherFile:
    """Teacher of the server from a model file, of any architecture with the same classes."""

    path: Path

    def __post_init__(self) -> None:
        require(self.path)

    def __call__(self, lab: Lab, updates: Iterable[Update]) -> tuple[Iterable[Update], Callable[[Params], Tensor]]:
        teacher = read_model(self.path).to(lab.proxy.device)
        return updates, lambda aggregated: logits(teacher, lab.proxy, precision=lab.context.precision)


def always(before: ServerState, after: ServerState) -> bool:
    """Every round."""
    return True


def after_pruning(before: ServerState, after: ServerState) -> bool:
    """Distil only when the mask changed: otherwise the aggregate would teach itself."""
    if after.mask is None:
        return False
    return before.mask is None or mask_hash(before.mask) != mask_hash(after.mask)


@dataclass(frozen=True)
class Distil:
    """Train the new global model on the proxy data, under its mask.

    Proxy images without a label (-1) take the teacher's first choice. BatchNorm statistics become those of the proxy.

    Attributes:
        objective: weighs teacher against labels.
        training: the training loop's hyper-parameters.
        teacher: who gives the logits.
        when: in which rounds.
    """

    objective: Distillation
    training: Training
    teacher: Teacher = aggregate
    when: When = after_pruning

    def __call__(
        self, context: ServerContext, state: ServerState, updates: Iterable[Update]
    ) -> tuple[Iterable[Update], Refine]:
        lab = lab_of(context, state)
        updates, asked = self.teacher(lab, updates)
        return updates, partial(self._refine, lab, asked)

    def _refine(self, lab: Lab, asked: Callable[[Params], Tensor], new: ServerState, aggregated: Params) -> Params:
        if not self.when(lab.state, new):
            return new.params
        return lab.taught(new, asked(aggregated), self.objective, self.training)


@dataclass(frozen=True)
class LearnFromAll:
    """Each capacity's new global model learns from the mean logits of all of them.

    FedDF (Lin et al., 2020, algorithm 3) with one deviation: it averages over all clients' models, this over the models
    that were aggregated, one of each capacity.
    """

    objective: Distillation
    training: Training

    def __call__(self, capacities: Sequence[tuple[ServerContext, ServerState]]) -> Sequence[Params]:
        labs = [(lab_of(context, state), state) for context, state in capacities]
        teacher = torch.stack([lab.logits(state.params) for lab, state in labs]).mean(dim=0)
        return [lab.taught(state, teacher, self.objective, self.training) for lab, state in labs]


# The aggregate has something to teach only where pruning took it away.
TEACHERS: Mapping[str, tuple[Teacher, When]] = {"aggregate": (aggregate, after_pruning), "ensemble": (ensemble, always)}


def server_distillation(
    *,
    teacher: str = "aggregate",
    steps: int = 100,
    lr: float = 0.05,
    batch_size: int = 64,
    temperature: float = 2.0,
    alpha: float = 0.5,
) -> Distil:
    """Server-side distillation: a preset's `distil` table. It needs `data.proxy` or `data.noise`.

    Args:
        teacher: "aggregate" (the unpruned aggregate, after each pruning), "ensemble" (the clients' models, each round), or a
            model file (each round).
        steps: SGD steps on the server's images.
        lr: learning rate of these steps, above 0; momentum 0.9, cosine schedule, gradients clipped at norm 1.
        batch_size: images per step.
        temperature: softens the logits of teacher and student, above 0.
        alpha: weight of the teacher's loss, from 0 to 1; the labels' loss has 1 - alpha.
    """
    who, when = TEACHERS[teacher] if teacher in TEACHERS else (ServerTeacherFile(Path(teacher)), always)
    return Distil(Distillation(temperature, alpha), server_training(steps, lr, batch_size), who, when)


def server_training(steps: int, lr: float, batch_size: int) -> Training:
    """SGD with momentum 0.9, cosine learning rate, gradients clipped at norm 1."""
    return Training(lr=lr, steps=steps, batch_size=batch_size, momentum=0.9, schedule="cosine", clip_norm=1.0)
