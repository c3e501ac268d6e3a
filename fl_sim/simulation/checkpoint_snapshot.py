"""Server snapshots in a checkpoint: tensors as objects of the store, the rest as a record of the manifest."""

from __future__ import annotations

import torch

from fl_sim.codecs import Schema
from fl_sim.communication.messages import pack_mask, unpack_mask
from fl_sim.core.tensor_file import TensorFile
from fl_sim.core.types import FlatMask, Mask, Params
from fl_sim.runtime.server_context import FlightSnapshot, ServerSnapshot
from fl_sim.simulation.checkpoint_store import Checkpoints, FlightRecord, Put, ServerRecord

PARAMS, MEMORY, PUBLISHED, CODEC, MASK = "params.", "memory.", "published.", "codec.", "mask"
"""Names of tensors in an object, or their prefixes."""


def put_snapshot(put: Put, saved: ServerSnapshot) -> ServerRecord:
    """Write a snapshot's tensors as objects of the checkpoint; returns the record that names them."""
    return ServerRecord(
        tensors=_put_tensors(put, saved),
        held=_put_held(put, saved),
        answered=sorted(saved.answered),
        holders=dict(saved.client_versions),
        simulated_s=saved.simulated_s,
        failures=dict(saved.failures),
        flights=[FlightRecord(**{**vars(flight), "reply": put(flight.reply)}) for flight in saved.flights],
        bases={version: _put_base(put, params, mask) for version, (params, mask) in saved.bases.items()},
        dispatched=saved.dispatched,
    )


def read_snapshot(store: Checkpoints, number: int, record: ServerRecord, schema: Schema) -> ServerSnapshot:
    """Read the snapshot of a server after round `number`.

    Raises:
        ValueError, LookupError: tensors that are not those of `schema`.
    """
    tensors = store.tensors(record.tensors)
    memory = {n.removeprefix(MEMORY): value for n, value in tensors.items() if n.startswith(MEMORY)}
    held_masks = {
        client: _mask(store.tensors(name), schema) for name, clients in record.held.items() for client in clients
    }
    return ServerSnapshot(
        number,
        _params({n.removeprefix(PARAMS): value for n, value in tensors.items() if n.startswith(PARAMS)}, schema),
        _mask(tensors, schema) if MASK in tensors else None,
        _memory(memory, schema),
        held_masks,
        frozenset(record.answered),
        record.simulated_s,
        record.failures,
        {n.removeprefix(PUBLISHED): value for n, value in tensors.items() if n.startswith(PUBLISHED)},
        record.holders,
        {n.removeprefix(CODEC): value for n, value in tensors.items() if n.startswith(CODEC)},
        [FlightSnapshot(**{**dict(flight), "reply": store.get(flight.reply)}) for flight in record.flights],
        {version: _read_base(store.tensors(name), schema) for version, name in record.bases.items()},
        record.dispatched,
    )


def _put_base(put: Put, params: Params, mask: Mask | None) -> str:
    tensors = {PARAMS + name: value for name, value in params.items()}
    return put(TensorFile(tensors if mask is None else {**tensors, MASK: pack_mask(mask)}))


def _read_base(tensors: Params, schema: Schema) -> tuple[Params, Mask | None]:
    params = {n.removeprefix(PARAMS): value for n, value in tensors.items() if n.startswith(PARAMS)}
    return _params(params, schema), _mask(tensors, schema) if MASK in tensors else None


def _put_tensors(put: Put, saved: ServerSnapshot) -> str:
    tensors = {PARAMS + name: value for name, value in saved.params.items()}
    tensors |= {MEMORY + name: value for name, value in saved.memory.items()}
    tensors |= {PUBLISHED + name: value for name, value in saved.published.items()}
    tensors |= {CODEC + name: value for name, value in saved.codec_state.items()}
    if saved.mask is not None:
        tensors[MASK] = pack_mask(saved.mask)
    return put(TensorFile(tensors))


def _put_held(put: Put, saved: ServerSnapshot) -> dict[str, list[int]]:
    names: dict[int, str] = {}
    held: dict[str, list[int]] = {}
    for client, mask in saved.held_masks.items():
        if id(mask) not in names:
            names[id(mask)] = put(TensorFile({MASK: pack_mask(mask)}))
        held.setdefault(names[id(mask)], []).append(client)
    return held


def _memory(tensors: Params, schema: Schema) -> Params:
    """What the server optimizer keeps: flat where it is one vector of the model's layout, else by name, in order."""
    rows = zip(schema.names, schema.shapes, strict=True)
    if tensors.keys() == set(schema.names) and all(
        tensors[n].shape == s and tensors[n].dtype == torch.float32 for n, s in rows
    ):
        return _params(tensors, schema)
    return dict(sorted(tensors.items()))


def _params(tensors: Params, schema: Schema) -> Params:
    for name, shape in zip(schema.names, schema.shapes, strict=True):
        if tensors[name].shape != shape:
            raise ValueError(f"{name!r} has shape {tuple(tensors[name].shape)}, the model's is {tuple(shape)}")
    return schema.view(schema.flat(tensors))


def _mask(tensors: Params, schema: Schema) -> FlatMask:
    if tensors[MASK].shape != (-(-schema.prunable_size // 8),):
        raise ValueError(f"a mask of {tuple(tensors[MASK].shape)} bytes")
    return unpack_mask(tensors[MASK], schema)
