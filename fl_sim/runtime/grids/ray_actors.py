"""The actors of the Ray engine: which are asked for, which have started, and on which machines they are.

Where an actor is placed, and when, is Ray's business. One that waits for a processor takes no tasks until it has started, so a
node that joins is used as soon as Ray has placed one there, and a node that is lost takes its own actors only.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, field
from itertools import count
from types import ModuleType
from typing import TYPE_CHECKING, cast

from fl_sim.core.types import UserError
from fl_sim.runtime.grids.heartbeat import Heartbeat
from fl_sim.runtime.grids.ray_worker import PACKAGES, Actor, Content, Here, actor_class, why_not_built

if TYPE_CHECKING:
    from ray import ObjectRef

log = logging.getLogger("fl_sim")
START_S = 60.0
"""How long Ray may take to place a first actor, where the cluster is too small for one."""
BUSY_S = 300.0
"""How long where it is large enough: somebody else has its processors, or a busy machine is slow to start the process."""
GRACE_S = 3.0
"""How long the others may stay away, once nothing is starting any more: somebody else has their processors."""
PULSE_S = 1.0


@dataclass
class Starting:
    """An actor that takes no tasks yet; `here` is its machine, known as soon as its process runs."""

    actor: Actor
    told: ObjectRef[object]
    built: ObjectRef[object]
    here: Here | None = None


@dataclass
class Sent:
    """A task of an actor: what it gives when it is `done`, and what it has put `aside` in its machine's part of Ray's store."""

    done: object
    aside: ObjectRef[Content] | None = None


@dataclass
class Working:
    """An actor that takes tasks, its machine, and the tasks that it has."""

    actor: Actor
    here: Here
    tasks: deque[Sent] = field(default_factory=deque)


class Actors:
    """The pool of actors.

    Args:
        ray: the module, connected.
        room: how many actors the cluster has room for, not counting the nodes it is given.
        factory: what an actor builds, in Ray's store.
        needs: what an actor takes, as options of Ray: `num_cpus`, `num_gpus`.
        node_timeout_s: how long a machine may be silent.
    """

    def __init__(
        self,
        ray: ModuleType,
        room: Callable[[set[str]], int],
        factory: ObjectRef[object],
        needs: dict[str, float],
        node_timeout_s: float,
    ) -> None:
        self._ray, self._room, self._factory, self._needs = ray, room, factory, needs
        self._class = ray.remote(actor_class()).options(**needs)
        self._numbers = count(1)
        self._refused: set[str] = set()
        self._known: set[str] = set()
        self._started = False
        self._last_alive, self._told_to_wait = time.monotonic(), False
        self.starting: dict[int, Starting] = {}
        self.working: dict[int, Working] = {}
        self.heartbeat = Heartbeat(node_timeout_s)

    def start(self) -> None:
        """Ask for the actors, wait for the first, and for those that run already: so what a node lacks is told of now.

        Raises:
            UserError: a node has not what it needs, or there is no room.
        """
        self.fill()
        heard = time.monotonic()
        while self.starting:
            if came := self.wait(PULSE_S):
                heard = time.monotonic()
            for reason in self.settle(came):
                raise UserError(reason)
            running = any(each.here is not None for each in self.starting.values())
            if self.working and not running and time.monotonic() - heard > GRACE_S:
                break
            self.require_some(UserError)
        self._started = True

    def require_some(self, kind: type[Exception]) -> None:
        """Complain when no actor works, and none has been placed for a while; say once that one is waited for."""
        if self.working or any(each.here is not None for each in self.starting.values()):
            self._last_alive, self._told_to_wait = time.monotonic(), False
            return
        waited = time.monotonic() - self._last_alive
        if self.starting and waited <= max(START_S, self.heartbeat.timeout_s):
            return
        names = dict(zip(("CPU", "GPU"), self._needs.values(), strict=True))
        have, whole = self._ray.available_resources(), self._ray.cluster_resources()
        free = ", ".join(f"{have.get(name, 0):g} {name}s" for name in names)
        needs = " and ".join(f"{value:g} {name}" for name, value in names.items())
        fits = all(whole.get(name, 0) >= value for name, value in names.items())
        if not (self.starting and fits and waited <= BUSY_S):
            raise kind(f"the Ray cluster has no room for a worker ({needs}); free are {free}")
        if not self._told_to_wait:
            log.warning(
                "the Ray cluster has started no worker for %.0f s (one takes %s; free are %s): others use it, or it is busy; "
                "waiting up to %.0f s",
                *(waited, needs, free, BUSY_S),
            )
        self._told_to_wait = True

    def fill(self) -> None:
        """Ask for actors until there are as many as there is room for."""
        wanted = self._room(self._refused | self.heartbeat.lost.keys())
        for _ in range(wanted - len(self.working) - len(self.starting)):
            actor = cast(Actor, self._class.remote())
            told, built = actor.here.remote(PACKAGES), actor.build.remote([self._factory], list(sys.path))
            self.starting[next(self._numbers)] = Starting(
                actor, cast("ObjectRef[object]", told), cast("ObjectRef[object]", built)
            )

    def wait(self, timeout: float) -> Set[object]:
        """What has come of the actors that start and of the oldest tasks; waits for one."""
        awaited: list[object] = [each.told if each.here is None else each.built for each in self.starting.values()]
        awaited += [each.tasks[0].done for each in self.working.values() if each.tasks]
        return set(self._ray.wait(awaited, num_returns=1, timeout=timeout)[0]) if awaited else set()

    def settle(self, came: Set[object]) -> Iterator[str]:
        """Let actors that have started take tasks; yields why others could not start, and drops those."""
        for number, each in list(self.starting.items()):
            try:
                if each.here is None and each.told in came:
                    each.here = Here(*self._ray.get(each.told))
                    self._watch(each.here)
                    if differences := each.here.differences():
                        self._refuse(number, each)
                        yield f"node {each.here.name} has other versions: {differences}; install the same there"
                        continue
                if each.here is not None and each.built in came:
                    self._ray.get(each.built)
                    del self.starting[number]
                    self._join(number, Working(each.actor, each.here))
            except self._ray.exceptions.RayError as error:
                self._refuse(number, each, lasting=isinstance(error, self._ray.exceptions.RayTaskError))
                yield why_not_built(error, "of the cluster" if each.here is None else each.here.name)

    def _refuse(self, number: int, starting: Starting, *, lasting: bool = True) -> None:
        del self.starting[number]
        self._ray.kill(starting.actor)
        if lasting and starting.here is not None:
            self._refused.add(starting.here.node)

    def _join(self, number: int, worker: Working) -> None:
        self.working[number] = worker
        if self._started and worker.here.node not in self._known:
            log.warning("node %s has joined", worker.here.name)
        self._known.add(worker.here.node)

    def _watch(self, here: Here) -> None:
        """Listen to the machine of an actor, unless it is this one."""
        if here.node != self._ray.get_runtime_context().get_node_id():
            ports = {node["NodeID"]: node["NodeManagerPort"] for node in self._ray.nodes()}
            self.heartbeat.watch({here.node: (here.ip, ports[here.node])})

    def lost(self) -> dict[int, str]:
        """Workers whose machine is lost -> why; the log names each machine once."""
        lost = self.heartbeat.lost
        if not lost:
            return {}
        gone = {number: each.here for number, each in self.working.items() if each.here.node in lost}
        for here in gone.values():
            self._tell(here, lost[here.node])
        return {number: lost[here.node] for number, here in gone.items()}

    def is_without_machine(self, number: int) -> bool:
        """Whether the machine of a worker that has ended does not answer: it, and no client, is to blame."""
        here = self.working[number].here
        if self.heartbeat.ask(here.node):
            return False
        self._tell(here, self.heartbeat.lost.get(here.node, "it does not answer"))
        return True

    def _tell(self, here: Here, why: str) -> None:
        if here.node in self._known:
            log.warning("node %s is lost (%s); its clients run again on the others", here.name, why)
            self._known.discard(here.node)

    def end(self, number: int) -> None:
        """End a worker, whatever it is at."""
        self._ray.kill(self.working.pop(number).actor)

    def close(self) -> None:
        """End all of them."""
        self.heartbeat.close()
        for actor in [each.actor for each in self.working.values()] + [each.actor for each in self.starting.values()]:
            self._ray.kill(actor)
        self.working, self.starting = {}, {}
