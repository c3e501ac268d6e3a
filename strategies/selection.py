"""Client selection: which clients of a federation take part in a round.

    Method(select=PowerOfChoice(candidates=10))

A rule draws from the generator that it is given, a function of (seed, round), so that a resumed run selects the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fl_sim.core.errors import USERS_OWN, error_line
from fl_sim.core.types import UserError

AskLosses = Callable[[Sequence[int]], Mapping[int, float]]
"""Clients -> of each that answers the mean loss of the global model on its training samples. The question is booked."""


@dataclass(frozen=True)
class Request:
    """Request for the clients of a round.

    Attributes:
        round: number of the round; the first is 1.
        clients: partitions that may be drawn, int64, ascending.
        sizes: training samples of each of them, int64.
        count: how many to draw; at most the number of clients.
        rng: the only generator to draw from.
        losses: asks clients for their loss of the global model; costs a model down and a few bytes up for each.
    """

    round: int
    clients: NDArray[np.int64]
    sizes: NDArray[np.int64]
    count: int
    rng: np.random.Generator
    losses: AskLosses


Select = Callable[[Request], Sequence[int]]
"""Request -> distinct partitions, at least one and at most `count`."""


def uniform(request: Request) -> Sequence[int]:
    """Every client with the same probability, without replacement."""
    return [int(client) for client in request.rng.choice(request.clients, size=request.count, replace=False)]


def by_size(request: Request) -> Sequence[int]:
    """Clients with a probability in proportion to their number of samples, without replacement."""
    return _by_size(request, request.count)


def _by_size(request: Request, count: int) -> list[int]:
    if not request.sizes.sum():
        raise UserError("strategy: a selection by size needs the number of samples of each client")
    share = request.sizes / request.sizes.sum()
    count = min(count, int(np.count_nonzero(share)))
    return [int(client) for client in request.rng.choice(request.clients, size=count, replace=False, p=share)]


@dataclass(frozen=True)
class PowerOfChoice:
    """Power-of-choice (Cho, Wang and Joshi, 2020, section 3, pi_pow-d): of d candidates those with the largest loss.

    Candidates are drawn by size. Each is sent the model and answers its loss, which is booked in the phase `query`; clients
    that fail to answer are passed over. Equal losses go to the lower partition.

    Attributes:
        candidates: d, at least the size of a cohort; more than there are clients asks all of them.
    """

    candidates: int

    def __call__(self, request: Request) -> Sequence[int]:
        if self.candidates < request.count:
            raise UserError(
                f"strategy.candidates = {self.candidates}: must be at least the clients of a round, {request.count}"
            )
        losses = request.losses(sorted(_by_size(request, self.candidates)))
        return sorted(losses, key=lambda client: (-losses[client], client))[: request.count]


def drawn(select: Select, request: Request) -> list[int]:
    """The clients that a rule draws, ascending.

    Raises:
        UserError: it raises, or they are not distinct clients of the request, none or too many.
    """
    try:
        found: object = select(request)
    except (UserError, RuntimeError):  # too few answers to a question are no fault of the rule
        raise
    except USERS_OWN as error:  # the user's own, whatever it is
        raise UserError(f"strategy: the selection rule raised {error_line(error)}") from error
    return checked(found, request)


def checked(found: object, request: Request) -> list[int]:
    """The clients that a rule drew, ascending.

    Raises:
        UserError: they are not distinct clients of the request, none or too many.
    """
    if not isinstance(found, (Sequence, np.ndarray)) or isinstance(found, str):
        raise UserError(f"strategy: the selection rule returned {type(found).__name__}; needed: a list of clients")
    unknown = [client for client in found if client not in request.clients]
    if unknown or len(set(found)) != len(found) or not 1 <= len(found) <= request.count:
        wrong = (
            f"{unknown[0]!r}, which is no client" if unknown else f"{len(set(found))} clients in {len(found)} entries"
        )
        raise UserError(f"strategy: the selection rule returned {wrong}; needed: 1 to {request.count} distinct clients")
    return sorted(int(client) for client in found)
