"""The Ray engine: resident actors under the same Grid, on this machine or on a cluster. The only module that imports Ray.

An actor keeps model, data and the round's decoded broadcast. Payloads cross as NumPy buffers, which Ray's object store
passes without pickling them.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Protocol, cast

from flwr.app import Context, RecordDict

from fl_sim.core.types import UserError
from fl_sim.runtime.grids.pool import Finished, Jobs, PooledGrid
from fl_sim.runtime.grids.worker import Answer, Job, Workplace
from fl_sim.runtime.state.buffers import Blobs, join, split_off

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp
    from ray import ObjectRef

Content = tuple[RecordDict, Blobs]
LISTENER_S = 5.0
"""How long a cluster's head may take to accept a connection."""


MOST_ACTORS = 65_536
"""Of a cluster, and GPUs of one actor; Ray would wait for more without end."""


@dataclass(frozen=True)
class RayOptions:
    """Options of the Ray engine: the cluster's address and the workers' resources.

    Attributes:
        workers: number of actors; unset = one per CPU of the cluster (or as many as `num_gpus` allows).
        address: address of an existing cluster; unset = start Ray on this machine.
        num_gpus: GPU share of one actor; 0.25 puts four actors on a GPU.
        clients_per_task: most clients in one task; unset = up to eight tasks per actor and round, of about 0.05 s or more.
    """

    workers: int | None = None
    address: str | None = None
    num_gpus: float = 0.0
    clients_per_task: int | None = None

    def __post_init__(self) -> None:
        for key, most in (("workers", MOST_ACTORS), ("clients_per_task", sys.maxsize)):
            if (value := getattr(self, key)) is not None and not 1 <= value <= most:
                raise UserError(f"ray.{key} = {value}: must be from 1 to {most}")
        if not 0 <= self.num_gpus <= MOST_ACTORS:
            raise UserError(f"ray.num_gpus = {self.num_gpus}: must be from 0 to {MOST_ACTORS}")


class _Actor(Protocol):
    """Handle of a worker actor, as the driver sees it."""

    run: _RemoteMethod
    ready: _Ready


class _RemoteMethod(Protocol):
    def remote(
        self, jobs: list[Job], contexts: list[Context], contents: Mapping[int, list[ObjectRef[Content]]]
    ) -> ObjectRef[list[tuple[Answer, Blobs]]]: ...


class _Ready(Protocol):
    def remote(self) -> ObjectRef[int]: ...


class _Worker:
    """The actor. Broadcasts are fetched once."""

    def __init__(self, factory: Callable[[], ClientApp], path: list[str]) -> None:
        self._workplace = Workplace(factory, path)
        self._contents: dict[int, RecordDict] = {}

    def ready(self) -> int:
        return os.getpid()

    def run(
        self, jobs: list[Job], contexts: list[Context], contents: Mapping[int, list[ObjectRef[Content]]]
    ) -> list[tuple[Answer, Blobs]]:
        import ray

        for key, (ref,) in contents.items():
            if key not in self._contents:
                self._contents = {k: v for k, v in self._contents.items() if k in contents}
                self._contents[key] = _whole(*ray.get(ref))
        return [self._one(job, context) for job, context in zip(jobs, contexts, strict=True)]

    def _one(self, job: Job, context: Context) -> tuple[Answer, Blobs]:
        answer = self._workplace.run(job, self._contents[job.content], context)
        blobs: Blobs = {}
        if answer.reply.has_content():
            answer.reply.content, blobs = split_off(answer.reply.content)
        return answer, blobs


class RayGrid(PooledGrid):
    """Flower Grid over resident Ray actors. A task costs about 5 ms, whatever it carries."""

    def __init__(
        self,
        factory: Callable[[], ClientApp],
        num_nodes: int,
        options: RayOptions = RayOptions(),
        *,
        sizes: Sequence[int] = (),
        timeout_s: float | None = None,
    ) -> None:
        super().__init__(num_nodes, sizes=sizes, timeout_s=timeout_s)
        _quietly()
        import ray

        self._ray = ray
        self._started = not ray.is_initialized()
        if self._started:
            _connect(options)
        self._options, self.clients_per_task = options, options.clients_per_task
        self._factory = ray.put(factory)
        self._spawned = 0
        self._actors: dict[int, _Actor] = {}
        self._starting: dict[int, ObjectRef[int]] = {}
        self._tasks: dict[int, deque[ObjectRef[list[tuple[Answer, Blobs]]]]] = {}
        self._contents: dict[int, ObjectRef[Content]] = {}
        try:
            for _ in range(options.workers or fitting(options)):
                self._spawn()
        except BaseException:
            self.close()
            raise

    def _spawn(self) -> int:
        remote = self._ray.remote(_Worker).options(num_cpus=1, num_gpus=self._options.num_gpus)
        self._spawned += 1
        actor = cast(_Actor, remote.remote(self._factory, list(sys.path)))
        self._actors[self._spawned], self._tasks[self._spawned] = actor, deque()
        self._starting[self._spawned] = actor.ready.remote()
        return self._spawned

    def workers(self) -> Sequence[int]:
        return list(self._actors)

    def announce(self, contents: Mapping[int, RecordDict]) -> None:
        self._contents = {key: self._ray.put(split_off(content)) for key, content in contents.items()}

    def submit(self, worker: int, jobs: Jobs) -> None:
        contexts = [self.contexts[job.node] for job in jobs]
        contents = {job.content: [self._contents[job.content]] for job in jobs}
        self._tasks[worker].append(self._actors[worker].run.remote(list(jobs), contexts, contents))

    def finished(self, timeout: float | None) -> Sequence[Finished]:
        oldest = {tasks[0]: worker for worker, tasks in self._tasks.items() if tasks}
        if not oldest:
            return ()
        ready, _ = self._ray.wait(list(oldest), num_returns=1, timeout=timeout)
        return [self._outcome(oldest[ref], ref) for ref in ready]

    def _outcome(self, worker: int, ref: ObjectRef[list[tuple[Answer, Blobs]]]) -> Finished:
        try:
            answers = self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            if isinstance(error, self._ray.exceptions.RayActorError) and error.actor_init_failed:
                why = str(error).strip().splitlines()[-1]
                raise RuntimeError(f"a worker process could not start: {why}") from error
            return Finished(worker, (), lost=type(error).__name__)
        self._tasks[worker].popleft()
        for answer, blobs in answers:
            if answer.reply.has_content():
                _whole(answer.reply.content, blobs)
        return Finished(worker, [answer for answer, _ in answers])

    def replace(self, worker: int) -> int:
        self._ray.kill(self._actors.pop(worker))  # type: ignore[arg-type]
        del self._tasks[worker]
        return self._spawn()

    def is_ready(self, worker: int) -> bool:
        starting = self._starting.get(worker)
        if starting is not None and self._ray.wait([starting], timeout=0)[0]:
            del self._starting[worker]
        return worker not in self._starting

    def close(self) -> None:
        for actor in self._actors.values():
            self._ray.kill(actor)  # type: ignore[arg-type]
        self._actors = {}
        if self._started:
            self._ray.shutdown()
            self._started = False


@contextmanager
def connected(options: RayOptions) -> Iterator[ModuleType]:
    """Ray, started for the block unless it runs already."""
    _quietly()
    import ray

    started = not ray.is_initialized()
    if started:
        _connect(options)
    try:
        yield ray
    finally:
        if started:
            ray.shutdown()


def fetched(boxed: Sequence[object]) -> object:
    """What an actor was given in a list: Ray would take it out of the store before the actor has the driver's `sys.path`."""
    import ray

    return ray.get(cast("ObjectRef[object]", boxed[0]))


def _quietly() -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def _whole(content: RecordDict, blobs: Blobs) -> RecordDict:
    return join(content, {key: blob.data for key, blob in blobs.items()})


def _connect(options: RayOptions) -> None:
    import ray

    try:
        _require_listener(options.address)
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
    except (OSError, ValueError) as error:
        raise UserError(f"ray.address {options.address!r}: {error}") from error


def _require_listener(address: str | None) -> None:
    """Refuse a host:port that nobody listens at; Ray itself would try for minutes."""
    host, found, port = (address or "").rpartition(":")
    if found and "/" not in host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=LISTENER_S).close()


def fitting(options: RayOptions) -> int:
    """Actors that a cluster has room for."""
    import ray

    have = ray.cluster_resources()
    count = int(have.get("CPU", 1))
    if options.num_gpus > 0:
        count = min(count, int(have.get("GPU", 0) / options.num_gpus))
        if count == 0:
            raise UserError(f"ray.num_gpus = {options.num_gpus}: the cluster has {have.get('GPU', 0)} GPUs")
    return max(1, count)
