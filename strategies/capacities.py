"""Rounds of a federation whose clients have different models: each model is aggregated over the clients that have it.

Every model is an ordinary `SparseStrategy` with its own schema, mask and cohort; nothing of one travels to the clients of
another. What couples them is `Method.unite`, on the server, at no byte on the wire.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fl_sim.core.types import Mask, Params

if TYPE_CHECKING:
    from strategies.base import SparseStrategy
    from strategies.distillation import Unite


class Capacities(Strategy):
    """Several strategies in step; `params`, `mask` and the plain metrics are those of the first."""

    def __init__(self, parts: Sequence[SparseStrategy], unite: Unite) -> None:
        self.parts, self.unite = list(parts), unite

    @property
    def params(self) -> Params:
        """Global parameters of the first model."""
        return self.parts[0].params

    @property
    def mask(self) -> Mask | None:
        """Global mask of the first model."""
        return self.parts[0].mask

    @property
    def metrics(self) -> dict[str, float]:
        """Those of each model, the others' under `name/label`; clients and failures are sums."""
        first, *others = (part.metrics for part in self.parts)
        named = {
            f"{name}/{part.setup.label}": value
            for part, metrics in zip(self.parts[1:], others, strict=True)
            for name, value in metrics.items()
        }
        sums = {name: sum(part.metrics[name] for part in self.parts) for name in ("clients", "failures")}
        return {**first, **named, **sums}

    @property
    def failures(self) -> Mapping[str, int]:
        """Failed client tasks so far, by kind, of all models."""
        return {kind: sum(part.failures[kind] for part in self.parts) for kind in self.parts[0].failures}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return [m for part in self.parts for m in part.configure_train(server_round, arrays, config, grid)]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        shared = _Shared(replies, self.parts)
        for part in self.parts:
            part.aggregate_train(server_round, shared.of(part))
        united = self.unite([(part.setup, part.state) for part in self.parts])
        for part, params in zip(self.parts, united, strict=True):
            part.state = replace(part.state, params=params)
        return ArrayRecord(), MetricRecord({})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return [m for part in self.parts for m in part.configure_evaluate(server_round, arrays, config, grid)]

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        shared = _Shared(replies, self.parts)
        found = [part.aggregate_evaluate(server_round, shared.of(part)) for part in self.parts]
        return found[0]

    def summary(self) -> None:
        for part in self.parts:
            part.summary()


class _Shared:
    """One stream of replies, read by several strategies in turn: what is not for the reader waits for the one it is for.

    A reader stops at as many replies as its cohort has clients, so that with replies in the order of the messages, as our
    Grids give them, none waits.
    """

    def __init__(self, replies: Iterable[Message], parts: Sequence[SparseStrategy]) -> None:
        self._replies = iter(replies)
        self._owner = {node: number for number, part in enumerate(parts) for node in part.expected}
        self._parts = list(parts)
        self._waiting: list[deque[Message]] = [deque() for _ in parts]

    def of(self, part: SparseStrategy) -> Iterator[Message]:
        """The replies of this strategy's clients."""
        own = self._waiting[self._parts.index(part)]
        for _ in part.expected:
            while not own:
                reply = next(self._replies, None)
                if reply is None:
                    return
                self._waiting[self._owner[reply.metadata.src_node_id]].append(reply)
            yield own.popleft()
