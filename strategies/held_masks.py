"""Pruning masks that clients hold, as the server knows it."""

from __future__ import annotations

from dataclasses import dataclass, field

from fl_sim import codecs
from fl_sim.core.types import Mask


@dataclass
class ClientMasks:
    """Client -> the pruning mask that it holds, and whether it has built the frozen weights, as the server knows it.

    A payload may leave a mask out only for a client that holds the mask.
    """

    _masks: dict[bytes, Mask] = field(default_factory=dict)
    _held: dict[int, bytes] = field(default_factory=dict)
    _answered: set[int] = field(default_factory=set)

    def has_frozen(self, client: int) -> bool:
        """Whether the client has answered before, so that it has made and checked the frozen weights."""
        return client in self._answered

    def held_mask(self, client: int) -> Mask | None:
        """The pruning mask that this client holds; None when the mask must be sent."""
        key = self._held.get(client)
        return None if key is None else self._masks[key]

    def learned(self, client: int, pruning_mask: Mask | None) -> None:
        """Note that a client answered a task under a mask; None, a dense task, leaves the held mask as it was."""
        self._answered.add(client)
        if pruning_mask is not None:
            self._held[client] = key = codecs.mask_hash(pruning_mask)
            if key not in self._masks:
                self._masks[key] = pruning_mask
                used = set(self._held.values())
                self._masks = {k: m for k, m in self._masks.items() if k in used}

    def held_masks(self) -> dict[int, Mask]:
        """Client -> the pruning mask that it holds; clients with equal masks share one object."""
        return {client: self._masks[key] for client, key in self._held.items()}

    @property
    def answered(self) -> frozenset[int]:
        """Clients that have answered since they last failed."""
        return frozenset(self._answered)

    def forget(self, client: int) -> None:
        """Note that a client failed: its next task carries the whole mask and the seed of the frozen weights."""
        self._held.pop(client, None)
        self._answered.discard(client)
