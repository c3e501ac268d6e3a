"""The cohort engine: the clients of a round train as one vectorised batch (`fl_sim.training.batched`), in this process.

What a client reads, checks and keeps, and what the server does with its reply, is the same code client by client as on the
other engines. Plain uploads are chosen and encoded together as well (`fl_sim.runtime.client.uploads`), with the same bytes.
What cannot be batched runs one client after the other, and the log says so once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from fl_sim.communication.flower_private import set_message_id
from fl_sim.core.errors import USERS_OWN
from fl_sim.core.types import Mask, Metrics, Params, Task, Update
from fl_sim.data import Split
from fl_sim.runtime.client import uploads
from fl_sim.runtime.client.host import ClientHost, ClientTask
from fl_sim.runtime.client.uploads import Made
from fl_sim.runtime.grids.base import LocalGrid, execute, request_of
from fl_sim.training.batchable import failure, fitting, obstacle
from fl_sim.training.batched import Member, Trained, fit
from fl_sim.training.client import Client, ClientContext
from fl_sim.training.loop import Training, Trains, check_converged
from fl_sim.training.losses import Loss

log = logging.getLogger("fl_sim")
TRAIN = "train"
Run = Callable[[Message, Context], Message]
"""(request, context) -> reply."""


@runtime_checkable
class Stackable(Protocol):
    """A client that can tell whether its training is plain local SGD, and can take the result from elsewhere."""

    def plain_training(self) -> Training | None:
        """The hyper-parameters of SGD on the task's loss under the task's mask; None where it does anything else."""

    @property
    def setting(self) -> Callable[[Task, ClientContext], AbstractContextManager[None]]:
        """Context manager active while all clients of a round train, the same for all."""

    def trained_by(self, trains: Trains) -> Client:
        """Replace the client's training."""

    @property
    def reads_parameters_alone(self) -> bool:
        """Whether what follows the training looks at the trained parameters alone: then `update_of` is the same in less time."""

    @property
    def sends_all(self) -> bool:
        """Whether the client sends everything while there is no pruning mask."""

    def upload_masks(self, received: Tensor, rows: Tensor) -> Tensor | None:
        """What all clients choose to upload; None = each chooses by itself."""

    def update_of(
        self,
        task: Task,
        ctx: ClientContext,
        params: Params,
        metrics: Metrics,
        prunable: Sequence[str],
        chosen: Mask | None = None,
    ) -> Update:
        """The update of trained parameters, in the order of `task.params`; `prunable` are the names of those that are."""


@dataclass(frozen=True)
class Ready:
    """Stands for a training that was done already: puts its result into the model."""

    trained: Trained
    training: Training

    def fit(
        self, model: nn.Module, data: Split, loss: Loss, *, mask: Mask | None, rng: torch.Generator | None
    ) -> Metrics:
        """See `Training.fit`."""
        self.trained.put(model)
        check_converged(self.trained.metrics["loss"], int(self.trained.metrics["steps"]), self.training.lr)
        return dict(self.trained.metrics)

    def at(self, number: int) -> Ready:
        """See `Trains.at`: the training is over."""
        return self


def obstacle_of(client: Client, model: nn.Module, data: Split) -> str | None:
    """Why clients of this kind cannot train as one batch, as far as can be told without trying it; None = they can."""
    training = _training(client)
    if training is None:
        return "the client does more than local SGD"
    return obstacle(model, training) or ("weights of samples" if data.weights is not None else None)


class CohortGrid(LocalGrid):
    """Trains up to `chunk` clients together (None: as many as memory holds); all else runs as inline."""

    def __init__(
        self, app: ClientApp, hosts: Callable[[Context], ClientHost], num_nodes: int, *, chunk: int | None = None
    ) -> None:
        super().__init__(num_nodes)
        self._app, self._hosts, self._chunk = app, hosts, chunk
        self._said: set[str] = set()
        self._sizes: dict[int, int] = {}
        self._failures: dict[int, str | None] = {}
        self._able: dict[int, bool] = {}
        self._ready = 0

    def ready(self) -> int:
        """See `LocalGrid`: of clients that trained together."""
        return self._ready

    def stream(self, messages: list[Message], timeout: float | None) -> Iterator[Message]:
        self._able.clear()
        at = 0
        while at < len(messages):
            host = self._hosts(self.contexts[messages[at].metadata.dst_node_id])
            # A batch has one learning rate and one setting, those of its round: without rounds, tasks of several may be here.
            number = messages[at].metadata.group_id
            sized = messages[at : at + self._size(host)]
            others = (i for i, message in enumerate(sized) if message.metadata.group_id != number)
            part = sized[: next(others, len(sized))]
            yield from self._train_together(part)
            at += len(part)

    def _size(self, host: ClientHost) -> int:
        training = _training(host.client)
        if self._chunk is not None or training is None or not self._can(host):
            return self._chunk or 1
        if id(host) not in self._sizes:
            self._sizes[id(host)] = fitting(host.model, host.split_of(0), training)
        return self._sizes[id(host)]

    def _train_together(self, messages: list[Message]) -> Iterator[Message]:
        begun = [self._begin(message) for message in messages]
        finish = self._train([b for b in begun if b.client_task is not None])
        self._ready = len(messages)
        for message, beginning in zip(messages, begun, strict=True):
            self._ready -= 1
            run = finish.get(id(beginning), beginning.run)
            reply = execute(run, beginning.request, self.contexts[message.metadata.dst_node_id])
            set_message_id(reply, f"r{message.metadata.message_id}")
            yield reply

    def _begin(self, message: Message) -> _Begun:
        request, context = request_of(message), self.contexts[message.metadata.dst_node_id]
        host = self._hosts(context)
        if message.metadata.message_type != TRAIN or not self._can(host):
            return _Begun(request, host, self._app)
        try:
            return _Begun(request, host, self._app, host.begin(request, context))
        except USERS_OWN as error:
            return _Begun(request, host, partial(_fail, error))

    def _can(self, host: ClientHost) -> bool:
        """Whether the host's clients train as one; looked at once for all messages of a call."""
        if id(host) not in self._able:
            why = self._hindrance(host)
            if why is not None and why not in self._said:
                self._said.add(why)
                log.warning("the cohort engine trains client by client here: %s", why)
            self._able[id(host)] = why is None
        return self._able[id(host)]

    def _hindrance(self, host: ClientHost) -> str | None:
        data = host.split_of(0)
        why = obstacle_of(host.client, host.model, data)
        if why is None and id(host) not in self._failures:
            training = _training(host.client)
            assert training is not None
            self._failures[id(host)] = failure(host.model, data, training.at(1), host.learning.criterion)
        return why or self._failures.get(id(host))

    def _train(self, begun: Sequence[_Begun]) -> dict[int, Run]:
        """Train the clients of each host together; returns what makes each one's reply."""
        runs: dict[int, Run] = {}
        for host in {id(b.host): b.host for b in begun}.values():
            mine = [b for b in begun if b.host is host]
            runs |= dict(zip(map(id, mine), _trained(host, [_task_of(b) for b in mine]), strict=True))
        return runs


@dataclass(frozen=True, eq=False)
class _Begun:
    """A message on its way: with a task its training is taken together with others, without one `run` does all."""

    request: Message
    host: ClientHost
    run: Run
    client_task: ClientTask | None = None


def _task_of(begun: _Begun) -> ClientTask:
    assert begun.client_task is not None
    return begun.client_task


def _trained(host: ClientHost, tasks: Sequence[ClientTask]) -> list[Run]:
    """Train clients of one host together; returns what makes the reply of each."""
    client, training = host.client, _training(host.client)
    assert isinstance(client, Stackable)
    assert training is not None
    training = training.at(tasks[0].task.round)
    members = [Member(v.ctx.data, v.task.mask, v.ctx.rng) for v in tasks]
    starts = _starts(host, tasks)  # before the setting, which puts back nothing that it set
    with client.setting(tasks[0].task, tasks[0].ctx):
        together = fit(host.model, starts, members, training, host.learning.criterion)
    schema = host.exchange.schema
    quick = host.needs_no_model_after_training and client.reads_parameters_alone
    flat = together.flat(schema.names) if quick else None
    if flat is None:
        return [
            partial(_finish, host, one, client.trained_by(Ready(trained, training)))
            for one, trained in zip(tasks, together, strict=True)
        ]
    all_metrics = together.metrics
    del together  # `flat` has a copy of what was trained, beside which payloads are made
    made = uploads.together(
        host.exchange,
        [one.task for one in tasks],
        [one.feedback for one in tasks],
        flat,
        seeds=[one.ctx.seed for one in tasks],
        choose=client.upload_masks,
        sends_all=client.sends_all,
    )
    return [
        partial(_answer, host, client, one, schema.view(row), metrics, training.lr, mine)
        for one, row, metrics, mine in zip(tasks, flat.unbind(), all_metrics, made, strict=True)
    ]


def _starts(host: ClientHost, tasks: Sequence[ClientTask]) -> list[Params]:
    """What each client starts from; one object for all that received the same and keep nothing of their own."""
    shared: dict[int, Params] = {}
    starts = []
    for one in tasks:
        if one.personal:
            starts.append(host.start(one))
            continue
        if id(one.received) not in shared:
            shared[id(one.received)] = host.start(one)
        starts.append(shared[id(one.received)])
    return starts


def _finish(host: ClientHost, one: ClientTask, client: Client, message: Message, context: Context) -> Message:
    """Run a client whose training is over, on the resident model."""
    return host.finish(one, client, message, context)


def _answer(
    host: ClientHost,
    client: Stackable,
    one: ClientTask,
    params: Params,
    metrics: Mapping[str, float],
    lr: float,
    made: Made,
    message: Message,
    context: Context,
) -> Message:
    """The same of a client that reads the parameters alone, without the model."""
    check_converged(metrics["loss"], int(metrics["steps"]), lr)
    update = client.update_of(one.task, one.ctx, params, dict(metrics), host.exchange.schema.prunable, made.mask)
    return host.answer(one, update, message, context, made)


def _fail(error: BaseException, message: Message, context: Context) -> Message:
    raise error


def _training(client: Client) -> Training | None:
    return client.plain_training() if isinstance(client, Stackable) else None
