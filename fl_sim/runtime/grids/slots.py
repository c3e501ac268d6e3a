"""Slots of the memory that a worker process shares with the program: what each task and its answers lie in."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from fl_sim.runtime.grids.scheduling import DEPTH
from fl_sim.runtime.state.shared_memory import Area, Key, Span

MOST_TASKS = DEPTH + 1
"""Tasks that a worker may have: those of clients, and that of handing in what it added up."""
SLOTS = MOST_TASKS + 1
"""Those of its tasks, and one whose replies are read where they lie."""


def _areas() -> tuple[Area, ...]:
    return tuple(Area() for _ in range(SLOTS))


@dataclass(frozen=True)
class Areas:
    """The memory that a worker shares with the program: broadcasts, and in each slot what a task brings and its answers."""

    broadcast: Area
    inbox: tuple[Area, ...] = field(default_factory=_areas)
    outbox: tuple[Area, ...] = field(default_factory=_areas)

    def close(self) -> None:
        """Give the slots back, as far as this process goes."""
        for area in (*self.inbox, *self.outbox):
            area.close()


@dataclass
class Slots:
    """Which slots of a worker are free; it takes its tasks in order."""

    areas: Areas
    _free: list[int] = field(default_factory=lambda: list(range(SLOTS)))
    _taken: deque[int] = field(default_factory=deque)

    def take(self) -> int:
        """A free slot, for the worker's next task."""
        self._taken.append(slot := self._free.pop())
        return slot

    def answered(self) -> int:
        """The slot of the worker's oldest task, whose answers are there."""
        return self._taken.popleft()

    def read(
        self, slot: int, replies: Sequence[Mapping[Key, Span]]
    ) -> Sequence[Mapping[Key, bytes] | Mapping[Key, memoryview]]:
        """The array bytes of an answered task's replies. They are read where they lie, and the slot is free once nobody has them
        any more, where that leaves a slot for each task that the worker may have. Else they are copied."""
        outbox, free = self.areas.outbox[slot], partial(self._free.append, slot)
        if len(self._free) + len(self._taken) >= MOST_TASKS:
            return outbox.lend(replies, free)
        copies = [outbox.copied(spans) for spans in replies]
        free()
        return copies
