"""A Flower Strategy around a server, for ServerApps of users and for SuperLinks.

    strategy = FlowerStrategy(method.server(context))
    strategy.start(grid, ArrayRecord(), num_rounds=10)

`fl-sim run` does not need it: its loop calls `FederatedServer.round`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fl_sim.core.types import Mask, Params
from strategies.downlink_sender import Outgoing
from strategies.federated_server import FederatedServer
from strategies.sparse_server import SparseServer

log = logging.getLogger("fl_sim")


class FlowerStrategy(Strategy):
    """Calls the two halves of a server's round from Flower's hooks; parameters stay with the server."""

    def __init__(self, server: FederatedServer) -> None:
        self.server = server
        self._round: tuple[Grid, Sequence[Outgoing]] | None = None

    @property
    def params(self) -> Params:
        """Global parameters of the first model."""
        return self.server.params

    @property
    def mask(self) -> Mask | None:
        """Global mask of the first model."""
        return self.server.mask

    @property
    def metrics(self) -> Mapping[str, float]:
        """Metrics of the last round."""
        return self.server.metrics

    def _begin(self, grid: Grid, sent: Sequence[Outgoing]) -> list[Message]:
        self._round = grid, sent
        return [message for each in sent for message in each.messages]

    def _begun(self) -> tuple[Grid, Sequence[Outgoing]]:
        if self._round is None:
            raise RuntimeError("Flower calls a configure hook before its aggregate hook")
        return self._round

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        options = {k: v for k, v in config.items() if isinstance(v, (bool, int, float, str, bytes))}
        return self._begin(grid, [model.configure_train(grid, options) for model in self.server.models])

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        self.server.aggregate(*self._begun(), replies)
        return ArrayRecord(), MetricRecord({**self.server.models[0].round_log.metrics})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self._begin(grid, [model.configure_evaluate(grid) for model in self.server.models])

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        found = self.server.fold_evaluation(self._begun()[1], replies)
        return MetricRecord({**found}) if found else None

    def summary(self) -> None:
        for model in self.server.models:
            log.info("%s: %d clients a round", _name(model), model.context.sampling.cohort_size)


def _name(model: SparseServer) -> str:
    return model.context.label or "model"
