"""Sums that workers keep in a round of folded replies: whose updates are in which, and what is lost with a worker.

A worker adds up what its clients send, task after task, until it is asked to hand in. On this machine its sum comes to the program.
On another one it is put aside, and one worker there hands in those of all its neighbours together: one sum crosses the link.
Sums do not depend on what is in which, so that clients whose sum was lost run again wherever there is room.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from flwr.app import RecordDict

from fl_sim.runtime.grids.worker import Job
from fl_sim.runtime.state.contexts import Contexts

HAND_IN_S, TIMES_ITS_WAY = 10.0, 20.0
"""Seconds of a worker's clients after which it hands in within a round, so that no more is lost with it: at least so many, and
so many times as long as a sum is on its way at 1 Gbit/s."""
LINK = 125e6
"""Bytes a second of a link of 1 Gbit/s."""


def hand_in_after(nbytes: float) -> float:
    """Seconds of work after which a sum of so many bytes is handed in within a round."""
    return max(HAND_IN_S, TIMES_ITS_WAY * nbytes / LINK)


@dataclass(frozen=True)
class Folded:
    """A client whose update is in a sum, and what it kept before it trained, where that has changed."""

    job: Job
    before: object = None


@dataclass(frozen=True)
class PutAside:
    """A sum that a worker of another machine has put aside: how the engine finds it, and whose updates are in it."""

    worker: int
    place: str
    found: object
    clients: tuple[Folded, ...]


@dataclass(frozen=True)
class HandIn:
    """A task without clients: hand in what was added up, with what neighbours have put aside; or put it aside."""

    others: tuple[PutAside, ...] = ()
    aside: bool = False


@dataclass
class RunningSums:
    """The sums of a round.

    Attributes:
        contexts: of the nodes.
        after_s: of work, after which a worker hands in.
        aside: sums that were put aside.
        here: sums that have come.
    """

    contexts: Contexts
    after_s: float
    aside: list[PutAside] = field(default_factory=list)
    here: list[RecordDict] = field(default_factory=list)
    _clients: dict[int, list[Folded]] = field(default_factory=dict)
    _seconds: dict[int, float] = field(default_factory=dict)

    def add(self, worker: int, job: Job, before: object, seconds: float) -> None:
        """A worker has added up a client's update, in so many seconds."""
        self._clients.setdefault(worker, []).append(Folded(job, before))
        self._seconds[worker] = self._seconds.get(worker, 0.0) + seconds

    def has(self, worker: int) -> bool:
        """Whether a worker has a sum."""
        return worker in self._clients

    def is_due(self, worker: int) -> bool:
        """Whether too much would be lost with a worker."""
        return self._seconds.get(worker, 0.0) >= self.after_s

    @property
    def missing(self) -> bool:
        """Whether any sum is still at a worker, or put aside."""
        return bool(self._clients or self.aside)

    def handed_in(self, worker: int, task: HandIn, content: RecordDict) -> None:
        """A worker's sum has come: its clients never run again."""
        self.give_up([*self._taken(worker), *(each for other in task.others for each in other.clients)])
        if len(content):
            self.here.append(content)

    def put_aside(self, worker: int, place: str, found: object) -> None:
        """A worker has put its sum aside."""
        self.aside.append(PutAside(worker, place, found, self._taken(worker)))

    def take_aside(self, place: str) -> tuple[PutAside, ...]:
        """What was put aside in a place; it is no longer there."""
        taken = tuple(each for each in self.aside if each.place == place)
        self.aside = [each for each in self.aside if each.place != place]
        return taken

    def lost(self, worker: int | None, others: Iterable[PutAside] = ()) -> list[Job]:
        """A worker is lost, or what was put aside: the clients that run again, with what they kept before."""
        clients = [] if worker is None else list(self._taken(worker))
        clients += [each for other in others for each in other.clients]
        for each in clients:
            if each.before is not None:
                self.contexts.put_back(each.job.node, each.before)
        return [each.job for each in clients]

    def _taken(self, worker: int) -> tuple[Folded, ...]:
        self._seconds.pop(worker, None)
        return tuple(self._clients.pop(worker, ()))

    def give_up(self, clients: Iterable[Folded] | None = None) -> None:
        """These clients, or all, never run again: what they kept before takes no more space."""
        if clients is None:
            clients = [each for worker in list(self._clients) for each in self._taken(worker)]
            clients += [each for other in self.aside for each in other.clients]
            self.aside = []
        for each in clients:
            if each.before is not None:
                self.contexts.give_up(each.before)
