"""The Ray engine: resident actors under the same Grid, on this machine or on a cluster. The only module that imports Ray.

An actor keeps model, data and the round's decoded broadcast. Payloads cross as NumPy buffers, which Ray's object store
passes without pickling them.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, cast

from flwr.app import RecordDict

from fl_sim.core.errors import in_one_line
from fl_sim.core.types import UserError
from fl_sim.runtime.grids.dispatch import Finished
from fl_sim.runtime.grids.heartbeat import Address
from fl_sim.runtime.grids.last_words import LastWords
from fl_sim.runtime.grids.pool import PooledGrid
from fl_sim.runtime.grids.ray_actors import PULSE_S, Actors, Sent
from fl_sim.runtime.grids.ray_worker import Answers, Content, whole
from fl_sim.runtime.grids.running_sums import HandIn
from fl_sim.runtime.grids.worker import Jobs, contents_of
from fl_sim.runtime.state.buffers import split_off

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp
    from ray import ObjectRef

log = logging.getLogger("fl_sim")
LISTENER_S = 5.0
"""How long a cluster's head may take to accept a connection."""
PATIENCE = "RAY_gcs_rpc_server_reconnect_timeout_s"
"""Ray's own setting: seconds without its head after which it ends the process."""
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
        working_dir: folder of your own code that Ray ships to every node at the start; unset = the nodes have it already.
        runtime_env: further fields of Ray's runtime environment, such as `py_modules`, `env_vars` or `pip`.
    """

    workers: int | None = None
    address: str | None = None
    num_gpus: float = 0.0
    clients_per_task: int | None = None
    working_dir: str | None = None
    runtime_env: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, most in (("workers", MOST_ACTORS), ("clients_per_task", sys.maxsize)):
            if (value := getattr(self, key)) is not None and not 1 <= value <= most:
                raise UserError(f"ray.{key} = {value}: must be from 1 to {most}")
        if not 0 <= self.num_gpus <= MOST_ACTORS:
            raise UserError(f"ray.num_gpus = {self.num_gpus}: must be from 0 to {MOST_ACTORS}")
        if self.working_dir is not None and "working_dir" in self.runtime_env:
            raise UserError("ray.working_dir and ray.runtime_env.working_dir: give one of them")

    @property
    def environment(self) -> dict[str, object]:
        """Ray's runtime environment; empty where nothing is shipped."""
        return {**self.runtime_env, **({} if self.working_dir is None else {"working_dir": self.working_dir})}


class RayGrid(PooledGrid):
    """Flower Grid over resident Ray actors. A task costs about 5 ms, whatever it carries.

    The pool follows the cluster. The actors of a lost node are dropped, and their clients run on the others. At the start of
    a round, and when an actor was lost, actors are asked for until there are as many as the cluster has room for.
    """

    def __init__(
        self,
        factory: Callable[[], ClientApp],
        num_nodes: int,
        options: RayOptions = RayOptions(),
        *,
        sizes: Sequence[int] = (),
        timeout_s: float | None = None,
        node_timeout_s: float = 30.0,
    ) -> None:
        super().__init__(num_nodes, sizes=sizes, timeout_s=timeout_s)
        self.clients_per_task = options.clients_per_task
        self._contents: dict[int, ObjectRef[Content]] = {}
        self._open = ExitStack()
        try:
            self._ray = ray = self._open.enter_context(connected(options, node_timeout_s))
            room = partial(fitting, options)
            needs = {"num_cpus": 1.0, "num_gpus": options.num_gpus}
            self._actors = Actors(ray, room, ray.put(factory), needs, node_timeout_s)
            self._open.callback(self._actors.close)
            self._actors.start()
        except BaseException:
            self.close()
            raise

    def workers(self) -> Sequence[int]:
        return list(self._actors.working)

    @property
    def width(self) -> int:
        return len(self._actors.working) + len(self._actors.starting)

    @contextmanager
    def _cluster(self) -> Iterator[Actors]:
        """The actors; whatever Ray raises in the block stops the run, which can be resumed."""
        try:
            yield self._actors
        except self._ray.exceptions.RayError as error:
            raise RuntimeError(f"the Ray cluster is lost ({type(error).__name__}: {in_one_line(error)})") from error

    def announce(self, contents: Mapping[int, RecordDict]) -> None:
        with self._cluster() as actors:
            for worker in actors.lost():
                actors.end(worker)
            actors.fill()
            self._contents = {key: self._ray.put(split_off(content)) for key, content in contents.items()}

    def submit(self, worker: int, jobs: Jobs) -> None:
        with self._cluster() as actors:
            to = actors.working[worker]
            contexts = [self.contexts[job.node] for job in jobs]
            contents = {number: [self._contents[number]] for number in contents_of(jobs)}
            to.tasks.append(Sent(to.actor.run.remote(list(jobs), contexts, contents, self.fold_of(jobs))))

    def ask(self, worker: int, task: HandIn) -> None:
        with self._cluster() as actors:
            to = actors.working[worker]
            if task.aside:
                to.tasks.append(Sent(*to.actor.put_aside.options(num_returns=2).remote()))
            else:
                others = [cast("ObjectRef[Content]", each.found) for each in task.others]
                to.tasks.append(Sent(to.actor.hand_in.remote(others)))

    def place(self, worker: int) -> str | None:
        node = self._actors.working[worker].here.node
        return None if node == self._ray.get_runtime_context().get_node_id() else node

    def finished(self, timeout: float | None) -> Sequence[Finished]:
        with self._cluster() as actors:
            came = actors.wait(PULSE_S if timeout is None else min(timeout, PULSE_S))
            if actors.starting or not actors.working:
                for reason in actors.settle(came):
                    log.warning("%s. The run goes on without it", reason)
                actors.require_some(RuntimeError)
            done = [number for number, each in actors.working.items() if each.tasks and each.tasks[0].done in came]
            lost = actors.lost()
            gone = [Finished(number, (), lost=why, machine=True) for number, why in lost.items()]
            return [self._outcome(number) for number in done if number not in lost] + gone

    def _outcome(self, number: int) -> Finished:
        worker = self._actors.working[number]
        try:
            came = cast("Answers | Content | None", self._ray.get(cast("ObjectRef[object]", worker.tasks[0].done)))
        except self._ray.exceptions.RayError as error:
            return Finished(number, (), lost=type(error).__name__, machine=self._actors.is_without_machine(number))
        aside = worker.tasks.popleft().aside
        if came is None:
            return Finished(number, (), sums=aside)
        if isinstance(came, tuple):
            return Finished(number, (), sums=whole(*came))
        for answer, blobs in came:
            if answer.reply.has_content():
                whole(answer.reply.content, blobs)
        return Finished(number, [answer for answer, _ in came])

    def replace(self, worker: int) -> None:
        with self._cluster() as actors:
            actors.end(worker)
            actors.fill()

    def peak_bytes(self) -> Sequence[int]:
        """Peak memory of each worker so far, on Linux."""
        with self._cluster() as actors:
            asked = [worker.actor.peak_bytes.remote() for worker in actors.working.values()]
            return cast("Sequence[int]", self._ray.get(asked))

    def is_ready(self, worker: int) -> bool:
        return True  # others take no tasks

    def close(self) -> None:
        self._open.close()


@contextmanager
def connected(options: RayOptions, node_timeout_s: float = 30.0) -> Iterator[ModuleType]:
    """Ray, started for the block unless it runs already. Without its head it ends this program after that time; then a
    line says so."""
    _quietly()
    os.environ.setdefault(PATIENCE, str(math.ceil(node_timeout_s)))
    import ray

    started = not ray.is_initialized()
    if started:
        _connect(options)
    elif options.environment:
        raise UserError(
            "ray.working_dir, ray.runtime_env: this program has started Ray itself; give them to its ray.init"
        )
    with closing(LastWords()) as words:
        try:
            words.watch(_listeners())
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


def _connect(options: RayOptions) -> None:
    import ray

    init, silently = cast("Callable[..., object]", ray.init), {"log_to_driver": False, "logging_level": logging.ERROR}
    where = f"ray.address {options.address!r}"
    try:
        _require_listener(options.address)
        if options.environment:
            where = "ray.runtime_env"
            init = partial(init, runtime_env=_environment(options.environment))
        if options.address is None:
            init(address="local", num_cpus=options.workers, include_dashboard=False, **silently)
        else:
            init(address=options.address, **silently)
            if (own := _address_missed()) is not None:
                ray.shutdown()
                init(address=options.address, _node_ip_address=own, **silently)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{where}: {in_one_line(error)}") from error


def _address_missed() -> str | None:
    """Address of this machine's node where Ray gave this program that of another node; None where they agree.

    Ray takes the first node whose process it sees, the head's before others. Network namespaces of one machine see all of
    them, and nobody could answer to a program that gave a wrong address.
    """
    import ray

    (_, (own, _)) = _listeners()[-1]
    return None if own == ray.util.get_node_ip_address() else own


def _environment(fields: Mapping[str, object]) -> Mapping[str, object]:
    """Ray's runtime environment; Ray itself would ignore fields that it does not know.

    Raises:
        UserError: there are such fields.
        ValueError, TypeError: fields of a wrong form, as Ray says.
    """
    from ray.runtime_env import RuntimeEnv

    known = sorted(name for name in RuntimeEnv.known_fields if not name.startswith("_"))
    if unknown := sorted(fields.keys() - set(known)):
        raise UserError(f"ray.runtime_env: unknown {', '.join(unknown)}; Ray has {', '.join(known)}")
    return cast("Callable[..., Mapping[str, object]]", RuntimeEnv)(**fields)


def _listeners() -> list[tuple[str, Address]]:
    """Without which Ray ends this program: the cluster's head, and Ray's own process on this machine."""
    import ray

    own = ray.get_runtime_context().get_node_id()
    local = next((node["NodeManagerAddress"], node["NodeManagerPort"]) for node in ray.nodes() if node["NodeID"] == own)
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    return [("the Ray cluster's head", (host, int(port))), ("Ray's process on this machine,", local)]


def _require_listener(address: str | None) -> None:
    """Refuse a host:port that nobody listens at; Ray itself would try for minutes."""
    host, found, port = (address or "").rpartition(":")
    if found and "/" not in host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=LISTENER_S).close()


def fitting(options: RayOptions, but: Collection[str] = ()) -> int:
    """Actors to have: `options.workers`, or as many as the living nodes have room for, not counting the nodes in `but`.

    Raises:
        UserError: the cluster has too few GPUs for one.
    """
    import ray

    if options.workers is not None:
        return options.workers
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in but]
    count = int(sum(have.get("CPU", 0) for have in nodes))
    if options.num_gpus > 0:
        gpus = sum(have.get("GPU", 0) for have in nodes)
        count = min(count, int(gpus / options.num_gpus))
        if count == 0:
            raise UserError(f"ray.num_gpus = {options.num_gpus}: the cluster has {gpus} GPUs")
    return max(1, count)
