"""What clients keep, in a checkpoint: large records as objects of their own, small ones together in packs.

A file that is flushed costs milliseconds, whatever its size, and a round may change a small record of thousands of clients.
So the small records of the clients that changed since the last checkpoint are one object, a pack. A later pack stands in
the place of earlier ones for the clients that it names. A pack is merged with the next where it is not twice as long: of n
clients there are at most log2(n) packs, and they hold at most 2n clients.

A pack: the length of its index (8 bytes, little-endian), the index as JSON, the records one after the other.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from pydantic import ValidationError

from fl_sim.runtime.state.client_states import ClientStates
from fl_sim.simulation.checkpoint_store import Checkpoints, Count, Manifest, Put, Record, what_is_wrong

LARGE = 1 << 16
"""Bytes of a record from which on it is an object of its own, which is written once."""


class _Index(Record):
    """Index of a pack: client -> record -> place of its bytes, and the lengths of all places; a client with no records is one
    that keeps nothing small any more."""

    clients: dict[Count, dict[str, Count]]
    sizes: list[Count]


@dataclass(frozen=True)
class _Pack:
    """A pack's bytes in parts, one record in memory at a time; equal records are there once."""

    states: ClientStates
    clients: Collection[int]

    def __iter__(self) -> Iterator[bytes]:
        places: dict[bytes, int] = {}
        found = {
            client: {
                key: places.setdefault(name, len(places))
                for key, name in self.states.records(client).items()
                if self.states.length(name) < LARGE
            }
            for client in sorted(self.clients)
        }
        index = {"clients": found, "sizes": [self.states.length(name) for name in places]}
        text = json.dumps(index, separators=(",", ":")).encode()
        yield len(text).to_bytes(8, "little") + text
        for name in places:
            yield self.states.blob(name)


@dataclass
class KeptStates:
    """Checkpoints of the state of all clients of a run; remembers what the last one held."""

    _packs: list[tuple[str, set[int]]] = field(default_factory=list)
    _large: dict[int, dict[str, str]] = field(default_factory=dict)
    _objects: dict[bytes, str] = field(default_factory=dict)

    def put(self, put: Put, states: ClientStates) -> tuple[dict[int, dict[str, str]], list[str]]:
        """Write what changed since the last call. Returns `Manifest.clients` and `Manifest.packs`.

        Raises:
            OSError: the disk is full or not writable.
        """
        changed = states.changed()
        for client in changed:
            self._large.pop(client, None)
            if large := self._put_large(put, states, client):
                self._large[client] = large
        self._objects = {blob: name for blob, name in self._objects.items() if states.has(blob)}
        if changed:
            self._put_pack(put, states, changed)
        return dict(sorted(self._large.items())), [name for name, _ in self._packs]

    def _put_large(self, put: Put, states: ClientStates, client: int) -> dict[str, str]:
        found: dict[str, str] = {}
        for key, blob in states.records(client).items():
            if states.length(blob) >= LARGE:
                if blob not in self._objects:
                    self._objects[blob] = put(states.blob(blob))
                found[key] = self._objects[blob]
        return found

    def _put_pack(self, put: Put, states: ClientStates, changed: set[int]) -> None:
        merged = set(changed)
        while self._packs and len(self._packs[-1][1]) < 2 * len(merged):
            merged |= self._packs.pop()[1]
        if self._packs or any(states.length(n) < LARGE for c in merged for n in states.records(c).values()):
            self._packs.append((put(_Pack(states, merged)), merged))

    def restore(self, store: Checkpoints, manifest: Manifest, states: ClientStates) -> None:
        """Give the clients what a checkpoint holds.

        Raises:
            Damaged: an object is missing, or its bytes are not those that were stored.
            ValueError, LookupError: clients that are not there, or records that are none.
        """
        for client, records in manifest.clients.items():
            self._large[client] = records
            for key, name in records.items():
                self._objects[states.restore(client, key, store.get(name))] = name
        newer: set[int] = set()
        for name in reversed(manifest.packs):
            with store.opened(name) as stream:
                clients = _unpacked(stream, newer, states)
            self._packs.insert(0, (name, clients))
            newer |= clients
        states.changed()  # nothing, since the checkpoint


def _unpacked(stream: BinaryIO, newer: Collection[int], states: ClientStates) -> set[int]:
    """Restore the records of a pack's clients but those that are in newer packs. Returns all of the pack's clients."""
    size, length = os.fstat(stream.fileno()).st_size, int.from_bytes(stream.read(8), "little")
    if length > size - 8:
        raise ValueError("a pack that ends in its index")
    try:
        index = _Index.model_validate_json(stream.read(length))
    except ValidationError as error:
        raise ValueError(f"the index of a pack: {what_is_wrong(error)}") from error
    if 8 + length + sum(index.sizes) != size:
        raise ValueError("a pack of another length than its records")
    users: dict[int, list[tuple[int, str]]] = {}
    for client, records in index.clients.items():
        if client not in range(len(states)):
            raise ValueError(f"client {client} is not there")
        for key, place in records.items():
            users.setdefault(place, []).append((client, key))
    for place, length in enumerate(index.sizes):
        blob = stream.read(length)
        for client, key in users.pop(place, []):
            if client not in newer:
                states.restore(client, key, blob)
    if users:
        raise ValueError("a pack without records that it names")
    return set(index.clients)
