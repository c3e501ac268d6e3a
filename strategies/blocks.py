"""Blocks of a cohort: consecutive clients whose updates are summed from zero, before the blocks' sums are added in order.

Additions of float64 numbers round, so that their order shows in the last bits. Cut into blocks, the sum of one needs nothing of
the others: whoever has the updates of a block may add them up, a worker process too (`strategies.remote_sums`). Where blocks
begin depends on the size of the cohort alone, and not on the engine, its workers, or clients that failed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fl_sim.codecs import Schema
from fl_sim.core.types import Update
from strategies.sums import Sums

LEAST = 128
"""Clients of the smallest cohort that is cut; smaller ones are one block."""
SMALLEST, MANY, LARGEST = 32, 64, 128
"""A block has at least `SMALLEST` clients. Where that makes more than `MANY` blocks they have more clients, up to `LARGEST`:
what crosses falls by half that number where updates are dense float32, while many workers still get a block each."""


def block_size(cohort: int) -> int:
    """Clients of a block; the last one may have fewer."""
    return max(1, cohort) if cohort < LEAST else min(max(cohort // MANY, SMALLEST), LARGEST)


def blocks_of(cohort: int) -> list[range]:
    """The blocks of a cohort, as places in it."""
    size = block_size(cohort)
    return [range(start, min(start + size, cohort)) for start in range(0, cohort, size)]


@dataclass(frozen=True, slots=True)
class Placed(Update):
    """An update that knows its block.

    Attributes:
        block: its number.
    """

    block: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Summed(Placed):
    """Stands for the updates of a whole block, which were added up elsewhere; it has no parameters.

    Attributes:
        sums: of the block.
        clients: that sent a usable update.
    """

    sums: Sums
    clients: int


class BlockSums:
    """Weighted sums of updates that come in the order of their blocks; updates without one are in the first.

    Memory is that of two sums, of one where there is a single block.
    """

    def __init__(self, schema: Schema, folder: Path | None = None) -> None:
        self._schema, self._folder = schema, folder
        self._total = self._open = Sums.zeros(schema, folder)
        self._block: int | None = None

    def add(self, update: Update) -> None:
        """Fold one update.

        Raises:
            OSError: the disk is full, where sums lie in a file.
        """
        block = update.block if isinstance(update, Placed) else 0
        if isinstance(update, Summed):
            self._close()
            self._total.merge(update.sums)
        else:
            if block != self._block and self._block is not None:
                self._close()
                self._open = Sums.zeros(self._schema, self._folder)
            self._open.add(update)
        self._block = block

    def total(self) -> Sums:
        """The sums of all blocks."""
        self._close()
        return self._total

    def _close(self) -> None:
        """Add the block that is open to the total; the first one is in there already."""
        if self._open is not self._total:
            self._total.merge(self._open)
            self._open = self._total
