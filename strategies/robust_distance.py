"""Robust aggregation by distances between whole updates: Krum, multi-Krum and the geometric median.

Distances are between changes of the trained parameters; a coordinate that a client did not send is one that it left as it was,
and BatchNorm statistics do not count. All updates are kept in memory until the last has come: O(cohort x model).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fl_sim.core.types import Params, Update, UserError
from strategies.aggregation import mean, zero_filled
from strategies.robust import counted
from strategies.server_step import Aggregate, ServerState
from strategies.sums import Sums

log = logging.getLogger("fl_sim")
PIECE = 1 << 16
"""Coordinates of all clients that are multiplied together."""
STEPS = 64
"""Of Weiszfeld's algorithm at most; a handful is usual."""


def inner_products(state: ServerState, updates: Sequence[Update]) -> Tensor:
    """Inner products of the clients' changes from their coordinate-wise median, (K, K) float64.

    Distances do not depend on the origin; from the median the honest changes are short, however long those of attackers are,
    so that no digit of them is lost.
    """
    old = state.schema.flat(state.params)
    changes = torch.stack(
        [torch.where(counted(state.schema, update), state.schema.flat(update.params) - old, 0.0) for update in updates]
    )
    total = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for start in range(0, state.schema.size, PIECE):
        piece = changes[:, start : start + PIECE]
        piece = piece.double() - piece.median(dim=0).values.double()
        total += piece @ piece.T
    return total


def tolerated(share: float, clients: int) -> int:
    """Bad clients among so many."""
    return int(share * clients + 1e-9)


@dataclass(frozen=True)
class Krum:
    """The updates whose nearest neighbours are closest (Blanchard et al., 2017), aggregated by another rule.

    Of K updates that arrived, f = floor(share K) may be bad. The score of an update is the sum of its squared distances to the
    K - f - 2 nearest others. Krum keeps the update with the smallest score, multi-Krum (`many`) the K - f with the smallest.
    """

    share: float
    many: bool = False
    aggregate: Aggregate = mean

    def __post_init__(self) -> None:
        if not 0 <= self.share < 0.5:
            raise UserError(f"strategy.byzantine = {self.share}: must be at least 0 and below 0.5")

    def require_enough(self, clients: int) -> None:
        """Complain of cohorts that are too small for the guarantee, 2 f + 2 < K.

        Raises:
            UserError: names both numbers.
        """
        bad = tolerated(self.share, clients)
        if not 2 * bad + 2 < clients:
            raise UserError(
                f"strategy.byzantine = {self.share}: Krum withstands {bad} bad of {clients} clients (cohort.size; without rounds "
                f"schedule.buffer) only where 2 x {bad} + 2 < {clients}; lower byzantine, or raise the number of clients"
            )

    def __call__(self, state: ServerState, updates: Iterable[Update]) -> Params:
        kept = list(updates)
        bad = tolerated(self.share, len(kept))
        if kept and not 2 * bad + 2 < len(kept):  # clients failed: the cohort itself is large enough
            log.warning(
                "round %d: Krum withstands %d bad of the %d updates that arrived only where 2 x %d + 2 < %d",
                *(state.round + 1, bad, len(kept), bad, len(kept)),
            )
        if len(kept) < 2:
            return self.aggregate(state, kept)
        products = inner_products(state, kept)
        squares = products.diagonal()
        distances = (squares[:, None] + squares[None, :] - 2 * products).clamp_(min=0.0)
        nearest = distances.sort(dim=1).values[:, 1 : 1 + max(1, len(kept) - bad - 2)]  # the first is itself
        scores = nearest.sum(dim=1).tolist()
        order = sorted(range(len(kept)), key=lambda position: (scores[position], position))
        chosen = sorted(order[: len(kept) - bad if self.many else 1])
        return self.aggregate(state, [kept[position] for position in chosen])


def geometric_median(state: ServerState, updates: Iterable[Update]) -> Params:
    """The point with the least sum of distances to the clients' updates (RFA; Pillutla et al., 2022, algorithm 2).

    Found by smoothed Weiszfeld steps on the inner products. Every client counts once: one that attacks may claim any number of
    examples. BatchNorm statistics are averaged with the weights that come out.
    """
    kept = list(updates)
    if not kept:
        return state.params
    sums = Sums.zeros(state.schema, state.scratch)
    for update, weight in zip(kept, _weights(inner_products(state, kept)), strict=True):
        sums.add(update, weight)
    return zero_filled(state, sums)


def _weights(products: Tensor) -> list[float]:
    """The geometric median as a weighted mean of the updates: their weights, which sum to 1."""
    count = len(products)
    weights = torch.full((count,), 1 / count, dtype=torch.float64)
    # A distance counts as at least a millionth of the usual one; of the largest, attackers would decide it.
    smallest = max(1e-6 * float(products.diagonal().median()) ** 0.5, 1e-30)
    for _ in range(STEPS):
        at = products @ weights
        distances = (products.diagonal() - 2 * at + weights @ at).clamp_(min=0.0).sqrt()
        new = 1 / distances.clamp(min=smallest)
        new /= new.sum()
        moved, weights = float((new - weights).abs().max()), new
        if moved < 1e-9:
            break
    return [float(weight) for weight in weights]
