"""The inside of a worker process, whatever carries its tasks: the app is built once, and runs one client after another."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fl_sim.communication.flower_private import adopt_identity, set_message_id
from fl_sim.runtime.grids.allocator import keep_freed_memory
from fl_sim.runtime.grids.base import FIRST_NODE, DeviceLost, execute, isolated
from fl_sim.runtime.grids.folding import Fold, Folding, Receipt


@dataclass(frozen=True)
class Job:
    """A job: one client of a task, with its place in the round, its node, and its message's kind, id, group and content.

    `fold` is the content that the worker needs to fold the replies of the task; 0 = they travel. `again`: its sum was lost with
    a worker, and its receipt is there, so that it must be folded.
    """

    index: int
    node: int
    kind: str
    message_id: str
    group: str
    content: int
    fold: int = 0
    again: bool = False

    @property
    def partition(self) -> int:
        """The node's partition."""
        return self.node - FIRST_NODE


Jobs = tuple[Job, ...]
"""A task: clients that a worker runs one after the other."""


def contents_of(jobs: Iterable[Job]) -> set[int]:
    """Numbers of the contents that a task needs."""
    return {number for job in jobs for number in (job.content, job.fold) if number}


@dataclass(frozen=True)
class Answer:
    """Result of a job: the reply, the node's context where it holds state (else None), and the seconds it took.

    Where the worker folded the reply, there is its receipt, and the seconds are also those of folding.
    """

    reply: Message
    context: Context | None
    seconds: float
    receipt: Receipt | None = None


class Workplace:
    """A worker: the ClientApp of one process, on one thread."""

    def __init__(self, factory: Callable[[], ClientApp], path: Sequence[str]) -> None:
        sys.path[:] = [*path, *(p for p in sys.path if p not in path)]
        keep_freed_memory()
        torch.set_num_threads(1)
        logging.getLogger("flwr").setLevel(logging.WARNING)
        adopt_identity()
        self._app = factory()
        self._round = 0
        self._folding: Folding | None = None

    def task(
        self, jobs: Sequence[Job], contents: Mapping[int, RecordDict], contexts: Iterable[Context], fold: Fold | None
    ) -> list[Answer]:
        """Run the clients of a task, and fold their replies where the task says so."""
        folding = self._folding_of(jobs[0].fold, contents, fold) if jobs and fold is not None else None
        answers = []
        for job, context in zip(jobs, contexts, strict=True):
            answer, began = self.run(job, contents[job.content], context), time.perf_counter()
            if folding is not None:
                folding.add(answer.reply, must=job.again)
                answer = replace(answer, seconds=answer.seconds + time.perf_counter() - began)
            answers.append(answer)
        if folding is None:
            return answers
        receipts = folding.finish()
        return [replace(answer, receipt=receipt) for answer, receipt in zip(answers, receipts, strict=True)]

    def _folding_of(self, number: int, contents: Mapping[int, RecordDict], fold: Fold) -> Folding:
        """The folding of the round that has this content, which begins with its first task."""
        if self._folding is None or self._round != number:
            self._round, self._folding = number, fold(contents[number])
        self._folding.begin()
        return self._folding

    def hand_in(self, others: Sequence[RecordDict]) -> RecordDict:
        """What was folded since this was asked for the last time, together with what neighbours have handed in."""
        assert self._folding is not None, "only a worker that has folded is asked"
        return self._folding.hand_in(others)

    def run(self, job: Job, content: RecordDict, context: Context) -> Answer:
        """Run one client; what it raises becomes an error reply."""
        start = time.perf_counter()
        request = Message(isolated(content), job.node, job.kind, group_id=job.group)
        set_message_id(request, job.message_id)
        try:
            reply = execute(self._app, request, context)
        except DeviceLost:
            os._exit(1)  # a fresh process may have the GPU again, and the driver starts one
        set_message_id(reply, f"r{job.message_id}")
        return Answer(reply, context if len(context.state) else None, time.perf_counter() - start)
