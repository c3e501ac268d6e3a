"""Extra tensors: what a method sends beside the parameters, by name, in both directions.

    client.extra = Extra(down={"control": parameters}, up={"control": parameters, "loss": Fixed({"loss": (1,)})})

A client declares the layout of every name, and reads `task.extra[name]` and returns `Update.extra[name]`. Each name is a
payload of its own, encoded by the codecs of its direction, and booked in the ledger's section `extra/<name>`. Both ends
build the schemas from the declaration, so that a decoder allocates by what it was told and never by what it receives.

Under a pruning mask, tensors laid out as the model's parameters travel where the mask is alive and are zero elsewhere. A
lossy value type rounds them as it rounds the weights; error feedback and sparse broadcasts leave them alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import xxhash
from torch import Tensor

from fl_sim import codecs
from fl_sim.codecs import CorruptPayload, Schema
from fl_sim.core.seeding import derive
from fl_sim.core.types import FlatParams, Mask, Params, UserError

Layout = Callable[[Schema], Schema]
"""Schema of the model -> schema of the extra tensors."""
_NAME = re.compile(r"^[a-z][a-z0-9_]{0,31}$")
MOST_NAMES = 16
"""Names in one direction."""


def parameters(model: Schema) -> Schema:
    """The layout of the model's parameters, BatchNorm statistics left out."""
    rows = zip(model.names, model.shapes, model.dtypes, model.kinds, strict=True)
    kept = [row for row in rows if row[-1] != "buffers"]
    names, shapes, dtypes, kinds = zip(*kept, strict=True) if kept else ((), (), (), ())
    return Schema(names, shapes, dtypes, kinds)


@dataclass(frozen=True)
class Fixed:
    """Layout of given shapes, float32; they travel exactly, whatever the value type."""

    shapes: Mapping[str, Sequence[int]]

    def __call__(self, model: Schema) -> Schema:
        given = {name: torch.empty(tuple(shape), device="meta") for name, shape in self.shapes.items()}
        return Schema.of(given, [], buffers=[])


@dataclass(frozen=True)
class Extra:
    """Declaration of extra tensors: name -> layout, for each direction. A client has it as its attribute `extra`.

    Attributes:
        down: what tasks carry. up: what updates carry. Names are lower-case letters, digits and `_`, at most 32.
    """

    down: Mapping[str, Layout] = field(default_factory=dict)
    up: Mapping[str, Layout] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for way in (self.down, self.up):
            if wrong := [name for name in way if not _NAME.match(name)]:
                raise UserError(f"extra tensors {wrong[0]!r}: allowed: a-z, 0-9 and _, at most 32 characters")
            if len(way) > MOST_NAMES:
                raise UserError(f"extra tensors: {len(way)} names in one direction; allowed: at most {MOST_NAMES}")

    def of(self, model: Schema) -> ExtraSchemas:
        """The schemas for one model."""
        down, up = ({name: layout(model) for name, layout in way.items()} for way in (self.down, self.up))
        return ExtraSchemas(down, up, model)


NO_EXTRA = Extra()


def declared(client: object) -> Extra:
    """The extra tensors that a client declares; none where it has no attribute `extra`.

    Raises:
        UserError: the attribute is something else.
    """
    # A function with options of its own is a `functools.partial` around the function that was declared.
    found = getattr(client, "extra", None) or getattr(getattr(client, "func", None), "extra", None) or NO_EXTRA
    if not isinstance(found, Extra):
        raise UserError(
            f"client: its attribute extra is a {type(found).__name__}; needed: fl_sim.communication.extra.Extra"
        )
    return found


@dataclass(frozen=True)
class ExtraSchemas:
    """Schemas of the extra tensors of one model, by direction and name; both ends of a federation hold them.

    Attributes:
        down, up: name -> schema.
        model: schema of the parameters that travel beside them.
    """

    down: Mapping[str, Schema] = field(default_factory=dict)
    up: Mapping[str, Schema] = field(default_factory=dict)
    model: Schema | None = None

    def __bool__(self) -> bool:
        return bool(self.down or self.up)

    @property
    def hash(self) -> bytes:
        """Eight bytes over directions, names and schemas; equal at both ends."""
        parts = [(way, name, schema.hash) for way in ("down", "up") for name, schema in getattr(self, way).items()]
        return xxhash.xxh3_64_digest(repr(parts).encode())

    def masked(self, schema: Schema, pruning_mask: Mask | None) -> Mask | None:
        """The pruning mask where `schema` is laid out as the model's parameters; None elsewhere."""
        same = self.model is not None and schema.prunable and schema.prunable_part == self.model.prunable_part
        return pruning_mask if same else None

    def encode(
        self,
        way: Mapping[str, Schema],
        extra: Mapping[str, Params],
        pruning_mask: Mask | None,
        *,
        values: str,
        seed: int,
    ) -> dict[str, bytes]:
        """Encode the tensors of one direction, name by name. A type against the held model codes them as the type by itself does:
        nobody holds them.

        Raises:
            ValueError: `problem` finds something, or a value is NaN, infinite or beyond the value type's range.
        """
        if wrong := problem(way, extra):
            raise ValueError(wrong)
        made = {}
        for position, (name, schema) in enumerate(way.items()):
            alive = self.masked(schema, pruning_mask)
            try:
                made[name] = codecs.encode(
                    extra[name],
                    alive,
                    schema=schema,
                    held_mask=alive,
                    values=codecs.by_itself(values),
                    seed=derive(seed, position),
                )
            except ValueError as error:
                raise ValueError(f"extra tensors {name!r}: {error}") from error
        return made

    def decode(
        self, way: Mapping[str, Schema], payloads: Mapping[str, bytes | memoryview], pruning_mask: Mask | None
    ) -> dict[str, Params]:
        """Invert `encode`; the tensors are the receiver's own copies.

        Raises:
            CorruptPayload: names that are not those of this direction, or bytes that are no payload of their schema.
        """
        if payloads.keys() != way.keys():
            raise CorruptPayload(_names(way, payloads))
        made: dict[str, Params] = {}
        for name, schema in way.items():
            try:
                tensors, _ = codecs.decode(payloads[name], schema=schema, held_mask=self.masked(schema, pruning_mask))
            except CorruptPayload as error:
                raise CorruptPayload(f"extra tensors {name!r}: {error}") from error
            made[name] = schema.view(schema.flat(tensors).clone())
        return made


NO_SCHEMAS = ExtraSchemas()


def _names(way: Mapping[str, Schema], found: Mapping[str, object]) -> str:
    """What is wrong with the names of extra tensors, in one line."""
    known = f"declared are {', '.join(way) or 'none'}"
    if unknown := [name for name in found if name not in way]:
        return f"extra tensors {unknown[0]!r} are not declared; {known}"
    return f"the extra tensors {next(name for name in way if name not in found)!r} are missing; {known}"


def problem(way: Mapping[str, Schema], extra: object) -> str:
    """What of extra tensors does not fit the declaration, in one line; empty = nothing."""
    if not isinstance(extra, Mapping):
        return f"extra is a {type(extra).__name__}; needed: a dict of dicts of tensors"
    if extra.keys() != way.keys():
        return _names(way, extra)
    for name, schema in way.items():
        if wrong := _differs(extra[name], schema):
            return f"extra tensors {name!r}: {wrong}"
    return ""


def _differs(tensors: object, schema: Schema) -> str:
    if isinstance(tensors, FlatParams) and tensors.names == schema.names and tensors.flat.numel() == schema.size:
        return ""
    if not isinstance(tensors, Mapping):
        return f"a {type(tensors).__name__}; needed: a dict of tensors by name"
    if unknown := tensors.keys() - set(schema.names):
        return f"{min(map(repr, unknown))} is not declared"
    for name, shape in zip(schema.names, schema.shapes, strict=True):
        value = tensors.get(name)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return f"{name!r} is {'missing' if value is None else 'no tensor of floating point'}"
        if value.shape != shape:
            return f"{name!r} has shape {tuple(value.shape)}; declared is {tuple(shape)}"
    return ""
