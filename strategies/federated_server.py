"""Federated round, from sampling to pruning: `FederatedServer.round`.

A federation has one model, or one for each capacity of its clients. Every model has its own schema, mask and cohort;
nothing of one travels to the clients of another. What couples them is the `couple_models` slot, on the server, at no byte.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import cast

from flwr.app import Message
from flwr.serverapp import Grid

from fl_sim.core.types import Mask, Params, Scalar
from fl_sim.runtime.grids.folding import HandedIn, Reply
from fl_sim.runtime.grids.pool import PooledGrid
from strategies.cohorts import R
from strategies.distillation import CoupleModels
from strategies.downlink_sender import Outgoing
from strategies.sparse_server import SparseServer
from strategies.uplink_receiver import OnReply


def no_progress(answered: int, cohort: int) -> None:
    """Show nothing."""


class FederatedServer:
    """The server of one run.

    Attributes:
        models: the server's side of each model; `params`, `mask` and the plain metrics are those of the first.
        couple_models: couples the models after each round.
    """

    def __init__(self, models: Sequence[SparseServer], couple_models: CoupleModels) -> None:
        self.models, self.couple_models = list(models), couple_models

    def round(self, grid: Grid, options: Mapping[str, Scalar], on_reply: OnReply = no_progress) -> None:
        """Run one round: sample and encode, send, then decode, aggregate and prune model by model; clients evaluate.

        Raises:
            RoundFailed: too few usable updates.
        """
        sent = [model.configure_train(grid, options) for model in self.models]
        self.aggregate(grid, sent, self._replies(grid, sent), on_reply)
        self.evaluate(grid)

    def _replies(self, grid: Grid, sent: Sequence[Outgoing]) -> Iterable[Reply | HandedIn]:
        """Send the messages of a round. Worker processes may fold what comes back, where there is one model."""
        messages = [message for each in sent for message in each.messages]
        foldable = self.models[0].foldable(len(messages)) if len(sent) == 1 and isinstance(grid, PooledGrid) else None
        if foldable is None or not isinstance(grid, PooledGrid):
            return grid.send_and_receive(messages)
        return grid.send_and_fold(messages, foldable)

    def aggregate(
        self, grid: Grid, sent: Sequence[Outgoing], replies: Iterable[Reply | HandedIn], on_reply: OnReply = no_progress
    ) -> None:
        """Fold the replies of a round, each model's in turn."""
        streams = _split(
            cast("Iterable[Reply]", replies), sent
        )  # sums are handed in where one model has the whole stream
        for model, outgoing, own in zip(self.models, sent, streams, strict=True):
            model.aggregate_train(grid, outgoing, own, on_reply)
        clock = max(model.receiver.simulated_s for model in self.models)  # one server waits for all models
        for model in self.models:
            model.receiver.simulated_s = clock
        self.couple()

    def couple(self) -> None:
        """Couple the models after a round."""
        if len(self.models) > 1:
            united = self.couple_models([(model.context, model.state) for model in self.models])
            for model, params in zip(self.models, united, strict=True):
                model.accept(params)

    def evaluate(self, grid: Grid) -> Mapping[str, float]:
        """Let a cohort evaluate the new model, where the run asks for it; returns the first model's mean metrics."""
        sent = [model.configure_evaluate(grid) for model in self.models]
        messages = [message for each in sent for message in each.messages]
        return self.fold_evaluation(sent, grid.send_and_receive(messages) if messages else [])

    def fold_evaluation(self, sent: Sequence[Outgoing], replies: Iterable[Message]) -> Mapping[str, float]:
        """Average the metrics of clients that evaluated; returns those of the first model.

        Raises:
            RoundFailed, UserError: see `SparseServer.aggregate_evaluate`.
        """
        own = zip(self.models, sent, _split(replies, sent), strict=True)
        first, *_ = [model.aggregate_evaluate(outgoing, theirs) for model, outgoing, theirs in own]
        return first

    @property
    def params(self) -> Params:
        """Global parameters of the first model."""
        return self.models[0].params

    @property
    def mask(self) -> Mask | None:
        """Global mask of the first model."""
        return self.models[0].mask

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics of the last round; further models' under `name/label`; the clock is one, and clients and failures are sums."""
        first, *others = (model.metrics for model in self.models)
        named = {
            f"{name}/{model.context.label}": value
            for model, metrics in zip(self.models[1:], others, strict=True)
            for name, value in metrics.items()
            if name != "simulated_s"
        }
        sums = {
            name: sum(metrics.get(name, 0) for metrics in (first, *others))
            for name in ("clients", "failures", "evaluation_failures")
            if any(name in metrics for metrics in (first, *others))
        }
        return {**first, **named, **sums}

    @property
    def failures(self) -> dict[str, int]:
        """Failed client tasks so far, by kind, of all models."""
        return {kind: sum(model.failures[kind] for model in self.models) for kind in self.models[0].failures}


def _split(replies: Iterable[R], sent: Sequence[Outgoing]) -> list[Iterable[R]]:
    """One stream of replies for each model; a reply that comes before its model's turn waits.

    A reader stops at as many replies as its cohort has clients, so that with replies in the order of the messages, as our
    Grids give them, none waits.
    """
    if len(sent) == 1:
        return [replies]
    stream = iter(replies)
    owner = {node: number for number, outgoing in enumerate(sent) for node in outgoing.nodes}
    waiting: list[deque[R]] = [deque() for _ in sent]

    def own(number: int) -> Iterator[R]:
        for _ in sent[number].nodes:
            while not waiting[number]:
                reply = next(stream, None)
                if reply is None:
                    return
                waiting[owner[reply.metadata.src_node_id]].append(reply)
            yield waiting[number].popleft()

    return [own(number) for number in range(len(sent))]
