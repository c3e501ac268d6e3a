"""The Ray engine: resident actors under the same Grid, on this machine or on a cluster. The only module that imports Ray.

An actor keeps model, data and the round's decoded broadcast; a task carries several clients; two tasks wait at every
actor, so that it never idles while the driver folds. Payloads cross as NumPy buffers, which Ray's object store passes
without pickling them. A dead actor is replaced: the clients it had not answered run again, alone, and only one that
kills its actor again is reported as failed (Flower's own pool routes clients to the dead actor for the rest of a run).
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Error, Message, RecordDict

from fl_sim.runtime.flower_compat import CLIENT_APP_CRASHED, set_message_id
from fl_sim.runtime.local import LocalGrid, execute, isolated, overdue
from fl_sim.types import UserError

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp
    from numpy.typing import NDArray
    from ray import ObjectRef

Content = tuple[RecordDict, "Blobs"]
Blobs = dict[tuple[str, str], "NDArray[np.uint8]"]
"""(record, array) -> the bytes of that array, as a buffer that is not pickled."""


@dataclass(frozen=True)
class RayOptions:
    """Where and how wide to run.

    Attributes:
        workers: resident actors; None = one per CPU of the cluster (or as many as `num_gpus` allows).
        address: an existing cluster's address, or None to start Ray on this machine.
        num_gpus: GPU share of one actor; 0.25 puts four actors on a card.
        clients_per_task: clients in one task; None = chosen so that every actor gets about eight tasks a round.
    """

    workers: int | None = None
    address: str | None = None
    num_gpus: float = 0.0
    clients_per_task: int | None = None


def _split_off(content: RecordDict) -> tuple[RecordDict, Blobs]:
    """Take the array bytes out of a content."""
    blobs: Blobs = {}
    for key, record in content.array_records.items():
        for name, array in record.items():
            blobs[key, name] = np.frombuffer(array.data, dtype=np.uint8)
    slim = RecordDict(
        {
            key: ArrayRecord({n: Array(a.dtype, a.shape, a.stype, b"") for n, a in record.items()})
            if isinstance(record, ArrayRecord)
            else record
            for key, record in content.items()
        }
    )
    return slim, blobs


def _join(content: RecordDict, blobs: Blobs) -> RecordDict:
    """Invert `_split_off`, in place."""
    for (key, name), blob in blobs.items():
        # Bytes to Flower's type, but any buffer does; a copy of a dense payload costs as much as its decoding.
        content.array_records[key][name].data = cast(bytes, blob.data)
    return content


@dataclass(frozen=True)
class _Job:
    """One client of a task: what to send it, under which content of the task."""

    index: int
    node: int
    kind: str
    message_id: str
    group: str
    content: int


Answer = tuple[Message, Blobs, "Context | None"]
"""(reply without its array bytes, those bytes, the node's context where it holds state)."""


class _Actor(Protocol):
    """What the driver sees of a worker: Ray's handle."""

    run: _Method
    ready: _Ready


class _Method(Protocol):
    def remote(
        self, jobs: list[_Job], contexts: list[Context], contents: Mapping[int, list[ObjectRef[Content]]]
    ) -> ObjectRef[list[Answer]]: ...


class _Ready(Protocol):
    def remote(self) -> ObjectRef[int]: ...


class _Worker:
    """The actor. `app` is built once; broadcasts are fetched once."""

    def __init__(self, factory: Callable[[], ClientApp], path: list[str]) -> None:
        sys.path[:] = [*path, *(p for p in sys.path if p not in path)]
        import torch

        from fl_sim.runtime.flower_compat import adopt_identity
        from fl_sim.runtime.memory import keep_freed_memory

        keep_freed_memory()
        torch.set_num_threads(1)
        logging.getLogger("flwr").setLevel(logging.WARNING)
        adopt_identity()
        self._app = factory()
        self._contents: dict[int, RecordDict] = {}

    def ready(self) -> int:
        return os.getpid()

    def run(
        self, jobs: list[_Job], contexts: list[Context], contents: Mapping[int, list[ObjectRef[Content]]]
    ) -> list[Answer]:
        import ray

        for key, (ref,) in contents.items():
            if key not in self._contents:
                self._contents = {k: v for k, v in self._contents.items() if k in contents}
                self._contents[key] = _join(*ray.get(ref))
        return [self._one(job, context) for job, context in zip(jobs, contexts, strict=True)]

    def _one(self, job: _Job, context: Context) -> Answer:
        request = Message(isolated(self._contents[job.content]), job.node, job.kind, group_id=job.group)
        set_message_id(request, job.message_id)
        reply = execute(self._app, request, context)
        if reply.has_error() and _device_is_lost():
            os._exit(1)  # a CUDA context does not recover; a fresh process may, and the driver starts one
        set_message_id(reply, f"r{job.message_id}")
        blobs: Blobs = {}
        if reply.has_content():
            reply.content, blobs = _split_off(reply.content)
        return reply, blobs, context if len(context.state) else None


class RayGrid(LocalGrid):
    """Flower Grid over resident Ray actors."""

    def __init__(
        self,
        factory: Callable[[], ClientApp],
        num_nodes: int,
        options: RayOptions = RayOptions(),
        *,
        timeout_s: float | None = None,
    ) -> None:
        super().__init__(num_nodes)
        self.timeout_s = timeout_s
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray

        self._ray = ray
        self._started = not ray.is_initialized()
        if self._started:
            _connect(options)
        self._options = options
        self._factory = ray.put(factory)
        self._starting: dict[int, ObjectRef[int]] = {}
        count = options.workers or _fitting(options)
        self._actors = [self._spawn() for _ in range(count)]
        self._content_ids = 0

    def _spawn(self) -> _Actor:
        remote = self._ray.remote(_Worker).options(num_cpus=1, num_gpus=self._options.num_gpus)
        actor = cast(_Actor, remote.remote(self._factory, list(sys.path)))
        self._starting[id(actor)] = actor.ready.remote()
        return actor

    def is_ready(self, actor: _Actor) -> bool:
        """Whether an actor has started."""
        starting = self._starting.get(id(actor))
        if starting is not None and self._ray.wait([starting], timeout=0)[0]:
            del self._starting[id(actor)]
        return id(actor) not in self._starting

    def close(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor)  # type: ignore[arg-type]
        self._actors = []
        if self._started:
            self._ray.shutdown()
            self._started = False

    def stream(self, messages: list[Message], timeout: float | None) -> Iterator[Message]:
        return _Round(self, messages).replies() if messages else iter(())


class _Round:
    """The dispatch of one round's messages: in order, with a bounded lead, and out in order."""

    DEPTH = 2

    def __init__(self, grid: RayGrid, messages: list[Message]) -> None:
        self.grid, self.ray, self.messages = grid, grid._ray, messages
        self.refs, keys = {}, {}
        for message in messages:
            if id(message.content) not in keys:
                grid._content_ids += 1
                keys[id(message.content)] = grid._content_ids
                self.refs[grid._content_ids] = self.ray.put(_split_off(message.content))
        jobs = [
            _Job(
                i,
                m.metadata.dst_node_id,
                m.metadata.message_type,
                m.metadata.message_id,
                m.metadata.group_id,
                keys[id(m.content)],
            )
            for i, m in enumerate(messages)
        ]
        actors = len(grid._actors)
        size = grid._options.clients_per_task or max(1, min(32, len(jobs) // (8 * actors)))
        self.todo = deque(tuple(jobs[i : i + size]) for i in range(0, len(jobs), size))
        # Finished replies that wait for an earlier one are bounded: nothing further ahead than this is started.
        self.window = 4 * self.DEPTH * actors * size
        self.load = {id(actor): 0 for actor in grid._actors}
        self.actors = {id(actor): actor for actor in grid._actors}
        self.running: dict[ObjectRef[list[Answer]], tuple[tuple[_Job, ...], int]] = {}
        self.done: dict[int, Message] = {}
        self.suspects: set[int] = set()
        self.since: dict[int, float] = {}

    def replies(self) -> Iterator[Message]:
        head = 0
        while head < len(self.messages):
            self._dispatch(head)
            for ref in self._finished():
                self._collect(ref)
            while head in self.done:
                yield self.done.pop(head)
                head += 1

    def _dispatch(self, head: int) -> None:
        while self.todo and self.todo[0][0].index < head + self.window:
            key = min(self.load, key=lambda k: self.load[k])
            # A suspect has an actor for itself, so that a second death is its own doing.
            weight = self.DEPTH if self.todo[0][0].index in self.suspects else 1
            if self.load[key] + weight > self.DEPTH:
                return
            jobs = self.todo.popleft()
            contexts = [self.grid.contexts[job.node] for job in jobs]
            contents = {job.content: [self.refs[job.content]] for job in jobs}
            if not self.load[key]:
                self.since[key] = time.monotonic()
            ref = self.actors[key].run.remote(list(jobs), contexts, contents)
            self.running[ref] = (jobs, key)
            self.load[key] += weight

    def _collect(self, ref: ObjectRef[list[Answer]]) -> None:
        jobs, key = self.running[ref]
        try:
            results = self.ray.get(ref)
        except self.ray.exceptions.RayError:
            self._lost(key)
            return
        del self.running[ref]
        self.since[key] = time.monotonic()
        self.load[key] -= self.DEPTH if jobs[0].index in self.suspects else 1
        self._accept(jobs, results)

    def _accept(self, jobs: tuple[_Job, ...], results: list[Answer]) -> None:
        for job, (reply, blobs, context) in zip(jobs, results, strict=True):
            if reply.has_content():
                _join(reply.content, blobs)
            if context is not None:
                self.grid.contexts[job.node] = context
            self.done[job.index] = reply

    def _replace(self, key: int) -> dict[ObjectRef[list[Answer]], tuple[_Job, ...]]:
        """Put a fresh actor in the place of one that is dead; returns the tasks it had not answered, in their order."""
        owned = [ref for ref, (_, owner) in self.running.items() if owner == key]
        del self.load[key]
        dead = self.actors.pop(key)
        fresh = self.grid._spawn()
        self.grid._actors = [a for a in self.grid._actors if a is not dead] + [fresh]
        self.load[id(fresh)], self.actors[id(fresh)] = 0, fresh
        return {ref: self.running.pop(ref)[0] for ref in owned}

    def _lost(self, key: int) -> None:
        """An actor died: replace it; every client it had not answered runs again alone, unless it died alone already."""
        for ref, jobs in self._replace(key).items():
            try:
                self._accept(jobs, self.ray.get(ref))
            except self.ray.exceptions.RayError as error:
                if jobs[0].index in self.suspects:
                    reason = f"its worker process died ({type(error).__name__})"
                    self._give_up(jobs[0], Error(CLIENT_APP_CRASHED, f"client {self._partition(jobs[0])}: {reason}"))
                else:
                    self._retry_alone(jobs)
        self._sort()

    def _finished(self) -> list[ObjectRef[list[Answer]]]:
        """Wait for a task to end; under a time limit, look now and then for actors whose clients take too long."""
        limit = None if self.grid.timeout_s is None else min(1.0, self.grid.timeout_s / 4)
        ready: list[ObjectRef[list[Answer]]] = self.ray.wait(list(self.running), num_returns=1, timeout=limit)[0]
        if not ready:
            # An actor works on the task it was given first.
            for key, jobs in {owner: jobs for jobs, owner in reversed(self.running.values())}.items():
                if self._is_overdue(key, len(jobs)):
                    self._interrupt(key)
        return ready

    def _is_overdue(self, key: int, clients: int) -> bool:
        """Whether an actor has taken too long over its first task; the time it needs to start does not count."""
        assert self.grid.timeout_s is not None
        if not self.grid.is_ready(self.actors[key]):
            self.since[key] = time.monotonic()
        return time.monotonic() - self.since[key] > clients * self.grid.timeout_s

    def _interrupt(self, key: int) -> None:
        """Kill an actor that hangs. Of several clients each runs again alone; one that was alone is given up."""
        self.ray.kill(self.actors[key])
        (_, head), *rest = self._replace(key).items()
        if len(head) == 1:
            assert self.grid.timeout_s is not None
            told = overdue(self.messages[head[0].index], self._partition(head[0]), self.grid.timeout_s)
            self._give_up(head[0], told.error)
        else:
            self._retry_alone(head)
        self.todo.extend(jobs for _, jobs in rest)
        self._sort()

    def _retry_alone(self, jobs: tuple[_Job, ...]) -> None:
        self.suspects.update(job.index for job in jobs)
        self.todo.extend((job,) for job in jobs)

    def _sort(self) -> None:
        self.todo = deque(sorted(self.todo, key=lambda task: task[0].index))

    def _partition(self, job: _Job) -> int:
        return self.grid.partitions[job.node]

    def _give_up(self, job: _Job, error: Error) -> None:
        reply = Message(error, reply_to=self.messages[job.index])
        set_message_id(reply, f"r{job.message_id}")
        self.done[job.index] = reply


def _device_is_lost() -> bool:
    """Whether the GPU of this process answers no more."""
    import torch

    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _connect(options: RayOptions) -> None:
    import ray

    try:
        if options.address is None:
            ray.init(
                address="local",
                num_cpus=options.workers,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        else:
            ray.init(address=options.address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError) as error:
        raise UserError(f"ray.address {options.address!r}: {error}") from error


def _fitting(options: RayOptions) -> int:
    import ray

    have = ray.cluster_resources()
    count = int(have.get("CPU", 1))
    if options.num_gpus > 0:
        count = min(count, int(have.get("GPU", 0) / options.num_gpus))
        if count == 0:
            raise UserError(f"ray.num_gpus = {options.num_gpus}: the cluster has {have.get('GPU', 0)} GPUs")
    return max(1, count)
