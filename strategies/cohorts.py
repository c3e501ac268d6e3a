"""Client sampling: partitions, the nodes that hold them, and cohorts drawn from the seed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fl_sim.communication import messages as wire
from fl_sim.communication.messages import PARTITION
from fl_sim.core.numbered import Numbered
from fl_sim.core.seeding import Purpose, numpy_generator
from fl_sim.runtime.grids.folding import Reply
from fl_sim.runtime.worlds import World, require_same

R = TypeVar("R", Message, Reply)
Cohort = Sequence[tuple[int, int]]
"""(partition, node) of each client drawn, in partition order."""


@runtime_checkable
class KnowsPartitions(Protocol):
    """A Grid that knows which partition each node holds."""

    @property
    def partitions(self) -> Mapping[int, int]:
        """Node id -> partition."""


@dataclass
class Cohorts:
    """Samples cohorts; the clients of a federation are looked up on the Grid once.

    Attributes:
        seed: the run's seed.
        members: partitions that take part; None = all.
        world: hashes of what this process has built; nodes that were asked must have built the same.
        away: partitions that cannot be asked now; none in a federation with rounds.
    """

    seed: int
    members: Sequence[int] | None = None
    world: World = field(default_factory=dict)
    away: Callable[[], Collection[int]] = frozenset
    _nodes: Mapping[int, int] = field(default_factory=dict)
    _partition_of: Mapping[int, int] = field(default_factory=dict)
    _last: tuple[tuple[int, Purpose, int] | None, Cohort] = (None, ())
    _partitions: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))

    def nodes(self, grid: Grid) -> Mapping[int, int]:
        """Partition -> node id, in partition order. Our Grids know it; other runtimes are asked once, by a query."""
        if not self._nodes:
            found = grid.partitions if isinstance(grid, KnowsPartitions) else _ask(grid, self.world)
            everybody = isinstance(found, Numbered) and self.members == range(len(found))
            if self.members is not None and not everybody:
                members = set(self.members)
                found = {node: partition for node, partition in found.items() if partition in members}
            self._nodes, self._partition_of = _by_partition(found), found
            self._partitions = np.fromiter(self._nodes, dtype=np.int64, count=len(self._nodes))
        return self._nodes

    def everybody(self, grid: Grid) -> NDArray[np.int64]:
        """All partitions that take part, ascending."""
        self.nodes(grid)
        return self._partitions

    def draw(self, number: int, purpose: Purpose, size: int, partitions: NDArray[np.int64]) -> list[int]:
        """Partitions drawn for a round: a function of (seed, round, purpose) alone, sorted."""
        rng = numpy_generator(self.seed, number, purpose)
        return sorted(rng.choice(partitions, size=min(size, len(partitions)), replace=False).tolist())

    def cohort(self, grid: Grid, number: int, purpose: Purpose, size: int) -> Cohort:
        """The clients drawn for a round of this Grid; the last one asked for is remembered."""
        nodes, key = self.nodes(grid), (number, purpose, size)
        if self._last[0] != key:
            away = self.away()
            there = self._partitions[~np.isin(self._partitions, list(away))] if away else self._partitions
            drawn = self.draw(number, purpose, size, there)
            self._last = key, [(partition, nodes[partition]) for partition in drawn]
        return self._last[1]

    def in_order(self, replies: Iterable[R], cohort: Cohort) -> Iterator[tuple[int, R]]:
        """(partition, reply) in the cohort's order. Early replies wait; our Grids send none early, others may send all."""
        waiting: dict[int, R] = {}
        due = iter(cohort)
        head, _ = next(due, (None, None))
        for reply in replies:
            waiting[self._partition_of[reply.metadata.src_node_id]] = reply
            del reply  # so that a reply can be freed before the next one is decoded
            while head is not None and head in waiting:
                yield head, waiting.pop(head)
                head, _ = next(due, (None, None))
        # Clients still missing never answered: go on with the rest, still in order.
        yield from sorted(waiting.items())


def _by_partition(found: Mapping[int, int]) -> Mapping[int, int]:
    """Partition -> node, in partition order, of a mapping node -> partition."""
    if isinstance(found, Numbered):
        return found.inverse
    return {partition: node for node, partition in sorted(found.items(), key=lambda pair: pair[1])}


def _ask(grid: Grid, world: World) -> dict[int, int]:
    messages = [Message(RecordDict(), node, MessageType.QUERY, group_id="0") for node in sorted(grid.get_node_ids())]
    replies = [reply for reply in grid.send_and_receive(messages, timeout=60) if reply.has_content()]
    answers = {r.metadata.src_node_id: r.content.config_records[wire.CONFIG] for r in replies}
    for node, record in answers.items():
        require_same(world, {name: str(record[name]) for name in world if name in record}, f"node {node}")
    return {node: int(str(record[PARTITION])) for node, record in answers.items()}
