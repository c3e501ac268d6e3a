"""A virtual clock: encoded sizes over simulated links give the time a federation would have taken.

    network = Network(links={"3G": 1, "Wi-Fi": 3}, samples_per_s=200, deadline_s=60)
    network.seconds(client=7, seed=0, down_bytes=1_000_000, up_bytes=50_000, samples=500)

Nothing waits: clients run at full speed here, and only the clock tells who would have been late.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fl_sim.core.seeding import Purpose, numpy_generator
from fl_sim.core.types import UserError


@dataclass(frozen=True)
class Link:
    """An access link: megabits (10^6 bits) a second towards and from the client, and one-way latency in milliseconds."""

    down_mbps: float
    up_mbps: float
    latency_ms: float

    def down_s(self, size: int) -> float:
        """Seconds until `size` bytes have reached the client."""
        return self.latency_ms / 1e3 + 8 * size / (self.down_mbps * 1e6)

    def up_s(self, size: int) -> float:
        """Seconds until `size` bytes have reached the server."""
        return self.latency_ms / 1e3 + 8 * size / (self.up_mbps * 1e6)


PRESETS: Mapping[str, Link] = {
    # Nominal figures of web-performance tools, which give round trips; real links vary by an order of magnitude.
    # 3G: Lighthouse's mobile default, 1.6/0.75 Mbit/s, 150 ms (GoogleChrome/lighthouse, docs/throttling.md).
    "3G": Link(1.6, 0.75, 75),
    # 4G: WebPageTest's profile "4G", 9/9 Mbit/s, 170 ms.
    "4G": Link(9, 9, 85),
    # Wi-Fi: the former Chrome DevTools profile "WiFi", 30/15 Mbit/s, 2 ms.
    "Wi-Fi": Link(30, 15, 1),
}


@dataclass(frozen=True, kw_only=True)
class Network:
    """Simulated links, device speeds, deadline and dropout: the virtual clock.

    Attributes:
        links: links and their weights, such as `{ "3G" = 1, "Wi-Fi" = 2 }`; names: 3G, 4G, Wi-Fi. Each client draws one
            link with these weights. Empty = no clock.
        samples_per_s: training samples per second of a device of speed 1, above 0.
        speed_spread: each client's speed is drawn log-uniformly from 1/(1+spread) to 1+spread; 0 = equal speeds.
        deadline_s: simulated seconds after which a client is late: its bytes are booked, its update is not used. Unset = the
            server waits for all that answer.
        dropout: probability that a client receives its task and never answers, from 0 to below 1.
    """

    links: Mapping[str, float] = field(default_factory=dict)
    samples_per_s: float = 500.0
    speed_spread: float = 0.0
    deadline_s: float | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name, weight in self.links.items():
            if name not in PRESETS:
                raise UserError(f"network.links: unknown {name!r}; allowed: {', '.join(PRESETS)}")
            if not 0 <= weight < math.inf:
                raise UserError(f"network.links.{name} = {weight}: must be a number of at least 0")
        if self.links and not sum(self.links.values()) > 0:
            raise UserError("network.links: every weight is 0; at least one must be positive")
        for key, least in (("samples_per_s", 0.0), ("deadline_s", 0.0)):
            value = getattr(self, key)
            if value is not None and not value > least:
                raise UserError(f"network.{key} = {value}: must be positive")
        if not 0 <= self.dropout < 1 or not 0 <= self.speed_spread < math.inf:
            raise UserError(
                f"network: dropout = {self.dropout} must be in [0, 1), speed_spread = {self.speed_spread} at least 0"
            )

    def profile(self, client: int, *, seed: int) -> tuple[Link, float]:
        """(link, speed) of a client; a function of the seed."""
        rng = numpy_generator(seed, client, Purpose.NETWORK)
        weights = list(self.links.values())
        name = list(self.links)[int(rng.choice(len(weights), p=[w / sum(weights) for w in weights]))]
        return PRESETS[name], float((1 + self.speed_spread) ** rng.uniform(-1, 1))

    def seconds(self, *, client: int, seed: int, down_bytes: int, up_bytes: int, samples: float) -> float:
        """From the server's first byte to its last: download, training, upload."""
        link, speed = self.profile(client, seed=seed)
        return link.down_s(down_bytes) + samples / (self.samples_per_s * speed) + link.up_s(up_bytes)

    def drops(self, *, client: int, round: int, seed: int) -> bool:
        """Whether a client never answers in a round."""
        return self.dropout > 0 and bool(numpy_generator(seed, round, client, Purpose.NETWORK).random() < self.dropout)

    def is_late(self, seconds: float) -> bool:
        """Whether an answer after that long is too late."""
        return self.deadline_s is not None and seconds > self.deadline_s

    def round_s(self, finished: Sequence[float], *, missing: bool) -> float:
        """Length of a round: the slowest accepted client, or the whole deadline where somebody was missing."""
        if missing and self.deadline_s is not None:
            return self.deadline_s
        return max(finished, default=0.0)


def time_to(
    rounds: Sequence[Mapping[str, float]], target: float, metric: str = "accuracy", *, higher: bool = True
) -> float | None:
    """Simulated seconds until the test metric first reached `target`; None = not reached, or no clock."""
    for row in rounds:
        if metric in row and "simulated_s" in row and (row[metric] >= target if higher else row[metric] <= target):
            return row["simulated_s"]
    return None
