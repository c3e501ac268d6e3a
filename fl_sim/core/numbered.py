"""A mapping between two ranges of numbers, such as nodes and partitions: a million entries take no memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Numbered(Mapping[int, int]):
    """The n-th number of `sources` -> the n-th of `targets`; both are as long."""

    sources: range
    targets: range

    def __getitem__(self, key: int) -> int:
        if key not in self.sources:
            raise KeyError(key)
        return self.targets[self.sources.index(key)]

    def __iter__(self) -> Iterator[int]:
        return iter(self.sources)

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def inverse(self) -> Numbered:
        """The mapping back."""
        return Numbered(self.targets, self.sources)
