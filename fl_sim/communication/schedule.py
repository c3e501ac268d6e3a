"""When clients train and the server steps: rounds, or a federation in virtual time without rounds (`[schedule]`).

[schedule]
kind = "fedbuff"
buffer = 10           # updates of a server step
concurrency = 100     # clients that train at a time
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fl_sim.core.types import UserError

ROUNDS = "rounds"
KINDS: Mapping[str, str] = {
    ROUNDS: "Rounds: the server waits for a cohort.",
    "fedbuff": "A step after every `buffer` updates; each adds its change (FedBuff; Nguyen et al., 2022, algorithm 1).",
    "fedasync": "A step after every update, which is mixed in (FedAsync; Xie et al., 2019, algorithm 1).",
    "deadline": "A step every `network.deadline_s` seconds; updates that come later count in the next one (semi-synchronous).",
}
STALENESS: Mapping[str, Callable[[float, float], float]] = {
    "constant": lambda stale, exponent: 1.0,
    "polynomial": lambda stale, exponent: (1.0 + stale) ** -exponent,
    "hinge": lambda stale, exponent: 1.0 if stale <= HINGE else 1.0 / (1.0 + exponent * (stale - HINGE)),
}
"""(versions that the model is ahead, exponent) -> weight of the update (Xie et al., 2019, section 5.2)."""
HINGE = 4
"""Versions from which on "hinge" weighs an update less."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When clients train and the server steps. A step is what a round is elsewhere: one line of rounds.jsonl.

    Attributes:
        kind: "rounds": the server waits for a cohort. "fedbuff": a step after every `buffer` updates. "fedasync": a step after
            every update, which is mixed into the model. "deadline": a step every `network.deadline_s` seconds. All but
            rounds need `network.links` or `schedule.devices`.
        buffer: updates of a step of "fedbuff".
        concurrency: clients that train at a time; unset = cohort.size.
        staleness: weight of an update whose model is older than the server's: "constant", "polynomial" or "hinge".
        exponent: how fast a stale update loses weight, at least 0.
        max_staleness: older updates are late: booked, not used. 0 = no client is given a model that will be stale. Unset = any.
        mixing: share of the model that an update replaces in "fedasync", above 0 and at most 1.
        availability: file that says when each client is reachable, see docs/asynchrony.md. Unset = always.
        devices: file with each client's link and speed; it takes the place of `links`, `samples_per_s` and `speed_spread` of
            `[network]`.
    """

    kind: str = ROUNDS
    buffer: int = 10
    concurrency: int | None = None
    staleness: str = "polynomial"
    exponent: float = 0.5
    max_staleness: int | None = None
    mixing: float = 0.6
    availability: str | None = None
    devices: str | None = None

    def __post_init__(self) -> None:
        for key, value, allowed in (("kind", self.kind, KINDS), ("staleness", self.staleness, STALENESS)):
            if value not in allowed:
                raise UserError(f"schedule.{key} = {value!r}: unknown; allowed: {', '.join(allowed)}")
        for name, number, least in (
            ("buffer", self.buffer, 1),
            ("concurrency", self.concurrency, 1),
            ("max_staleness", self.max_staleness, 0),
        ):
            if number is not None and number < least:
                raise UserError(f"schedule.{name} = {number}: must be at least {least}")
        if not 0 <= self.exponent < math.inf:
            raise UserError(f"schedule.exponent = {self.exponent}: must be a number of at least 0")
        if not 0 < self.mixing <= 1:
            raise UserError(f"schedule.mixing = {self.mixing}: must be above 0 and at most 1")

    @property
    def in_rounds(self) -> bool:
        """Whether the server waits for a cohort."""
        return self.kind == ROUNDS

    @property
    def wanted(self) -> int | None:
        """Updates of a step; None where the clock decides."""
        return {"fedbuff": self.buffer, "fedasync": 1}.get(self.kind)

    def is_too_old(self, stale: int) -> bool:
        """Whether an update that starts from a model `stale` versions old is not used."""
        return self.max_staleness is not None and stale > self.max_staleness

    def weight(self, stale: int) -> float:
        """Weight of an update that starts from a model `stale` versions old."""
        mixing = self.mixing if self.kind == "fedasync" else 1.0
        return mixing * STALENESS[self.staleness](float(stale), self.exponent)
