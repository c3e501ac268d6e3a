"""The server's side of methods that correct the drift between clients: SCAFFOLD, FedDyn, FedNova, q-FedAvg.

Each takes clients of its own (`clients.corrections`): a client that does not declare the same extra tensors is refused
before round 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fl_sim.communication.extra import parameters
from fl_sim.core.types import Params, Update, UserError
from fl_sim.training.loop import Training
from strategies.aggregation import EQUAL, mean
from strategies.reading import ReadOnce
from strategies.robust import is_statistic
from strategies.server_step import Aggregate, ServerState, with_statistics


def changed(state: ServerState, params: Params, factor: float) -> Params:
    """The global parameters plus `factor` times the change to `params`; BatchNorm statistics are those of `params`."""
    schema = state.schema
    old = schema.flat(state.params)
    return with_statistics(schema, old + factor * (schema.flat(params) - old), params)


@dataclass(frozen=True)
class ControlVariates:
    """The server of SCAFFOLD (Karimireddy et al., 2020, algorithm 1, lines 16 and 17).

    `x <- x + lr mean(y_i - x)`, `c <- c + |S| / N mean(c_i+ - c_i)`: means over the clients S of the round, each counting
    once, of the N in the federation. The clients' extra tensors are `c_i+ - c_i`, those of their tasks c.
    """

    lr: float = 1.0

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise UserError(f"strategy.lr = {self.lr}: must be above 0")

    def send(self, state: ServerState) -> Mapping[str, Params]:
        """The control variate c."""
        return {"control": parameters(state.schema).view(self._control(state))}

    def _control(self, state: ServerState) -> Tensor:
        kept = state.memory.get("control")
        return torch.zeros(parameters(state.schema).size) if kept is None else kept

    def __call__(self, state: ServerState, aggregated: Params) -> tuple[Params, Params]:
        arrived, control = state.arrived, self._control(state)
        if arrived.clients:
            control = (control.double() + arrived.sums["control"] / arrived.members).float()
        return changed(state, aggregated, self.lr), {"control": control}


@dataclass(frozen=True)
class DynamicRegularisation:
    """The server of FedDyn (Acar et al., 2021, algorithm 1): `h <- h - alpha / N sum(w_i - w)`, `w <- mean(w_i) - h / alpha`.

    The sum and the mean are over the clients of the round, each counting once; N clients are in the federation.
    """

    alpha: float

    def __post_init__(self) -> None:
        if not 0 < self.alpha < float("inf"):
            raise UserError(f"strategy.alpha = {self.alpha}: must be above 0")

    def send(self, state: ServerState) -> Mapping[str, Params]:
        """Alpha, which the clients' losses have too."""
        return {"alpha": {"alpha": torch.tensor([self.alpha])}}

    def __call__(self, state: ServerState, aggregated: Params) -> tuple[Params, Params]:
        schema, arrived = state.schema, state.arrived
        old, mean = schema.flat(state.params), schema.flat(aggregated)
        h = state.memory.get("h", torch.zeros_like(old))
        if arrived.clients:
            h = h - self.alpha * arrived.clients / arrived.members * (mean - old)
        return with_statistics(schema, mean - h / self.alpha, aggregated), {"h": h}


def _mean_change(state: ServerState, aggregate: Aggregate, scaled: Iterable[tuple[Update, float]]) -> Params:
    """What a rule makes of the clients' changes, each times its factor; BatchNorm statistics are what it makes of theirs.

    The changes alone, not added to the old parameters: beside those, a change times 1e-8 would be rounded away.
    """
    schema = state.schema
    old, zero = schema.flat(state.params), schema.view(torch.zeros(schema.size))

    def changes() -> Iterator[Update]:
        for update, factor in scaled:
            change = (schema.flat(update.params) - old).mul_(factor)
            yield replace(update, params=with_statistics(schema, change, update.params))

    return aggregate(replace(state, params=zero), ReadOnce(changes()))


def _moved(state: ServerState, change: Params, factor: float) -> Params:
    """The global parameters plus `factor` times a change; BatchNorm statistics are those beside the change."""
    flat = state.schema.flat
    moved = flat(state.params).double().add_(flat(change).double(), alpha=factor)
    return with_statistics(state.schema, moved.float(), change)


@dataclass(frozen=True)
class NormalisedMean:
    """FedNova (Wang et al., 2020, equations 6 and 7): `x + (sum p_i t_i) (sum p_i (y_i - x) / t_i)`, `p_i = n_i / n`.

    t_i, the extra tensor "steps", is the client's effective number of local steps.
    """

    aggregate: Aggregate = mean

    def __call__(self, state: ServerState, updates: Iterable[Update]) -> Params:
        weight = steps = 0.0

        def normalised() -> Iterator[tuple[Update, float]]:
            nonlocal weight, steps
            for update in updates:
                taken = float(update.extra["steps"]["steps"])
                weight, steps = weight + update.num_examples, steps + update.num_examples * taken
                yield update, 1 / taken

        normal = _mean_change(state, self.aggregate, normalised())
        return _moved(state, normal, steps / weight) if weight else state.params


@dataclass(frozen=True)
class FairMean:
    """q-FedAvg (Li et al., 2020, algorithm 2): `w - sum(D_i) / sum(h_i)`, `D_i = L F_i^q (w - w_i)`.

    `h_i = q F_i^(q-1) ||L (w - w_i)||^2 + L F_i^q`. F_i, the extra tensor "loss", is the client's loss of the received model,
    and `L = 1 / lr` of the round's local learning rate. Every client counts once; the norm is over parameters, statistics left out.
    """

    q: float
    training: Training
    aggregate: Aggregate = EQUAL

    def __post_init__(self) -> None:
        if not 0 <= self.q <= 100:
            raise UserError(f"strategy.q = {self.q}: must be from 0 to 100")

    def __call__(self, state: ServerState, updates: Iterable[Update]) -> Params:
        lipschitz, total, clients = 1 / self.training.at(state.round + 1).lr, 0.0, 0
        counted = ~is_statistic(state.schema)
        old = state.schema.flat(state.params)

        def weighed() -> Iterator[tuple[Update, float]]:
            nonlocal total, clients
            first = None
            for update in updates:
                loss = max(float(update.extra["loss"]["loss"]), SMALLEST)
                first = loss if first is None else first
                change = torch.where(counted, state.schema.flat(update.params) - old, 0.0)
                square = float(change.double().square().sum()) * lipschitz**2
                weight = self._weight(loss, first, state.round + 1)
                total += weight * (self.q / loss * square + lipschitz)
                clients += 1
                yield update, weight

        weighted = _mean_change(state, self.aggregate, weighed())
        return _moved(state, weighted, lipschitz * clients / total) if clients else state.params

    def _weight(self, loss: float, first: float, number: int) -> float:
        """`loss^q` in a unit that cancels out of D_i and h_i: that of the round's first client is `LIGHT`, as the powers
        themselves may be too large or too small for float32.

        Raises:
            UserError: it is too large nevertheless.
        """
        apart = self.q * math.log10(loss / first)
        if apart > APART:
            raise UserError(
                f"strategy.q = {self.q:g}: in round {number} clients have losses of {first:.3g} and {loss:.3g}, whose powers "
                f"loss^q are more than 1e{APART} apart; lower strategy.q"
            )
        return LIGHT * 10**apart


SMALLEST = 1e-10
"""Loss below which a client counts as if it had this one: F^(q-1) has to be finite."""
LIGHT, APART = 1e-28, 64
"""Of the powers of the losses: that of the first client, and how many powers of ten another one may be above it. Times a
weight's change they all are numbers that float32 has."""
