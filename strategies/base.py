"""A server algorithm as a composition of functions: `Method`.

    method = Method(aggregate=zero_fill_mean, adjust_mask=PruneTo(...), optimise=Momentum(lr=1.0, beta=0.9))

A `[strategy]` target of a config returns one.
"""

from __future__ import annotations

from fl_sim.runtime.server_context import ServerContext
from strategies.asynchronous import AsyncServer
from strategies.federated_server import FederatedServer
from strategies.flower_strategy import FlowerStrategy
from strategies.round_log import Failure, RoundFailed, RoundLog
from strategies.slots import RoundMetrics, Slots, no_metrics, require_one_model
from strategies.sparse_server import SparseServer

__all__ = [
    "Failure",
    "FederatedServer",
    "FlowerStrategy",
    "Method",
    "RoundFailed",
    "RoundLog",
    "RoundMetrics",
    "no_metrics",
]


class Method(Slots):
    """A server algorithm; see `Slots` for its fields."""

    def server(self, context: ServerContext, *others: ServerContext) -> FederatedServer | AsyncServer:
        """The server of one run; `others` are the contexts of further models, one for each capacity."""
        if not context.schedule.in_rounds:
            return AsyncServer(self, context, *others)
        return self.federated(context, *others)

    def federated(self, context: ServerContext, *others: ServerContext) -> FederatedServer:
        """The server of a run in rounds.

        Raises:
            UserError: several models, and a guarantee for one.
        """
        if others:
            require_one_model(self)
        return FederatedServer([SparseServer(self, each) for each in (context, *others)], self.couple_models)

    def strategy(self, context: ServerContext, *others: ServerContext) -> FlowerStrategy:
        """A Flower Strategy for a ServerApp of your own: `strategy.start(grid, ArrayRecord(), num_rounds=...)`."""
        return FlowerStrategy(self.federated(context, *others))
