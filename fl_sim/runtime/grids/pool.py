"""Process pool: a Grid over worker processes. What a worker is, and how tasks and answers travel, is the engine's business."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

from flwr.app import Message, RecordDict

from fl_sim.runtime.grids.base import LocalGrid
from fl_sim.runtime.grids.costs import Costs
from fl_sim.runtime.grids.dispatch import Finished, Round
from fl_sim.runtime.grids.folding import Fold, Foldable, HandedIn, Reply, Traffic
from fl_sim.runtime.grids.running_sums import HandIn
from fl_sim.runtime.grids.worker import Jobs

WINDOW_BYTES = 256_000_000
"""Finished replies that wait for an earlier one are bounded by about this much, if a reply is as large as its task."""


class PooledGrid(LocalGrid):
    """A Grid over worker processes. Subclasses carry tasks there and answers back."""

    runs_beside = True
    clients_per_task: int | None = None
    window_bytes: int = WINDOW_BYTES
    sums_bytes: float = math.inf
    """Above this size of a sum workers fold nothing."""

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
    def ask(self, worker: int, task: HandIn) -> None:
        """Queue a task of handing in; at most one waits at a worker, beside `DEPTH` others."""

    def place(self, worker: int) -> str | None:
        """The machine of a worker, where that is another one, on which its sum can be put aside."""
        return None

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

    def send_and_fold(self, messages: Sequence[Message], foldable: Foldable) -> Iterator[Reply | HandedIn]:
        """`send_and_receive`, where workers may fold replies; these come in the messages' order, and the sums before the last.

        Raises:
            RuntimeError: a client failed when it had to run again, after its first update was counted.
        """
        for message in messages:
            self._stamp(message)
        return self._begun(list(messages), foldable)

    def fold_of(self, jobs: Jobs) -> Fold | None:
        """How a worker folds the replies of a task; None where they travel."""
        return self.fold if jobs and jobs[0].fold else None

    def _begun(self, messages: list[Message], foldable: Foldable | None) -> Iterator[Reply | HandedIn]:
        if not messages:
            return iter(())
        if self._round is not None:
            raise RuntimeError("one round at a time: read the replies of the last one first")
        self._round = Round(self, messages, foldable)
        return self._replies(self._round)

    def _replies(self, current: Round) -> Iterator[Reply | HandedIn]:
        try:
            for reply in current.replies():
                if current.is_over:
                    self._round = None  # a caller that wants no more than there are never asks for one more
                yield reply
        finally:
            current.sums.give_up()
            busy = [worker for worker, tasks in current.at_work.items() if tasks]
            for worker in set(busy) & set(self.workers()):
                self.replace(worker)  # nobody waits for its answers any more
            if self._round is current:
                self._round = None
