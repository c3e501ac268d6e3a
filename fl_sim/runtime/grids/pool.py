"""Process pool: dispatches one round over worker processes, longest clients first, and replaces dead workers.

Two tasks wait at every worker, so that it never idles while the caller folds. A worker that dies is replaced: the client
it was at runs again, alone, and only one that kills its worker again is reported as failed (Flower's own pool routes
clients to the dead worker for the rest of a run). None of this changes a result: a client's numbers depend on seed, round
and partition only, and replies leave in the order of the messages.
"""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

from flwr.app import Error, Message, RecordDict

from fl_sim.communication.flower_private import CLIENT_APP_CRASHED, set_message_id
from fl_sim.communication.messages import array_bytes
from fl_sim.runtime.grids.base import LocalGrid, overdue
from fl_sim.runtime.grids.costs import Costs
from fl_sim.runtime.grids.folding import Blocks, Fold, FoldedReply, Reply, Traffic
from fl_sim.runtime.grids.scheduling import packed, whole
from fl_sim.runtime.grids.worker import Answer, Job

DEPTH = 2
"""Tasks at a worker: the one it is at, and the next."""
WINDOW_BYTES = 256_000_000
"""Finished replies that wait for an earlier one are bounded by about this much, if a reply is as large as its task."""
TASK_BYTES = 16_000_000
"""Clients of one task answer together: about this much at a time."""
TASKS, CLIENTS = 8, 32
"""Tasks that every worker gets in a round, so that all end together; clients of a task at most. Blocks that workers fold are
tasks of their own."""
TASK_S = 0.05
"""What a task should last at least: what it costs to send one and to take its answer must weigh little beside that."""

Jobs = tuple[Job, ...]


@dataclass(frozen=True)
class Finished:
    """A worker is done with its oldest task, or is `lost` (why); `machine` = lost with its machine, no client's fault."""

    worker: int
    answers: Sequence[Answer]
    lost: str | None = None
    machine: bool = False


class PooledGrid(LocalGrid):
    """A Grid over worker processes. Subclasses carry tasks there and answers back."""

    runs_beside = True
    clients_per_task: int | None = None
    window_bytes: int = WINDOW_BYTES
    sums_bytes: float = math.inf
    """Above this size of a block's sums workers fold nothing."""

    def __init__(self, num_nodes: int, *, sizes: Sequence[int] = (), timeout_s: float | None = None) -> None:
        super().__init__(num_nodes)
        self.timeout_s = timeout_s
        self.costs = Costs(sizes)
        self.contents = 0
        self.fold: Fold | None = None
        self.traffic = Traffic()
        self._round: Round | None = None

    @abstractmethod
    def workers(self) -> Sequence[int]:
        """Numbers of the workers that take tasks; a new one may join them at any time."""

    @property
    def width(self) -> int:
        """Workers that a round should be cut for: those that take tasks, and those that soon will."""
        return len(self.workers())

    @abstractmethod
    def announce(self, contents: Mapping[int, RecordDict]) -> None:
        """A round begins, with these contents; those of the last one are needed no more."""

    @abstractmethod
    def submit(self, worker: int, jobs: Jobs) -> None:
        """Queue a task; a worker takes its tasks in order."""

    @abstractmethod
    def finished(self, timeout: float | None) -> Sequence[Finished]:
        """Wait until at least one worker is done with its oldest task or lost; empty when the seconds are over."""

    @abstractmethod
    def replace(self, worker: int) -> None:
        """End a worker, whatever it is at, and start another where there is room."""

    @abstractmethod
    def is_ready(self, worker: int) -> bool:
        """Whether a worker has started."""

    def stream(self, messages: list[Message], timeout: float | None) -> Iterator[Message]:
        return cast("Iterator[Message]", self._begun(messages, None))  # nothing is folded

    def send_and_fold(self, messages: Sequence[Message], blocks: Blocks) -> Iterator[Reply]:
        """`send_and_receive`, where workers may fold the replies of whole blocks; replies come in the messages' order.

        A worker that dies in a block folds nothing: its clients run again, each alone, and their replies come as they are.
        """
        for message in messages:
            self._stamp(message)
        return self._begun(list(messages), blocks)

    def fold_of(self, jobs: Jobs) -> Fold | None:
        """How a worker folds the replies of a task; None where they travel."""
        return self.fold if jobs and jobs[0].fold else None

    def _begun(self, messages: list[Message], blocks: Blocks | None) -> Iterator[Reply]:
        if not messages:
            return iter(())
        if self._round is not None:
            raise RuntimeError("one round at a time: read the replies of the last one first")
        self._round = Round(self, messages, blocks)
        return self._replies(self._round)

    def _replies(self, current: Round) -> Iterator[Reply]:
        try:
            for number, reply in enumerate(current.replies(), start=1):
                if number == len(current.messages):
                    self._round = None  # a caller that wants no more than there are never asks for one more
                yield reply
        finally:
            busy = [worker for worker, tasks in current.at_work.items() if tasks]
            for worker in set(busy) & set(self.workers()):
                self.replace(worker)  # nobody waits for its answers any more
            if self._round is current:
                self._round = None


class Round:
    """The dispatch of one round's messages; the first tasks are at the workers when it is made."""

    def __init__(self, grid: PooledGrid, messages: list[Message], blocks: Blocks | None = None) -> None:
        self.grid, self.messages = grid, messages
        keys: dict[int, int] = {}
        for message in messages:
            if id(message.content) not in keys:
                keys[id(message.content)] = self._next_content()
        contents = {keys[id(m.content)]: m.content for m in messages}
        fold = 0 if blocks is None else self._next_content()
        if blocks is not None:
            contents[fold], grid.fold = blocks.start, blocks.fold
        grid.announce(contents)
        jobs = [self._job(i, m, keys[id(m.content)]) for i, m in enumerate(messages)]
        folded = [] if blocks is None else self._folded(jobs, blocks, fold)
        inside = {job.index for task in folded for job in task}
        rest = [job for job in jobs if job.index not in inside]
        weight = max(1, array_bytes(messages[0].content))
        single = [tuple(rest[position] for position in group) for group in self._groups(rest, weight)] if rest else []
        self.todo = [*folded, *single]
        self.begins = {task[0].index for task in self.todo}
        self.window = max(
            4 * DEPTH * grid.width * max(map(len, single), default=1),
            (DEPTH + 1) * grid.width * max(map(len, folded), default=1),
            grid.window_bytes // weight,
        )
        self.at_work: dict[int, deque[Jobs]] = {}
        self.since: dict[int, float] = {}
        self.done: dict[int, Reply] = {}
        self.suspects: set[int] = set()
        self._sort()
        self._dispatch(0)

    def _next_content(self) -> int:
        self.grid.contents += 1
        return self.grid.contents

    def _folded(self, jobs: Sequence[Job], blocks: Blocks, fold: int) -> list[Jobs]:
        """The blocks that workers take whole: as many as leave no worker with more than its share of the round.

        Where clients compute for long, a block's time is left for smaller tasks, so that all workers end together. Where they take
        less time than their replies would on the way, it counts what crosses, and workers take all blocks.
        """
        # A task has as many times `timeout_s` as clients until a hanging one is noticed: no longer than in other tasks.
        limit = self.grid.clients_per_task or (None if self.grid.timeout_s is None else CLIENTS)
        if blocks.nbytes > self.grid.sums_bytes or (limit is not None and limit < max(map(len, blocks.places))):
            return []
        costs, kind, workers = self.grid.costs, jobs[0].kind, self.grid.width
        tasks = [tuple(replace(jobs[place], fold=fold) for place in places) for places in blocks.places]
        each = [sum(costs.expect(kind, job.partition) for job in task) for task in tasks]
        seconds = costs.total_seconds(kind, [job.partition for job in jobs]) / len(jobs)
        nbytes = array_bytes(self.messages[0].content)
        return [tasks[position] for position in whole(each, workers=workers, seconds=seconds, nbytes=nbytes)]

    def _groups(self, jobs: Sequence[Job], weight: int) -> list[list[int]]:
        """The round's tasks: `TASKS` a worker, unless those would be shorter than a task should be."""
        costs, count = self.grid.costs, self.grid.width
        most = self.grid.clients_per_task or max(1, min(CLIENTS, TASK_BYTES // weight))
        seconds = costs.total_seconds(jobs[0].kind, [job.partition for job in jobs])
        tasks = 1 if self.grid.clients_per_task else int(max(1, min(TASKS, seconds / (count * TASK_S))))
        return packed(
            [costs.expect(job.kind, job.partition) for job in jobs], workers=count, tasks=count * tasks, most=most
        )

    @staticmethod
    def _job(index: int, message: Message, content: int) -> Job:
        meta = message.metadata
        return Job(index, meta.dst_node_id, meta.message_type, meta.message_id, meta.group_id, content)

    def _sort(self) -> None:
        """Longest first: what starts last is short, so that all workers end together.

        Before them folded blocks, which are the longest, in their own order: sums that wait for an earlier one take memory.
        """
        costs = self.grid.costs
        self.todo.sort(
            key=lambda jobs: (
                (0, jobs[0].index) if jobs[0].fold else (1, -sum(costs.expect(job.kind, job.partition) for job in jobs))
            )
        )

    def replies(self) -> Iterator[Reply]:
        """Yield one reply per message, in order."""
        for head in range(len(self.messages)):
            self._dispatch(head)
            if head in self.done and head in self.begins:
                self._collect(0, head)  # keep workers busy while the caller folds what is there
            while head not in self.done:
                self._collect(self._patience, head)
            yield self.done.pop(head)

    @property
    def _patience(self) -> float | None:
        limit = self.grid.timeout_s
        return None if limit is None else min(1.0, limit / 4)

    def _dispatch(self, head: int) -> None:
        stop = head + self.window
        for worker in self.grid.workers():
            self.at_work.setdefault(worker, deque())
        while (jobs := next((jobs for jobs in self.todo if jobs[0].index < stop), None)) is not None and self.at_work:
            worker = min(self.at_work, key=self._load)
            if self._load(worker) + self._weight(jobs) > DEPTH:
                return
            self.todo.remove(jobs)
            if not self.at_work[worker]:
                self.since[worker] = time.monotonic()
            self.at_work[worker].append(jobs)
            self.grid.submit(worker, jobs)

    def _weight(self, jobs: Jobs) -> int:
        # A suspect has a worker for itself, so that a second death is its own doing.
        return DEPTH if jobs[0].index in self.suspects else 1

    def _load(self, worker: int) -> int:
        return sum(map(self._weight, self.at_work[worker]))

    def _collect(self, timeout: float | None, head: int) -> None:
        for finished in self.grid.finished(timeout):
            if finished.lost is not None:
                self._lost(finished)
            else:
                self.since[finished.worker] = time.monotonic()
                self._accept(self.at_work[finished.worker].popleft(), finished.answers)
        if self.grid.timeout_s is not None:
            for worker in [w for w, tasks in self.at_work.items() if tasks and self._is_overdue(w)]:
                self._interrupt(worker)
        self._dispatch(head)

    def _accept(self, jobs: Jobs, answers: Sequence[Answer]) -> None:
        for job, answer in zip(jobs, answers, strict=True):
            if answer.context is not None:
                self.grid.contexts[job.node] = answer.context
            self.grid.costs.learn(job.kind, job.partition, answer.seconds)
            receipt = answer.receipt
            self.grid.traffic.add(answer.reply, receipt)
            self.done[job.index] = answer.reply if receipt is None else FoldedReply(answer.reply, receipt)

    def _replace(self, worker: int) -> Jobs:
        """End a worker, and have another one if there is room; returns the clients it was at, its other task is queued again."""
        self.grid.replace(worker)
        first, *rest = self.at_work.pop(worker, None) or [()]
        self.todo += rest
        self._sort()
        return first

    def _lost(self, finished: Finished) -> None:
        """A worker died: the clients it was at run again, each alone, unless it died of one that was alone already.

        Where its machine was lost no client is to blame: they run again as they were.
        """
        jobs = self._replace(finished.worker)
        if not jobs:
            return
        if finished.machine:
            self.todo.append(jobs)
            self._sort()
        elif jobs[0].index in self.suspects:
            why = f"client {jobs[0].partition}: its worker process died ({finished.lost})"
            self._give_up(jobs[0], Error(CLIENT_APP_CRASHED, why))
        else:
            self._retry_alone(jobs)

    def _is_overdue(self, worker: int) -> bool:
        """Whether a worker has taken too long over its task; the time it needs to start does not count."""
        assert self.grid.timeout_s is not None
        if not self.grid.is_ready(worker):
            self.since[worker] = time.monotonic()
        return time.monotonic() - self.since[worker] > len(self.at_work[worker][0]) * self.grid.timeout_s

    def _interrupt(self, worker: int) -> None:
        """End a worker that hangs. Of several clients each runs again alone; one that was alone is given up."""
        assert self.grid.timeout_s is not None
        jobs = self._replace(worker)
        if len(jobs) > 1:
            self._retry_alone(jobs)
            return
        message = self.messages[jobs[0].index]
        self._give_up(jobs[0], overdue(message, jobs[0].partition, self.grid.timeout_s).error)

    def _retry_alone(self, jobs: Jobs) -> None:
        self.suspects.update(job.index for job in jobs)
        self.todo += [(replace(job, fold=0),) for job in jobs]
        self._sort()

    def _give_up(self, job: Job, error: Error) -> None:
        reply = Message(error, reply_to=self.messages[job.index])
        set_message_id(reply, f"r{job.message_id}")
        self.done[job.index] = reply
