"""Central differential privacy of the clients: bounded changes, Gaussian noise, and what that guarantees.

DP-FedAvg (McMahan et al., 2018, algorithm 1) with cohorts of fixed size drawn without replacement. Neighbouring
federations differ in one client's whole data set, replaced by any other. With cohort m, bound S and noise multiplier z:

    new = old + (sum_k clip_S(change_k) + N(0, (z 2S)^2 I)) / m

Replacing a client moves the sum by at most 2S, which is the sensitivity that z refers to. Opacus and Flower's wrappers
divide by the clipping norm S instead: z = 1 is a noise multiplier of 2 there. Clients that failed count as zero, and m
stays the configured size. Every client counts once, whatever number of examples it claims.

Two bounds hold, and the smaller counts. Amplification by sampling needs clients whose update depends on their data and
the received model alone. Without it T rounds are T Gaussian mechanisms, each client in every round: exactly one of noise
multiplier z / sqrt(T) (Dong et al., 2022), also where clients keep something of their data between rounds
(error feedback, BatchNorm statistics of their own, projections). The reason: what a client keeps is a function of its own data,
its own randomness and the models that were released before. That paper's composition theorem is adaptive, so a
round may use all of these as long as, given the released models, replacing one client moves the round's sum by at most 2S.
It does: the other clients' residuals do not depend on that client, and its own message, residual included, is clipped to S
after it arrived. What clipping cuts off is not fed back. Amplification is another matter: a residual carries a round's data
into later rounds, so that a client that is not drawn then is still not absent, and the subsampling lemma does not apply.

What is protected: every released model, for someone who sees all of them. What is not: the server, which sees each
update; the log (training metrics, the ledger's sizes). A mask that depends on data says which coordinates changed most,
to everybody who sees the message, and noise on values does not hide it. Here it never reaches the released model: a
coordinate that a client did not send counts as unchanged, and noise goes on every coordinate, sent or not. A shared mask
(`Shared`) is a function of the round alone: it reveals nothing, noise is needed on its coordinates only, and because all
clients send the same coordinates, a secure sum of their updates needs no more than the sum of equally long vectors.
Noise comes from the run's seed: right for a simulation, but whoever knows the seed can subtract it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_sim.codecs import Schema
from fl_sim.core.seeding import Purpose, generator
from fl_sim.core.types import Params, Update, UserError
from fl_sim.sparsity import Shared
from strategies.server_step import ServerState

LEAST_NOISE, MOST_NOISE = 1e-6, 1e6
"""Beyond, the epsilon is no number that arithmetic has, and no information either."""
LEAST_VARIANCE = 1e-5
"""Noise may make a BatchNorm variance negative; no model can be evaluated with that."""


@dataclass(frozen=True)
class PrivateMean:
    """The private aggregate; see the module.

    Attributes:
        clip: S, the largest L2 norm of a client's change over everything it sends, BatchNorm statistics included.
        noise: z, standard deviation over sensitivity 2S.
        cohort: m, clients per round as configured.
        seed: the run's seed.
        shared: the mask that all clients use, where they do.
    """

    clip: float
    noise: float
    cohort: int
    seed: int
    shared: Shared | None = None

    def __post_init__(self) -> None:
        if not self.clip > 0 or not self.noise > 0:
            raise UserError(f"strategy: clip = {self.clip} and noise = {self.noise} must be positive")

    def __call__(self, state: ServerState, updates: Iterable[Update]) -> Params:
        schema, number = state.schema, state.round + 1
        old = schema.flat(state.params).double()
        released = torch.ones(schema.size, dtype=torch.bool)
        mask = state.mask if self.shared is None else self.shared(number, {n: state.params[n] for n in schema.prunable})
        if mask is not None:
            released[: schema.prunable_size] = schema.flat_mask(mask)
        total = torch.zeros_like(old)
        for update in updates:
            self._require_shared(schema, update, released)
            change = torch.where(released, schema.flat(update.params).double() - old, 0.0)
            if update.mask is not None:
                change[: schema.prunable_size] *= schema.flat_mask(update.mask)
            norm = float(torch.linalg.vector_norm(change))
            total.add_(change, alpha=min(1.0, self.clip / norm) if norm else 1.0)
        draw = torch.randn(schema.size, generator=generator(self.seed, number, Purpose.PRIVACY), dtype=torch.float64)
        total.add_(draw, alpha=2 * self.clip * self.noise)
        new = old + torch.where(released, total, 0.0) / self.cohort
        params = schema.view(new.float())
        for name in schema.buffers:
            if name.endswith("running_var"):
                params[name].clamp_(min=LEAST_VARIANCE)
        return params

    def _require_shared(self, schema: Schema, update: Update, released: Tensor) -> None:
        """Check that a client sent the coordinates of the shared mask.

        Raises:
            UserError: it sent others, of which no use would be made.
        """
        if self.shared is None:
            return
        if update.mask is None or not torch.equal(schema.flat_mask(update.mask), released[: schema.prunable_size]):
            density = self.shared.density
            raise UserError(
                f"strategy.shared_density = {density:g}: a client sent other coordinates than the shared mask has; needed: "
                f"client.target = 'clients.presets:shared_random', client.density = {density:g}"
            )


@dataclass(frozen=True)
class Accountant:
    """Epsilon after so many rounds: the smaller of two bounds, see the module.

    With amplification by sampling: Renyi differential privacy (Wang et al., 2019; the package dp-accounting). Without:
    the exact composition of Gaussian mechanisms.

    Attributes:
        noise: z. cohort, clients: m of how many clients a round. delta: the guarantee's second number.
        amplified: whether clients keep nothing of their data between rounds, so that sampling amplifies.
    """

    noise: float
    cohort: int
    clients: int
    delta: float
    amplified: bool = True

    def __post_init__(self) -> None:
        if not LEAST_NOISE <= self.noise <= MOST_NOISE:
            raise UserError(f"strategy.noise = {self.noise}: must be from {LEAST_NOISE:g} to {MOST_NOISE:g}")
        if not 0 < self.delta < 1:
            raise UserError(f"strategy.delta = {self.delta}: must be between 0 and 1")
        try:
            import dp_accounting  # noqa: F401
        except ImportError as error:
            raise UserError("strategies.presets:private needs the extra: pip install 'fl-sim[privacy]'") from error

    def __call__(self, rounds: int) -> Mapping[str, float]:
        """`{"epsilon": ...}` for (epsilon, delta) after that many rounds."""
        if rounds == 0:
            return {"epsilon": 0.0}
        composed = gaussian_epsilon(self.noise / math.sqrt(rounds), self.delta)
        return {"epsilon": min(composed, self._by_sampling(rounds)) if self.amplified else composed}

    def _by_sampling(self, rounds: int) -> float:
        from dp_accounting.rdp import compute_epsilon

        orders, divergences = _of_one_round(self.noise, self.cohort, self.clients)
        return float(compute_epsilon(orders, rounds * divergences, self.delta)[0])


@lru_cache(maxsize=64)
def _of_one_round(noise: float, cohort: int, clients: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Renyi orders, and the divergence of one round at each: that of n rounds is n times that.

    Kept, as it takes a tenth of a second, and every round's epsilon is asked for.
    """
    from dp_accounting import GaussianDpEvent, NeighboringRelation, SampledWithoutReplacementDpEvent
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_ONE)
    accountant.compose(SampledWithoutReplacementDpEvent(clients, cohort, GaussianDpEvent(noise)))
    return (
        accountant._orders,
        accountant._rdp,
    )  # no public name: the package answers for the rounds composed so far alone


def gaussian_epsilon(noise: float, delta: float) -> float:
    """The least epsilon of the Gaussian mechanism (Balle and Wang, 2018, theorem 8), from above to twelve digits.

    Args:
        noise: standard deviation over sensitivity.
        delta: 0 to 1, both excluded.
    """
    from scipy.special import log_ndtr

    def spent(epsilon: float) -> float:
        first, second = log_ndtr(0.5 / noise - epsilon * noise), log_ndtr(-0.5 / noise - epsilon * noise)
        return math.exp(first) - math.exp(min(0.0, epsilon + second))

    if spent(0.0) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while spent(high) > delta:
        low, high = high, 2 * high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > delta else (low, middle)
    return high
