"""Client state between rounds, in a file of the run folder: a hundred thousand clients may keep a model each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import cast

import numpy as np
from flwr.app import ArrayRecord, Context, RecordDict
from numpy.typing import NDArray
from safetensors.numpy import load as read_arrays
from safetensors.numpy import save as write_arrays

from fl_sim.communication.flower_private import filled
from fl_sim.communication.kept_arrays import array_from, values_in
from fl_sim.runtime.state.blob_file import Heap
from fl_sim.runtime.state.contexts import Contexts

SMALL = 1 << 16
"""Bytes of arrays whose file's header is remembered."""
Entry = tuple[str, np.dtype[np.generic], tuple[int, ...]]


def _saved(arrays: Mapping[str, NDArray[np.generic]]) -> bytes:
    """Arrays as safetensors. The headers of small ones, which take longer to write than their values, are remembered."""
    if sum(values.nbytes for values in arrays.values()) > SMALL or not all(v.dtype.isnative for v in arrays.values()):
        # safetensors takes an array's memory as it lies there, whatever its strides say.
        return write_arrays({n: v if v.flags.c_contiguous else v.copy(order="C") for n, v in arrays.items()})
    header, order = _header(tuple((name, values.dtype, values.shape) for name, values in arrays.items()))
    return b"".join([header, *(arrays[name].tobytes() for name in order)])


@lru_cache(maxsize=256)
def _header(entries: tuple[Entry, ...]) -> tuple[bytes, tuple[str, ...]]:
    """(the header of a file of such arrays, their names in the order of their bytes)."""
    blank = write_arrays({name: np.zeros(shape, dtype) for name, dtype, shape in entries})
    length = 8 + int.from_bytes(blank[:8], "little")
    places: Mapping[str, Mapping[str, list[int]]] = json.loads(blank[8:length])
    return blank[:length], tuple(sorted(places, key=lambda name: places[name]["data_offsets"]))


class ClientStates(Contexts):
    """Node id -> context; what it holds lies in a file.

    A context belongs to whoever asked for it until another is asked for; then what changed in it is put away. Records are
    replaced in it, never changed. The file has no name and ends with the process: checkpoints hold what must survive.
    """

    def __init__(self, nodes: range, folder: Path) -> None:
        super().__init__(nodes)
        self._heap = Heap(folder)
        self._kept: dict[int, dict[str, bytes]] = {}
        self._changed: set[int] = set()
        self._out: tuple[Context, dict[str, object]] | None = None
        # The last record of each kind: clients that keep the same (a broadcast model) share it, read and written once.
        self._last: dict[str, tuple[ArrayRecord, bytes]] = {}

    def __getitem__(self, node: int) -> Context:
        if self._out is not None and self._out[0].node_id == node:
            return self._out[0]
        self._settle()
        kept = self._kept.get(node, {})
        context = self.fresh(node, filled(RecordDict, {key: self._record(key, name) for key, name in kept.items()}))
        self._out = context, dict(context.state.items())
        return context

    def __setitem__(self, node: int, context: Context) -> None:
        self._settle()
        self._put_away(node, context, {})

    def _settle(self) -> None:
        if self._out is not None:
            (context, before), self._out = self._out, None
            self._put_away(context.node_id, context, before)

    def _put_away(self, node: int, context: Context, before: Mapping[str, object]) -> None:
        kept = self._kept.get(node, {})
        for key in kept.keys() - context.state.keys():
            self._heap.drop(kept.pop(key))
            self._changed.add(node)
        for key, record in context.state.items():
            if before.get(key) is not record:
                assert isinstance(record, ArrayRecord)
                name = self._put(key, record)
                if key in kept:
                    self._heap.drop(kept[key])
                self._kept.setdefault(node, kept)[key] = name
                self._changed.add(node)

    def _put(self, key: str, record: ArrayRecord) -> bytes:
        last = self._last.get(key)
        if last is not None and last[0] is record and last[1] in self._heap:
            return self._heap.share(last[1])
        name = self._heap.put(_saved({n: values_in(array) for n, array in record.items()}))
        self._last[key] = record, name
        return name

    def _record(self, key: str, name: bytes) -> ArrayRecord:
        last = self._last.get(key)
        if last is not None and last[1] == name:
            return last[0]
        record = filled(ArrayRecord, {n: array_from(value) for n, value in read_arrays(self._heap.get(name)).items()})
        self._last[key] = record, name
        return record

    def saved(self, node: int) -> dict[str, bytes]:
        """What a node keeps now: its records by name, each used once more."""
        self._settle()
        kept = self._kept.get(node, {})
        return {key: self._heap.share(name) for key, name in kept.items()}

    def put_back(self, node: int, saved: object) -> None:
        """Let a node keep what it kept when that was saved."""
        self._settle()
        self.give_up(self._kept.pop(node, {}))
        self._kept[node] = dict(cast("dict[str, bytes]", saved))
        self._changed.add(node)

    def give_up(self, saved: object) -> None:
        """Nobody will put it back: its records are used once less."""
        for name in cast("dict[str, bytes]", saved).values():
            self._heap.drop(name)

    def kept(self) -> Mapping[int, Mapping[str, bytes]]:
        """Partition -> record -> the name of its bytes, of those that keep anything."""
        self._settle()
        first = self.nodes.start
        return {node - first: names for node, names in self._kept.items() if names}

    def changed(self) -> set[int]:
        """The partitions whose records changed since this was asked for the last time."""
        self._settle()
        first, changed, self._changed = self.nodes.start, self._changed, set()
        return {node - first for node in changed}

    def records(self, partition: int) -> Mapping[str, bytes]:
        """Record -> the name of its bytes, of one partition."""
        return self._kept.get(self.nodes[partition], {})

    def has(self, name: bytes) -> bool:
        """Whether any partition keeps these bytes."""
        return name in self._heap

    def length(self, name: bytes) -> int:
        """Bytes of a record."""
        return self._heap.length(name)

    def blob(self, name: bytes) -> bytes:
        """A record as safetensors."""
        return self._heap.get(name)

    def restore(self, partition: int, key: str, blob: bytes) -> bytes:
        """Keep a record that a checkpoint holds; returns its name.

        Raises:
            KeyError: no such partition.
            SafetensorError: no record.
        """
        read_arrays(blob)
        node = self.nodes[partition] if 0 <= partition < len(self.nodes) else -1
        if node < 0:
            raise KeyError(partition)
        self._kept.setdefault(node, {})[key] = name = self._heap.put(blob)
        self._changed.add(node)
        return name

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._heap.size
