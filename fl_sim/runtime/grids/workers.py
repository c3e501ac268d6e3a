"""The workers engine: resident processes on this machine under the same Grid, without Ray.

A process keeps model and data, on one thread. Payloads cross in shared memory: a round's broadcast is written once and
read there by each process, a reply is written once and read there too, unless it has to wait. Pipes carry the rest, which
is our own and Flower's small objects (`Job`, `Answer`, messages without their bytes), pickled by `multiprocessing` between
processes of this program; what a client encoded is bytes to all of them.
"""

from __future__ import annotations

import copy
import multiprocessing as mp
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp

from fl_sim.codecs.payload_memory import lent_by
from fl_sim.core.errors import USERS_OWN, in_one_line
from fl_sim.core.large import LARGE_BYTES
from fl_sim.core.types import UserError
from fl_sim.runtime.grids.dispatch import Finished
from fl_sim.runtime.grids.folding import Fold
from fl_sim.runtime.grids.forkserver import end_with_parent, prepare, without_main
from fl_sim.runtime.grids.open_files import allow_for_workers
from fl_sim.runtime.grids.pool import PooledGrid
from fl_sim.runtime.grids.running_sums import HandIn
from fl_sim.runtime.grids.slots import Areas, Slots
from fl_sim.runtime.grids.watchdog import Watchdog, end_group, own_group
from fl_sim.runtime.grids.worker import Answer, Jobs, Workplace, contents_of
from fl_sim.runtime.state.buffers import Blobs, join, split_off
from fl_sim.runtime.state.shared_memory import Area, Key, Span

Spans = dict[Key, Span]
MOST_WORKERS = 4096
"""Processes that are started at once: a typing error must not take the machine."""


@dataclass(frozen=True)
class WorkersOptions:
    """Options of the workers engine.

    Attributes:
        count: number of worker processes, one thread each; unset = one per core that this process may use.
    """

    count: int | None = None

    def __post_init__(self) -> None:
        if self.count is not None and not 1 <= self.count <= MOST_WORKERS:
            raise UserError(f"workers.count = {self.count}: must be from 1 to {MOST_WORKERS}")


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class _Task:
    """Clients with their contexts (array bytes: in the worker's inbox), contents that the worker has not seen yet
    (array bytes: in the broadcast area), and how their replies are folded, where they are; all of it in one slot."""

    slot: int
    jobs: Jobs
    contexts: list[tuple[Context, Spans]]
    contents: dict[int, tuple[RecordDict, Spans]]
    fold: Fold | None


@dataclass(frozen=True)
class _Result:
    """An answer whose array bytes are in the worker's outbox."""

    answer: Answer
    reply: Spans
    state: Spans


@dataclass(frozen=True)
class _Asked:
    """Hand in what was added up; its array bytes go into the outbox of this slot."""

    slot: int


@dataclass(frozen=True)
class _Sum:
    """A sum whose array bytes are in the worker's outbox."""

    content: RecordDict
    spans: Spans


def _slim(context: Context) -> tuple[Context, Blobs]:
    if not len(context.state):
        return context, {}
    state, blobs = split_off(context.state)
    slim = copy.copy(context)
    slim.state = state
    return slim, blobs


def work(
    factory: Callable[[], ClientApp], pipe: Connection, areas: Areas, path: list[str], environment: Mapping[str, str]
) -> None:
    """The life of a worker process: say that it is ready (or why not), then answer tasks until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program that started this
    own_group()
    end_with_parent()
    # The program ends its workers when it ends, which is what a daemon is. A daemon may start no processes, and a client's
    # `DataLoader(num_workers=1)` does: seen from inside, this is none.
    mp.current_process().daemon = False
    os.environ.update(environment)
    try:
        workplace = Workplace(factory, path)
    except USERS_OWN as error:
        pipe.send(f"{type(error).__name__}: {in_one_line(error)}")
        return
    pipe.send(None)
    contents: dict[int, RecordDict] = {}
    while True:
        try:
            task: _Task | _Asked = pipe.recv()
        except (EOFError, OSError):
            return
        if isinstance(task, _Asked):
            content, blobs = split_off(workplace.hand_in(()))
            pipe.send(_Sum(content, *areas.outbox[task.slot].write([blobs])))
            continue
        wanted = contents_of(task.jobs)
        if task.contents:
            contents = {key: content for key, content in contents.items() if key in wanted}
            # Read where they lie: the next round's broadcast is written when this one's tasks are done.
            contents |= {key: _lent(*told, areas.broadcast) for key, told in task.contents.items()}
        contexts = (_with_state(context, spans, areas.inbox[task.slot]) for context, spans in task.contexts)
        outbox = areas.outbox[task.slot]
        with lent_by(outbox.room if task.fold is None else None):  # what is folded here does not cross
            answers = workplace.task(task.jobs, contents, contexts, task.fold)
        pipe.send(_put(answers, outbox))


def _lent(content: RecordDict, spans: Spans, area: Area) -> RecordDict:
    (blobs,) = area.lend([spans], lambda: None)
    return join(content, blobs)


def _with_state(context: Context, spans: Spans, area: Area) -> Context:
    join(context.state, area.copied(spans))
    return context


def _put(answers: Sequence[Answer], area: Area) -> list[_Result]:
    blobs: list[Blobs] = []
    for answer in answers:
        reply, state = answer.reply, answer.context
        blobs += [{}, {}]
        if reply.has_content():
            reply.content, blobs[-2] = split_off(reply.content)
        if state is not None:
            state.state, blobs[-1] = split_off(state.state)
    spans = area.write(blobs)
    return [_Result(answer, *spans[2 * i : 2 * i + 2]) for i, answer in enumerate(answers)]


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    slots: Slots
    ready: bool = False
    seen: set[int] = field(default_factory=set)


class WorkersGrid(PooledGrid):
    """Flower Grid over resident processes of this machine.

    Sums of large models are not made in the workers: all of them would be in the memory of one machine.
    """

    sums_bytes = LARGE_BYTES

    def __init__(
        self,
        factory: Callable[[], ClientApp],
        num_nodes: int,
        options: WorkersOptions = WorkersOptions(),
        *,
        sizes: Sequence[int] = (),
        timeout_s: float | None = None,
    ) -> None:
        super().__init__(num_nodes, sizes=sizes, timeout_s=timeout_s)
        try:
            self._context = prepare()
        except ValueError as error:
            raise UserError(f"engine = 'workers' needs a system that can fork: {error}; use inline or ray") from error
        self._factory = factory
        self._broadcast = Area()
        self._contents: dict[int, tuple[RecordDict, Spans]] = {}
        self._spawned = 0
        self._workers: dict[int, _Worker] = {}
        self._watchdog = Watchdog(self._context)
        count = options.count or cores()
        allow_for_workers(count)
        for _ in range(count):
            self._spawn()

    def _spawn(self) -> None:
        self._spawned += 1
        pipe, theirs = self._context.Pipe()
        areas = Areas(self._broadcast)
        process = self._context.Process(
            target=work,
            args=(self._factory, theirs, areas, list(sys.path), dict(os.environ)),
            name=f"fl_sim-worker-{self._spawned}",
            daemon=True,
        )
        with without_main():
            process.start()
        theirs.close()
        self._workers[self._spawned] = _Worker(process, pipe, Slots(areas))
        self._watchdog.tell(w.process.pid for w in self._workers.values() if w.process.pid is not None)

    def workers(self) -> Sequence[int]:
        return list(self._workers)

    def announce(self, contents: Mapping[int, RecordDict]) -> None:
        parts = [split_off(content) for content in contents.values()]
        spans = self._broadcast.write(blobs for _, blobs in parts)
        self._contents = {key: (slim, at) for key, (slim, _), at in zip(contents, parts, spans, strict=True)}

    def submit(self, worker: int, jobs: Jobs) -> None:
        to = self._workers[worker]
        contexts = [_slim(self.contexts[job.node]) for job in jobs]
        slot = to.slots.take()
        spans = to.slots.areas.inbox[slot].write(blobs for _, blobs in contexts)
        new = contents_of(jobs) - to.seen
        to.seen = contents_of(jobs) if new else to.seen
        task = _Task(
            slot,
            jobs,
            [(slim, at) for (slim, _), at in zip(contexts, spans, strict=True)],
            {key: self._contents[key] for key in new},
            self.fold_of(jobs),
        )
        with suppress(OSError):  # it has died, which `finished` tells
            to.pipe.send(task)

    def ask(self, worker: int, task: HandIn) -> None:
        to = self._workers[worker]
        with suppress(OSError):  # it has died, which `finished` tells
            to.pipe.send(_Asked(to.slots.take()))

    def finished(self, timeout: float | None) -> Sequence[Finished]:
        pipes = {worker.pipe: number for number, worker in self._workers.items()}
        heard = [self._heard(pipes[pipe]) for pipe in wait(list(pipes), timeout) if isinstance(pipe, Connection)]
        return [finished for finished in heard if finished is not None]

    def _heard(self, number: int) -> Finished | None:
        """Receive a worker's next message; None = it is ready."""
        worker = self._workers[number]
        try:
            said: str | list[_Result] | _Sum | None = worker.pipe.recv()
        except (EOFError, OSError) as error:
            worker.process.join(1)
            if not worker.ready:
                raise RuntimeError(f"a worker process ended before it was ready: {self._ending(worker)}") from error
            return Finished(number, (), lost=self._ending(worker))
        if isinstance(said, str):
            raise RuntimeError(f"a worker process could not start: {said}")
        if said is None:
            worker.ready = True
            return None
        slot = worker.slots.answered()
        if isinstance(said, _Sum):
            (own,) = worker.slots.read(slot, [said.spans])
            return Finished(number, (), sums=join(said.content, own))
        for result in said:
            if (context := result.answer.context) is not None:
                _with_state(context, result.state, worker.slots.areas.outbox[slot])
        blobs = worker.slots.read(slot, [result.reply for result in said])
        return Finished(number, [_whole(result.answer, own) for result, own in zip(said, blobs, strict=True)])

    @staticmethod
    def _ending(worker: _Worker) -> str:
        code = worker.process.exitcode
        return signal.Signals(-code).name if code is not None and code < 0 else f"exit status {code}"

    def replace(self, worker: int) -> None:
        self._end(self._workers.pop(worker))
        self._spawn()

    def is_ready(self, worker: int) -> bool:
        return self._workers[worker].ready

    @staticmethod
    def _end(worker: _Worker) -> None:
        worker.pipe.close()
        if worker.process.pid is not None and worker.process.is_alive():
            end_group(worker.process.pid)
        worker.process.join()
        worker.process.close()
        worker.slots.areas.close()

    def close(self) -> None:
        while self._workers:
            self._end(self._workers.popitem()[1])
        self._watchdog.close()
        self._broadcast.close()


def _whole(answer: Answer, blobs: Mapping[Key, bytes | memoryview]) -> Answer:
    if answer.reply.has_content():
        join(answer.reply.content, blobs)
    return answer
