"""Codec of the user's own: a class with two methods, in the place of a value type.

    class Signs:
        def encode(self, tensors, state, rng): ...     # -> bytes
        def decode(self, data, schema): ...            # -> tensors

The codec gets the prunable tensors (weight matrices and kernels) of one message; everything else travels beside its bytes, exactly.
A payload says how long the bytes are and has a checksum; what they decode to has the names and shapes of the schema, or is
refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from fl_sim.codecs.errors import CorruptPayload
from fl_sim.codecs.schema import Schema
from fl_sim.codecs.value_coder import Values
from fl_sim.core.errors import USERS_OWN, error_line
from fl_sim.core.process_state import seeded, unchanged_settings
from fl_sim.core.seeding import Purpose, derive
from fl_sim.core.types import Params, UserError

OWN = "own"
"""Name of the value type in a payload's description."""


class Codec(Protocol):
    """A compressor. One object serves all clients of a process, so it keeps nothing on itself: that is what `state` is for.

    A codec that keeps nothing there says so by an attribute `stateless = True`: differential privacy is amplified by sampling
    only where clients keep nothing of their data.
    """

    def encode(self, tensors: Params, state: Params, rng: torch.Generator) -> bytes:
        """Encode the tensors of one message.

        Args:
            tensors: float32 by name, finite, on the CPU, in the order of the schema; copies of the codec's own.
            state: what this client's last call left here, tensors by name; empty at first. Change it in place. It never
                travels, and a resumed run has it too.
            rng: the only generator to draw from, seeded by (seed, round, client).
        """

    def decode(self, data: bytes, schema: Schema) -> Params:
        """Invert `encode`, as far as the codec does: a float tensor for each of `schema.names`, of its shape in `schema.shapes`.

        Any exception means that the bytes are none of this codec's. What is allocated must depend on the schema alone.
        """


@dataclass(frozen=True)
class Own:
    """The value coder around a codec of the user's.

    Attributes:
        codec: the user's object.
        schema: of the prunable tensors.
        name: what messages call the codec.
        state: what the codec keeps of this sender; its `encode` changes it.
    """

    codec: Codec
    schema: Schema
    name: str
    state: Params = field(default_factory=dict)
    id: ClassVar[int] = 16

    def encode(self, values: Values, seed: int) -> bytes:
        """See `ValueCoder`. Raises UserError where the codec returns no bytes."""
        tensors = dict(self.schema.view(torch.from_numpy(values.copy())))
        seed = derive(seed, Purpose.ENCODING)
        with _apart(seed):
            made: object = self.codec.encode(tensors, self.state, torch.Generator().manual_seed(seed))
        if not isinstance(made, (bytes, bytearray)):
            raise UserError(f"encode returned {type(made).__name__}; needed: bytes")
        if self.state and getattr(self.codec, "stateless", False):
            raise UserError(f"encode keeps {sorted(self.state)[0]!r} in its state, and says stateless = True")
        return bytes(made)

    def decode(self, data: memoryview, count: int) -> Values:
        """See `ValueCoder`."""
        try:
            with _apart(0):
                made: object = self.codec.decode(bytes(data), self.schema)
        except USERS_OWN as error:  # the user's own, whatever it is
            raise CorruptPayload(f"{self.name}: decode raised {error_line(error)}") from error
        return self._flat(made)

    def _flat(self, tensors: object) -> Values:
        if not isinstance(tensors, Mapping):
            raise CorruptPayload(f"{self.name}: decode returned {type(tensors).__name__}; needed: tensors by name")
        if unknown := [name for name in tensors if name not in self.schema.names]:
            raise CorruptPayload(f"{self.name}: decode returned {unknown[0]!r}, which is not in the schema")
        parts = [np.zeros(0, np.float32)]
        for name, shape in zip(self.schema.names, self.schema.shapes, strict=True):
            value = tensors.get(name)
            if not isinstance(value, Tensor) or not value.is_floating_point() or value.shape != shape:
                raise CorruptPayload(
                    f"{self.name}: decode returned {_described(value)} for {name!r}; needed: a float tensor of shape "
                    f"{tuple(shape)}"
                )
            parts.append(value.detach().float().cpu().reshape(-1).numpy())
        return np.concatenate(parts)


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return "nothing" if value is None else type(value).__name__


@contextmanager
def _apart(seed: int) -> Iterator[None]:
    """Context manager for a codec: it leaves the process as it was, and what it draws from global generators is the same in
    every process."""
    with unchanged_settings(), seeded(seed), torch.no_grad():
        yield
