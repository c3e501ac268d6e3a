"""A sparse downlink: clients are sent what changed against the model that they hold.

The server *publishes* a model of its own making: the last published one plus the largest changes of the global model,
in the value type of the downlink. What that leaves out stays in the difference between the two and is offered again
(error feedback at the server; Tang et al., 2019, DoubleSqueeze, algorithm 1; Sattler et al., 2019, section 5). Every
client trains on the published model, whichever one it held before, bit for bit:

    held the last one            the change, sparse, in its value type; one payload for all of them
    held an older one            the coordinates that differ, as float32, or the whole model where that is smaller
    held none, or failed since   the whole model as float32
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fl_sim import codecs
from fl_sim.codecs import Schema
from fl_sim.seeding import Purpose, derive
from fl_sim.sparsity import global_topk, magnitude, topk_mask
from fl_sim.types import Mask, Params, Scalar, UserError
from fl_sim.wire import Coding, Exchange

WHOLE = Coding("float32", "parameters")
VERSION, BASE, CONTENT = "model-version", "base-version", "content"
CHANGE, MASK = "change", "mask"


@dataclass(frozen=True)
class SparseBroadcast:
    """The config's `[wire.broadcast]` table.

    Attributes:
        density: share of the prunable coordinates whose change is published in a round, chosen over all layers at once.
        values: value type of the published changes, a name of `fl_sim.codecs.VALUES`.
        window: published models that the server remembers for clients that come back; older ones cost a whole model.
    """

    density: float = 0.1
    values: str = "float32"
    window: int = 16

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise UserError(f"wire.broadcast.density = {self.density}: must be above 0 and at most 1")
        if self.window < 1:
            raise UserError(f"wire.broadcast.window = {self.window}: must be at least 1")
        Coding(self.values, "difference")

    @property
    def coding(self) -> Coding:
        """Of the published changes."""
        return Coding(self.values, "difference")


@dataclass(frozen=True)
class Parcel:
    """One payload, and what a client needs to know to read it.

    Attributes:
        data: the payload.
        version: the published model that it leads to.
        base: the version that it starts from; None = it is whole.
        coding: of the payload.
        mask: the coordinates that travel; None = all.
    """

    data: bytes | memoryview
    version: int
    base: int | None
    coding: Coding
    mask: Mask | None = None

    @property
    def told(self) -> dict[str, Scalar]:
        """What the message says beside the payload."""
        return {VERSION: self.version, BASE: -1 if self.base is None else self.base, CONTENT: self.coding.content}

    @classmethod
    def arrived(cls, data: bytes | memoryview, config: dict[str, object]) -> Parcel | None:
        """The parcel of a message, whose entries leave `config`; None where the payload is of no published model.

        Raises:
            UserError: a content that no coding has.
        """
        if VERSION not in config:
            return None
        version, base, content = config.pop(VERSION), config.pop(BASE), config.pop(CONTENT)
        if not isinstance(version, int) or not isinstance(base, int) or not isinstance(content, str):
            raise UserError(f"a published model's version, base and content are {version!r}, {base!r}, {content!r}")
        return cls(data, version, None if base < 0 else base, Coding(content=content))


@dataclass
class Published:
    """The server's side: published models by version, and who holds which. A version is the number of rounds behind it."""

    rule: SparseBroadcast
    exchange: Exchange
    seed: int
    models: dict[int, Tensor] = field(default_factory=dict)
    holders: dict[int, int] = field(default_factory=dict)
    change: bytes = b""
    _mask: Mask | None = None
    _parcels: dict[tuple[int | None, bytes], Parcel] = field(default_factory=dict)

    @property
    def version(self) -> int:
        """Of the last published model; -1 before the first."""
        return max(self.models, default=-1)

    @property
    def params(self) -> Params:
        """The last published model, flat, in schema order."""
        return self.exchange.schema.view(self.models[self.version])

    def publish(self, version: int, params: Params, mask: Mask | None) -> None:
        """Publish the global model of `version`, once; under a new mask all of it."""
        if version == self.version:
            self._mask = mask
            return
        schema, before = self.exchange.schema, self.models.get(self.version)
        whole = schema.flat(params)
        self._parcels.clear()
        if before is None or not _same(mask, self._mask, schema):
            self.models, self.holders, self.change = {version: whole.clone()}, {}, b""
        else:
            old = schema.view(before)
            moved = {name: params[name] - old[name] for name in schema.prunable}
            largest = topk_mask(magnitude(moved), global_topk(magnitude(moved), self.rule.density))
            chosen = {name: keep & (moved[name] != 0) for name, keep in largest.items()}
            seed = derive(self.seed, version, Purpose.ENCODING)
            self.change = self.rule.coding.encode(params, chosen, old, schema=schema, held=None, seed=seed)
            sent, sent_mask = self.rule.coding.decode(self.change, old, schema=schema, held=None)
            self.models[version] = self.exchange.believed(sent, sent_mask, old).flat
        self._mask = mask
        self._forget_old()

    def _forget_old(self) -> None:
        needed = {*self.holders.values(), self.version, self.version - 1}
        recent = sorted(needed & self.models.keys())[-self.rule.window :]
        self.models = {version: self.models[version] for version in recent}

    def parcel(self, client: int, held: Mask | None) -> Parcel:
        """What this client is sent; `held` is the pruning mask that it holds."""
        base = self.holders.get(client)
        base = base if base in self.models else None
        key = base, b"" if held is None or base is not None else codecs.mask_hash(held)
        if key not in self._parcels:
            made = self._whole(held) if base is None else self._since(base)
            self._parcels[key] = made
        return self._parcels[key]

    def _whole(self, held: Mask | None) -> Parcel:
        data = WHOLE.encode(self.params, self._mask, self.params, schema=self.exchange.schema, held=held, seed=0)
        return Parcel(data, self.version, None, WHOLE, self._mask)

    def _since(self, base: int) -> Parcel:
        schema = self.exchange.schema
        if base == self.version - 1 and self.change:
            _, chosen = codecs.decode(self.change, schema=schema)
            return Parcel(self.change, self.version, base, self.rule.coding, chosen)
        count = schema.prunable_size
        differs = schema.view_mask(self.models[base][:count] != self.models[self.version][:count])
        data = WHOLE.encode(self.params, differs, self.params, schema=schema, held=None, seed=0)
        whole = self._whole(None)
        return Parcel(data, self.version, base, WHOLE, differs) if len(data) < len(whole.data) else whole

    def learned(self, client: int) -> None:
        """The client answered, so it holds the last published model."""
        self.holders[client] = self.version

    def forget(self, client: int) -> None:
        """The client failed: what it holds is unknown."""
        self.holders.pop(client, None)

    def kept(self) -> Mapping[str, Tensor]:
        """What a checkpoint keeps: models by version, the last change, and the pruning mask that they are under."""
        kept = {str(version): model for version, model in self.models.items()}
        if self.change:
            kept[CHANGE] = torch.frombuffer(bytearray(self.change), dtype=torch.uint8)
        if self._mask is not None:
            kept[MASK] = self.exchange.schema.flat_mask(self._mask)
        return kept

    def restore(self, kept: Mapping[str, Tensor], holders: Mapping[int, int]) -> None:
        """Invert `kept`."""
        self.models = {int(name): value for name, value in kept.items() if name not in (CHANGE, MASK)}
        self.change = kept[CHANGE].numpy().tobytes() if CHANGE in kept else b""
        self._mask = self.exchange.schema.view_mask(kept[MASK]) if MASK in kept else None
        self.holders = dict(holders)


def _same(mask: Mask | None, other: Mask | None, schema: Schema) -> bool:
    if mask is None or other is None:
        return mask is other
    return torch.equal(schema.flat_mask(mask), schema.flat_mask(other))


def received(
    parcel: Parcel, before: Tensor | None, exchange: Exchange, held: Mask | None
) -> tuple[Tensor, Mask | None]:
    """The client's side: the published model, flat, and the pruning mask that it is under.

    Args:
        parcel: as it arrived; its mask is not used.
        before: the model of `parcel.base`, flat, that this client holds.
        exchange: what the federation exchanges.
        held: the pruning mask that this client holds.

    Raises:
        CorruptPayload: the bytes are no payload of this schema.
        ValueError: the client does not hold the base.
    """
    schema = exchange.schema
    if parcel.base is None:
        params, mask = codecs.decode(parcel.data, schema=schema, held=held)
        return schema.flat(params).clone(), mask
    if before is None:
        raise ValueError(f"the payload changes model {parcel.base}, which this client does not hold")
    old = schema.view(before)
    sent, chosen = parcel.coding.decode(parcel.data, old, schema=schema, held=None)
    return exchange.believed(sent, chosen, old).flat, held
