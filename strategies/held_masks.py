"""Pruning masks that clients hold, as the server knows it."""

from __future__ import annotations

from dataclasses import dataclass, field

from fl_sim import codecs
from fl_sim.core.types import Mask


@dataclass
class ClientMasks:
    """Client -> the mask it holds, and whether it has built the frozen weights, as the server knows it.

    A mask may stay implied only for a client that holds it.
    """

    _masks: dict[bytes, Mask] = field(default_factory=dict)
    _held: dict[int, bytes] = field(default_factory=dict)
    _answered: set[int] = field(default_factory=set)

    def has_frozen(self, client: int) -> bool:
        """Whether the client has answered before, so that it has made and checked the frozen weights."""
        return client in self._answered

    def held(self, client: int) -> Mask | None:
        """The mask that this client holds, or None when it must be sent."""
        key = self._held.get(client)
        return None if key is None else self._masks[key]

    def learned(self, client: int, mask: Mask | None) -> None:
        """The client answered a task under `mask` (None: a dense task leaves what it holds as it was)."""
        self._answered.add(client)
        if mask is not None:
            self._held[client] = key = codecs.mask_hash(mask)
            if key not in self._masks:
                self._masks[key] = mask
                used = set(self._held.values())
                self._masks = {k: m for k, m in self._masks.items() if k in used}

    def known(self) -> dict[int, Mask]:
        """Client -> the mask that it holds; clients with equal masks share one."""
        return {client: self._masks[key] for client, key in self._held.items()}

    @property
    def answered(self) -> frozenset[int]:
        """Clients that have answered since they last failed."""
        return frozenset(self._answered)

    def forget(self, client: int) -> None:
        """The client failed, so what it kept is unknown: the next task carries its mask whole, and the frozen seed."""
        self._held.pop(client, None)
        self._answered.discard(client)
