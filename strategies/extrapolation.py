"""FedExP: a server step size from how much the clients disagree (Jhunjhunwala et al., ICLR 2023, algorithm 1).

    fl-sim run configs/quickstart.toml strategy=strategies.presets:fedexp

With the clients' changes d_k = x_k - x_old, weights p_k = n_k / sum n and their mean d = sum p_k d_k:

    eta = max(1, sum_k p_k |d_k|^2 / (2 (|d|^2 + epsilon))),    x_new = x_old + eta d

Where clients agree, eta is 1 and the round is FedAvg; the more they pull in different directions, the longer the step.

Deviations: the paper weighs all clients alike, here the examples weigh, as in FedAvg. BatchNorm statistics are no
parameters: they take the mean as it is, and do not count in the norms. A coordinate that a client did not send counts as
unchanged by it. The paper reports the mean of the last two models; here the last one is reported.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from fl_sim.core.types import Params, Update, UserError
from strategies.aggregation import zero_fill
from strategies.server_step import ServerState


@dataclass(frozen=True)
class Extrapolated:
    """Aggregation rule: the weighted mean, extrapolated from the old parameters.

    Attributes:
        epsilon: keeps the step finite where the mean change vanishes; in units of a squared norm.
    """

    epsilon: float = 1e-3

    def __post_init__(self) -> None:
        if not self.epsilon > 0:
            raise UserError(f"strategy.epsilon = {self.epsilon}: must be positive")

    def __call__(self, state: ServerState, updates: Iterable[Update]) -> Params:
        """Parameters of the next model, in schema order; `updates` are read once, one at a time."""
        squares: list[tuple[int, float]] = []

        def measured() -> Iterator[Update]:
            for update in updates:
                squares.append((update.num_examples, float(_change(state, update).square().sum())))
                yield update

        mean = zero_fill(state, measured())
        schema = state.schema
        old = schema.flat(state.params)
        step = (schema.flat(mean) - old).double()
        weight = sum(count for count, _ in squares)
        if not weight:
            return mean
        spread = sum(count * square for count, square in squares) / weight
        length = float(_parameters(state, step).square().sum())
        eta = max(1.0, spread / (2 * (length + self.epsilon)))
        new = schema.view((old.double() + eta * step).float())
        for name in schema.buffers:
            new[name].copy_(mean[name])
        return new


def _parameters(state: ServerState, flat: Tensor) -> Tensor:
    """The flat vector without BatchNorm statistics, which come last in a schema."""
    schema = state.schema
    buffers = sum(
        shape.numel() for name, shape in zip(schema.names, schema.shapes, strict=True) if name in schema.buffers
    )
    return flat[: schema.size - buffers]


def _change(state: ServerState, update: Update) -> Tensor:
    """Change of a client, flat float64, zero where it sent nothing."""
    schema = state.schema
    change = (schema.flat(update.params) - schema.flat(state.params)).double()
    if update.mask is not None:
        change[: schema.prunable_size].mul_(schema.flat_mask(update.mask))
    return _parameters(state, change)
