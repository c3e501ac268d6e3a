"""Log of a round: usable replies, failures and their reasons, bytes and seconds for the clock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from flwr.app import Message

from fl_sim.communication.flower_private import CLIENT_ANSWERED_NONSENSE, CLIENT_APP_CRASHED, CLIENT_APP_OVERDUE
from fl_sim.core.types import UserError

KINDS = ("raised", "rejected", "late", "lost")
ERRORS = {CLIENT_APP_CRASHED: "lost", CLIENT_APP_OVERDUE: "late"}
"""Kind of failure by Flower's error code; every other code is a client that raised."""


class RoundFailed(RuntimeError):
    """Too few clients of a cohort returned a usable update."""


class Unusable(Exception):
    """An unusable reply; `kind` is one of `KINDS`. Simulated dropouts do not count as faults."""

    def __init__(self, kind: str, reason: str, *, is_fault: bool = True, is_nonsense: bool = False) -> None:
        super().__init__(reason)
        self.kind, self.is_fault, self.is_nonsense = kind, is_fault, is_nonsense


def require_content(client: int, reply: Message) -> None:
    """Raises Unusable where a client or its process failed."""
    if reply.has_error():
        code, reason = reply.error.code, reply.error.reason or f"client {client}: no reason"
        raise Unusable(ERRORS.get(code, "raised"), reason, is_nonsense=code == CLIENT_ANSWERED_NONSENSE)


@dataclass(frozen=True)
class Failure:
    """A failure: one client of one round that returned no usable update, and why."""

    client: int
    kind: str
    reason: str


@dataclass
class RoundLog:
    """Log of the round in progress: weighted training metrics and failures."""

    replies: int = 0
    faults: int = 0
    nonsense: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    down_bytes: dict[int, int] = field(default_factory=dict)
    finished_s: list[float] = field(default_factory=list)
    chosen: list[Mapping[str, float]] = field(default_factory=list)

    def add(self, count: int, metrics: Mapping[str, float]) -> None:
        """Count a usable reply; each metric is averaged over the clients that report it, by their number of examples."""
        self.replies += 1
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + count * value
            self.weights[name] = self.weights.get(name, 0.0) + count

    def failed(self, client: int, problem: Unusable) -> None:
        """Count a reply that the round goes on without."""
        self.faults += problem.is_fault
        self.nonsense += problem.is_nonsense
        self.failures.append(Failure(client, problem.kind, str(problem)))

    @property
    def metrics(self) -> dict[str, float]:
        """Example-weighted means of the clients' metrics, each over those that reported it."""
        return {name: total / self.weights[name] for name, total in self.sums.items()}

    @property
    def sent(self) -> dict[str, float]:
        """Layer -> share of its coordinates in the updates that chose their own; empty where none did."""
        names = self.chosen[0] if self.chosen else {}
        return {name: sum(shares[name] for shares in self.chosen) / len(self.chosen) for name in names}

    def require_any(self, number: int, cohort: int, did: str) -> None:
        """Stop where none of the `cohort` clients of round `number` did what it was asked.

        Raises:
            UserError: what every client answers is nonsense.
            RoundFailed: otherwise.
        """
        if self.replies == 0:
            # What no client at all gets right is wrong with the client that the config names.
            kind = UserError if self.nonsense == cohort else RoundFailed
            raise kind(f"round {number}: none of {cohort} clients {did}: {self._first}")

    def require_enough(self, number: int, cohort: int, max_share: float) -> None:
        """Stop where round `number` has no update, or more faults than `max_share` of its `cohort` clients.

        Raises:
            UserError, RoundFailed: see `require_any`; too many faults are a `RoundFailed`.
        """
        self.require_any(number, cohort, "returned an update")
        if self.faults > max_share * cohort:
            share = f"{self.faults} of {cohort} clients failed, faults.max_share allows {max_share:g}"
            raise RoundFailed(f"round {number}: {share}: {self._first}")

    @property
    def _first(self) -> str:
        """Why the first client failed."""
        return self.failures[0].reason if self.failures else "no client answered in time"
