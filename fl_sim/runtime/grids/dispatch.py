"""The dispatch of a round over a pool of workers, longest clients first; workers that die are replaced.

Two tasks wait at every worker, so that it never idles while the caller folds. Of a worker that dies, the client
it was at runs again, alone, and only one that kills its worker again is reported as failed (Flower's own pool routes
clients to the dead worker for the rest of a run). Clients whose updates were in its sum run again too, and nobody is told twice.
None of this changes a result: a client's numbers depend on seed, round and partition only, and replies leave in the order of the
messages.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from flwr.app import Error, Message, RecordDict

from fl_sim.communication.flower_private import CLIENT_APP_CRASHED, set_message_id
from fl_sim.communication.messages import array_bytes
from fl_sim.runtime.grids.base import overdue
from fl_sim.runtime.grids.folding import Foldable, FoldedReply, HandedIn, Reply
from fl_sim.runtime.grids.running_sums import HandIn, RunningSums, hand_in_after
from fl_sim.runtime.grids.scheduling import DEPTH, Limits, packed
from fl_sim.runtime.grids.worker import Answer, Job, Jobs

if TYPE_CHECKING:
    from fl_sim.runtime.grids.pool import PooledGrid


@dataclass(frozen=True)
class Finished:
    """A worker is done with its oldest task, or is `lost` (why); `machine` = lost with its machine, no client's fault.

    `sums` is what it handed in, or how the engine finds what it put aside.
    """

    worker: int
    answers: Sequence[Answer]
    lost: str | None = None
    machine: bool = False
    sums: object = None


class Round:
    """The dispatch of one round's messages; the first tasks are at the workers when it is made."""

    def __init__(self, grid: PooledGrid, messages: list[Message], foldable: Foldable | None = None) -> None:
        self.grid, self.messages = grid, messages
        if foldable is not None and foldable.nbytes > grid.sums_bytes:
            foldable = None
        keys: dict[int, int] = {}
        for message in messages:
            if id(message.content) not in keys:
                keys[id(message.content)] = self._next_content()
        contents = {keys[id(m.content)]: m.content for m in messages}
        fold = 0 if foldable is None else self._next_content()
        if foldable is not None:
            contents[fold], grid.fold = foldable.start, foldable.fold(len(messages) / max(1, grid.width))
        grid.announce(contents)
        jobs = [self._job(i, m, keys[id(m.content)], fold) for i, m in enumerate(messages)]
        weight = max(1, array_bytes(messages[0].content))
        self.folds = foldable is not None
        self.limits = Limits(grid.clients_per_task, weight, self.folds, grid.timeout_s is not None)
        self.todo: list[Jobs] = [tuple(jobs[place] for place in group) for group in self._groups(jobs)]
        self.begins = {task[0].index for task in self.todo}
        longest = max(map(len, self.todo))
        self.window = max(4 * DEPTH * grid.width * longest, grid.window_bytes // weight)
        self.at_work: dict[int, deque[Jobs | HandIn]] = {}
        self.since: dict[int, float] = {}
        self.done: dict[int, Reply] = {}
        self.suspects: set[int] = set()
        self.places: dict[int, str | None] = {}
        self.handing_in: set[str] = set()
        self.sums = RunningSums(grid.contexts, hand_in_after(0 if foldable is None else foldable.nbytes))
        self.is_over = False
        self._sort()
        self._dispatch(0)

    def _next_content(self) -> int:
        self.grid.contents += 1
        return self.grid.contents

    def _groups(self, jobs: Sequence[Job]) -> list[list[int]]:
        """The clients of each of the round's tasks."""
        costs, kind, workers = self.grid.costs, jobs[0].kind, self.grid.width
        seconds = costs.total_seconds(kind, [job.partition for job in jobs])
        return packed(
            [costs.expect(kind, job.partition) for job in jobs],
            workers=workers,
            tasks=self.limits.tasks(len(jobs), workers=workers, seconds=seconds),
            most=self.limits.most(len(jobs)),
        )

    @staticmethod
    def _job(index: int, message: Message, content: int, fold: int) -> Job:
        meta = message.metadata
        return Job(index, meta.dst_node_id, meta.message_type, meta.message_id, meta.group_id, content, fold)

    def _sort(self) -> None:
        """Longest first: what starts last is short, so that all workers end together.

        Before them tasks whose replies are folded, in their own order, in which their receipts are read.
        """
        costs = self.grid.costs
        self.todo.sort(
            key=lambda jobs: (
                (0, jobs[0].index) if jobs[0].fold else (1, -sum(costs.expect(job.kind, job.partition) for job in jobs))
            )
        )

    def replies(self) -> Iterator[Reply | HandedIn]:
        """Yield one reply per message, in order; and sums, of which the last is yielded before the last reply."""
        for head in range(len(self.messages)):
            self._dispatch(head)
            if head in self.done and head in self.begins:
                self._collect(0, head)  # keep workers busy while the caller folds what is there
            is_last = head == len(self.messages) - 1
            while head not in self.done or (is_last and self._awaits_sums()):
                self._collect(self._patience, head)
            while self.sums.here:
                yield HandedIn(self.sums.here.pop(0))
            self.is_over = is_last
            yield self.done.pop(head)

    def _awaits_sums(self) -> bool:
        """Whether a sum is missing, or a client runs again for one."""
        return bool(self.todo) or any(self.at_work.values()) or self.sums.missing

    @property
    def _patience(self) -> float | None:
        limit = self.grid.timeout_s
        return None if limit is None else min(1.0, limit / 4)

    def _dispatch(self, head: int) -> None:
        stop = head + self.window
        for worker in self.grid.workers():
            if worker not in self.at_work:
                self.at_work[worker], self.places[worker] = deque(), self.grid.place(worker)
        while (jobs := next((jobs for jobs in self.todo if jobs[0].index < stop), None)) is not None and self.at_work:
            worker = min(self.at_work, key=self._load)
            if self._load(worker) + self._weight(jobs) > DEPTH:
                break
            self.todo.remove(jobs)
            if jobs[0].index in self.suspects:
                self._ask(worker)  # what it has added up is not lost with it
            self._begin(worker, jobs)
            self.grid.submit(worker, jobs)
        if self.folds:
            self._ask_those_due()

    def _begin(self, worker: int, task: Jobs | HandIn) -> None:
        if not self.at_work[worker]:
            self.since[worker] = time.monotonic()
        self.at_work[worker].append(task)

    def _weight(self, task: Jobs | HandIn) -> int:
        if isinstance(task, HandIn):
            return 0
        # A suspect has a worker for itself, so that a second death is its own doing.
        return DEPTH if task[0].index in self.suspects else 1

    def _load(self, worker: int) -> int:
        return sum(map(self._weight, self.at_work[worker]))

    # -- sums ----------------------------------------------------------------------------------------------------------

    def _ask_those_due(self) -> None:
        """Ask workers for their sums: all once no task is left for them, before that those with much to lose.

        On another machine all are asked with one, so that what they put aside crosses as one sum.
        """
        is_end = not any(jobs[0].fold for jobs in self.todo)
        due = {worker for worker in self.at_work if is_end or self.sums.is_due(worker)}
        begin = {place for worker in due if (place := self.places[worker]) is not None} - self.handing_in
        for worker in self.at_work:
            if self.places[worker] in begin or (self.places[worker] is None and worker in due):
                self._ask(worker)
        self.handing_in |= begin
        for place in sorted(self.handing_in):
            self._ask_for_aside(place)

    def _ask(self, worker: int) -> None:
        """Ask a worker for its sum, where it has one, or will have."""
        tasks = self.at_work[worker]
        folds = any(not isinstance(task, HandIn) and task[0].fold for task in tasks)
        if (folds or self.sums.has(worker)) and not any(isinstance(task, HandIn) for task in tasks):
            self._send(worker, HandIn(aside=self.places[worker] is not None))

    def _ask_for_aside(self, place: str) -> None:
        """Ask a worker for what it and its neighbours have put aside, once all have."""
        near = [worker for worker in self.at_work if self.places[worker] == place]
        if any(isinstance(task, HandIn) for worker in near for task in self.at_work[worker]):
            return
        self.handing_in.discard(place)
        others = self.sums.take_aside(place)
        able = [worker for worker in near if worker in {each.worker for each in others}]
        if able:
            self._send(min(able, key=self._load), HandIn(others))
        elif others:
            self._again(self.sums.lost(None, others))

    def _send(self, worker: int, task: HandIn) -> None:
        self._begin(worker, task)
        self.grid.ask(worker, task)

    def _handed_in(self, worker: int, task: HandIn, sums: object) -> None:
        place = self.places[worker]
        if task.aside and place is not None:
            self.sums.put_aside(worker, place, sums)
        else:
            content = cast(RecordDict, sums)
            self.grid.traffic.sums_bytes += array_bytes(content)
            self.sums.handed_in(worker, task, content)

    def _again(self, jobs: Sequence[Job]) -> None:
        """Let clients run again whose sum was lost; their receipts are there."""
        most = self.limits.most(len(jobs))
        marked = [replace(job, again=True) for job in sorted(jobs, key=lambda job: job.index)]
        self.todo += [tuple(marked[at : at + most]) for at in range(0, len(marked), most)]
        self._sort()

    # -- what comes back -----------------------------------------------------------------------------------------------

    def _collect(self, timeout: float | None, head: int) -> None:
        for finished in self.grid.finished(timeout):
            if finished.lost is not None:
                self._lost(finished)
                continue
            self.since[finished.worker] = time.monotonic()
            task = self.at_work[finished.worker].popleft()
            if isinstance(task, HandIn):
                self._handed_in(finished.worker, task, finished.sums)
            else:
                self._accept(finished.worker, task, finished.answers)
        if self.grid.timeout_s is not None:
            for worker in [w for w, tasks in self.at_work.items() if tasks and self._is_overdue(w)]:
                self._interrupt(worker)
        self._dispatch(head)

    def _accept(self, worker: int, jobs: Jobs, answers: Sequence[Answer]) -> None:
        for job, answer in zip(jobs, answers, strict=True):
            receipt, before = answer.receipt, None
            if receipt is not None and receipt.rejected is None:
                before = None if answer.context is None else self.grid.contexts.saved(job.node)
                self.sums.add(worker, job, before, answer.seconds)
            elif job.again:
                raise lost_for_good(job)
            if answer.context is not None:
                self.grid.contexts[job.node] = answer.context
            self.grid.costs.learn(job.kind, job.partition, answer.seconds)
            if not job.again:
                self.grid.traffic.add(answer.reply, receipt)
                self.done[job.index] = answer.reply if receipt is None else FoldedReply(answer.reply, receipt)

    def _replace(self, worker: int) -> Jobs:
        """End a worker, and have another one if there is room; returns the clients it was at.

        Its other task is queued again, and the clients whose updates it has added up.
        """
        self.grid.replace(worker)
        first, *rest = self.at_work.pop(worker, None) or [()]
        tasks = [first, *rest]
        others = [each for task in tasks if isinstance(task, HandIn) for each in task.others]
        self.todo += [task for task in rest if not isinstance(task, HandIn)]
        self._again(self.sums.lost(worker, others))
        return () if isinstance(first, HandIn) else first

    def _lost(self, finished: Finished) -> None:
        """A worker died: the clients it was at run again, each alone, unless it died of one that was alone already.

        Where its machine was lost no client is to blame: they run again as they were.
        """
        jobs, place = self._replace(finished.worker), self.places.get(finished.worker)
        if finished.machine and place is not None:
            self._again(self.sums.lost(None, self.sums.take_aside(place)))
        if not jobs:
            return
        if finished.machine:
            self.todo.append(jobs)
            self._sort()
        elif len(jobs) == 1 and jobs[0].index in self.suspects:
            why = f"client {jobs[0].partition}: its worker process died ({finished.lost})"
            self._give_up(jobs[0], Error(CLIENT_APP_CRASHED, why))
        else:
            self._retry_alone(jobs)

    def _is_overdue(self, worker: int) -> bool:
        """Whether a worker has taken too long over its task; the time it needs to start does not count."""
        assert self.grid.timeout_s is not None
        task = self.at_work[worker][0]
        if not self.grid.is_ready(worker) or isinstance(task, HandIn):  # which runs no client
            self.since[worker] = time.monotonic()
            return False
        return time.monotonic() - self.since[worker] > len(task) * self.grid.timeout_s

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
        self.todo += [(job if job.again else replace(job, fold=0),) for job in jobs]
        self._sort()

    def _give_up(self, job: Job, error: Error) -> None:
        if job.again:
            raise lost_for_good(job)
        reply = Message(error, reply_to=self.messages[job.index])
        set_message_id(reply, f"r{job.message_id}")
        self.done[job.index] = reply


def lost_for_good(job: Job) -> RuntimeError:
    """A client whose update was booked, then lost with its worker, cannot fail any more without a round whose numbers disagree."""
    return RuntimeError(
        f"client {job.partition}: its update was lost with its worker, and it failed when it ran again; --resume repeats the round"
    )
