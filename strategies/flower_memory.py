"""What a strategy of Flower keeps from round to round: what a checkpoint holds of it, and what it cannot hold.

A strategy that keeps what no checkpoint holds, such as a model that it evaluates, runs to its end as in Flower. That it cannot
be resumed is said in the round in which that begins, and `--resume` is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import FunctionType, MemberDescriptorType
from typing import cast

import numpy as np
from flwr.serverapp.strategy import Strategy
from numpy.lib.array_utils import byte_bounds
from torch import Tensor

from fl_sim.core.types import Params, UserError
from strategies.content_marks import Mark, mark
from strategies.kept_values import owned, read, written

CURRENT = "current_arrays"
"""Attribute in which Flower's strategies remember the global parameters; `configure_train` sets it."""
VALUES, STAYING, LOST = "values", "staying", "lost"
"""What is saved: attributes by name, the names of those that are as the strategy made them, and of what could not be saved."""
log = logging.getLogger("fl_sim")


def layers(strategy: Strategy) -> list[Strategy]:
    """A strategy and those that it wraps, such as Flower's for differential privacy do."""
    inner = [value for value in vars(strategy).values() if isinstance(value, Strategy)]
    return [strategy, *(each for one in inner for each in layers(one))]


@dataclass(frozen=True)
class Held:
    """What a strategy holds at one time.

    Attributes:
        values: attributes that a checkpoint can hold, and that share nothing with the others.
        marks: name -> a mark of what else is held, also by a strategy that this one wraps, and by its classes.
    """

    values: Mapping[str, object]
    marks: Mapping[str, Mark]

    @classmethod
    def by(cls, strategy: Strategy) -> Held:
        """What a strategy holds now."""
        apart = layers(strategy)
        own = _attributes(strategy)
        parts = {name: found for name, value in own.items() if (found := owned(value)) is not None}
        views = _overlapping(parts)
        values = {name: own[name] for name in parts if name not in views}
        marks = {name: mark(value, apart) for name, value in _others(strategy, values).items()}
        # An object that both could reach would be two after reading: then neither is read.
        while shared := [n for n in values if any(parts[n].keys() & each.seen.keys() for each in marks.values())]:
            marks |= {name: mark(values.pop(name), apart) for name in shared}
        return cls(values, marks)


def _overlapping(parts: Mapping[str, Mapping[int, object]]) -> set[str]:
    """Names of arrays that lie in the memory of another one, such as views: after reading each would have its own."""
    arrays = {key: (name, each) for name, found in parts.items() for key, each in found.items()}
    spans = sorted(
        (*byte_bounds(np.asarray(each)), name)
        for name, each in arrays.values()
        if isinstance(each, (np.ndarray, Tensor)) and each.nbytes
    )
    found, end, last = set[str](), 0, ""
    for low, high, name in spans:
        if low < end:
            found |= {name, last}
        if high > end:
            end, last = high, name
    return found


def _attributes(strategy: Strategy) -> dict[str, object]:
    """A strategy's own attributes, without the global parameters where its `configure_train` sets those in each round."""
    hooks = (vars(kind).get("configure_train") for kind in type(strategy).__mro__)
    given = any(CURRENT in hook.__code__.co_names for hook in hooks if isinstance(hook, FunctionType))
    return {name: value for name, value in vars(strategy).items() if not (given and name == CURRENT)}


def _others(strategy: Strategy, values: Mapping[str, object]) -> dict[str, object]:
    """By name, what a strategy, its classes and those that it wraps hold beside `values`."""
    found = {name: value for name, value in _attributes(strategy).items() if name not in values}
    for kind in type(strategy).__mro__[:-1]:
        plain = {n: v for n, v in vars(kind).items() if not n.startswith(("__", "_abc_")) and not hasattr(v, "__get__")}
        found |= {f"{kind.__name__}.{name}": value for name, value in plain.items()}
        slots = (name for name, slot in vars(kind).items() if isinstance(slot, MemberDescriptorType))
        found |= {name: getattr(strategy, name) for name in slots if hasattr(strategy, name)}
    for name, value in vars(strategy).items():
        if isinstance(value, Strategy):
            found |= {f"{name}.{inner}": each for inner, each in _others(value, {}).items()}
    return found


def _kind(value: object) -> str:
    dtype = f" of {value.dtype}" if isinstance(value, (np.ndarray, Tensor)) else ""
    return type(value).__name__ + dtype


@dataclass
class Keeper:
    """Gives a strategy what it kept of a model, and takes what it keeps after a round.

    Attributes:
        where: what the user wrote, for messages.
    """

    strategy: Strategy
    where: str
    _made: dict[str, object] = field(init=False)
    _first: Held = field(init=False)
    _start: Params = field(init=False)
    _lost: set[str] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        self._made, self._first = dict(vars(self.strategy)), Held.by(self.strategy)
        self._start = self._saved(self._first)
        for name, each in self._first.marks.items():
            if each.hidden:
                log.warning(
                    "%s: keeps %r, in which a change of a %s is not seen: such a change would be lost by a resumed run",
                    *(self.where, name, min(each.hidden)),
                )

    def give(self, memory: Params) -> None:
        """Give the strategy what it kept of this model after the last round, and nothing else.

        Raises:
            UserError: these tensors were not made by `take`, or by one of another process that could not save everything.
        """
        try:
            saved = read(memory or self._start)
            values, staying = cast("dict[str, object]", saved[VALUES]), cast("list[str]", saved[STAYING])
            lost = cast("list[str]", saved[LOST])
            kept = {name: self._made[name] for name in staying} | values
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.where}: the checkpoint holds no memory of this strategy; needed: --fresh"
            ) from error
        if unknown := set(lost) - self._lost:
            raise UserError(
                f"{self.where}: keeps {min(unknown)!r}, which the checkpoint does not hold: it cannot be resumed; needed: --fresh"
            )
        now = vars(self.strategy)
        kept = {name: value for name, value in kept.items() if name not in lost}
        kept |= {name: now[name] for name in lost if name in now}
        vars(self.strategy).clear()
        vars(self.strategy).update(kept)

    def take(self) -> Params:
        """What the strategy keeps now, as tensors. What a checkpoint cannot hold and is not as it was made is said, once."""
        held, first = Held.by(self.strategy), self._first.marks
        named = {**_others(self.strategy, {}), **vars(self.strategy)}
        inner = {name for name in first if name not in self._made}
        for name in sorted(held.marks.keys() | inner):
            now = held.marks.get(name)
            if name not in self._lost and (now is None or name not in first or now.digest != first[name].digest):
                self._lost.add(name)
                log.warning(
                    "%s: keeps %r as %s, which a checkpoint cannot hold: this run cannot be resumed",
                    *(self.where, name, _kind(named.get(name))),
                )
        return self._saved(held)

    def _saved(self, held: Held) -> Params:
        staying = [name for name in vars(self.strategy) if name in self._made and name not in held.values]
        return written({VALUES: dict(held.values), STAYING: staying, LOST: sorted(self._lost)})
