"""The lines of rounds.jsonl as columns: a hundred thousand rounds take little memory, and a curve no loop over them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import overload

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """A number for each of some rounds: the rounds' numbers, ascending, and the values."""

    rounds: Floats
    values: Floats

    @classmethod
    def of(cls, rounds: Floats, values: Floats) -> Series:
        """In any order; of a round that is there twice, as in a damaged file, the last counts."""
        order = np.argsort(rounds, kind="stable")
        ascending = rounds[order]
        last = np.append(ascending[1:] != ascending[:-1], np.ones(min(1, len(order)), np.bool_))
        return cls(ascending[last], values[order][last])

    def at(self, rounds: Floats) -> Floats:
        """The values at some of its rounds."""
        return self.values[np.searchsorted(self.rounds, rounds)]


def common(series: Iterable[Series]) -> Floats:
    """The rounds for which all of them have a value, ascending."""
    return reduce(np.intersect1d, (each.rounds for each in series))


def combined(series: Sequence[Series], of: Callable[..., Floats]) -> Series:
    """A function of the values of several, where all of them have one."""
    rounds = common(series)
    return Series(rounds, of(*(each.at(rounds) for each in series)))


@dataclass(frozen=True)
class _Column:
    """Places of the rows that have a number, ascending, and the numbers."""

    places: NDArray[np.int64]
    values: NDArray[np.generic]

    @classmethod
    def of(cls, places: list[int], values: list[float]) -> _Column:
        kinds = set(map(type, values))
        exact = kinds == {float} or (kinds == {int} and max(map(abs, values)) < 1 << 63)
        kind = (np.float64 if kinds == {float} else np.int64) if exact else np.object_
        return cls(np.array(places, np.int64), np.array(values, kind))

    def at(self, place: int) -> float | None:
        """The number of one row, of the type that it was given in; None where the row has none."""
        near = int(np.searchsorted(self.places, place))
        if near == len(self.places) or self.places[near] != place:
            return None
        value: float = self.values[near : near + 1].tolist()[0]
        return value


class Rounds(Sequence[Mapping[str, float]]):
    """The rounds of a run. Each is a mapping from the names of its columns to numbers, which is made when it is asked for."""

    def __init__(self, rows: Iterable[Mapping[str, float]]) -> None:
        found: dict[str, tuple[list[int], list[float]]] = {}
        count = 0
        for place, row in enumerate(rows):
            count += 1
            for name, value in row.items():
                places, values = found.setdefault(name, ([], []))
                places.append(place)
                values.append(value)
        self._count = count
        self._columns = {name: _Column.of(*found.pop(name)) for name in list(found)}

    @property
    def names(self) -> Sequence[str]:
        """The columns that any round has, in the order in which they were met."""
        return [*self._columns]

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, place: int) -> Mapping[str, float]: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[Mapping[str, float]]: ...

    def __getitem__(self, place: int | slice) -> Mapping[str, float] | Sequence[Mapping[str, float]]:
        if isinstance(place, slice):
            return [self[at] for at in range(self._count)[place]]
        at = range(self._count)[place]
        found = ((name, column.at(at)) for name, column in self._columns.items())
        return {name: value for name, value in found if value is not None}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(own == each for own, each in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def series(self, name: str) -> Series:
        """A column by round; empty where no round has it."""
        if name not in self._columns:
            return Series(np.zeros(0), np.zeros(0))
        column = self._columns[name]
        numbers = self._columns["round"].values[column.places].astype(np.float64)
        return Series.of(numbers, column.values.astype(np.float64))

    def at(self, name: str, places: Sequence[int]) -> list[float | None]:
        """A column at some places; None where that round does not have it."""
        return [self._columns[name].at(place) for place in places]

    def first(self, name: str, found: Callable[[Floats], NDArray[np.bool_]]) -> Mapping[str, float] | None:
        """The first round whose number in a column is found by a function of the column; None without one."""
        if name not in self._columns:
            return None
        column = self._columns[name]
        places = column.places[found(column.values.astype(np.float64))]
        return self[int(places[0])] if len(places) else None
