"""Values of every tensor in a type of its own, one after the other.

    type number of each tensor, u8 | bytes of each tensor, LEB128 | the tensors' bytes as their types write them

The sizes add up: a tensor costs the same bytes whatever the others are, which lets a budget be divided among them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fl_sim.codecs.bits import Reader, varint
from fl_sim.codecs.errors import CorruptPayload
from fl_sim.codecs.value_coder import Values
from fl_sim.codecs.value_coding import BY_ID, VALUES, fitted, is_relative
from fl_sim.core.seeding import derive


def tensor_seed(seed: int, position: int) -> int:
    """Seed of the stochastic rounding of the tensor at this position of the schema."""
    return derive(seed, position)


@dataclass(frozen=True)
class Mixed:
    """Coder of the sent values of several tensors.

    Attributes:
        counts: values of each tensor, known to both ends.
        types: value type of each tensor, names of `VALUES`; decoding reads them from the bytes.
        base: the receiver's values at the same coordinates; None = it holds none.
    """

    counts: tuple[int, ...]
    types: tuple[str, ...] = ()
    base: Values | None = None
    id: ClassVar[int] = 7

    def _bases(self) -> list[Values] | list[None]:
        return [None] * len(self.counts) if self.base is None else self._by_tensor(self.base)

    def _by_tensor(self, values: Values) -> list[Values]:
        """The values of each tensor. Of no tensors there are none, where `np.split` would make one empty piece."""
        return np.split(values, np.cumsum(self.counts)[:-1]) if self.counts else []

    def encode(self, values: Values, seed: int) -> bytes:
        """Raises ValueError where there is not one known type for each tensor, or one cannot hold its values."""
        if len(self.types) != len(self.counts) or not set(self.types) <= VALUES.keys():
            raise ValueError(f"{len(self.counts)} tensors need as many value types of {', '.join(VALUES)}")
        pieces = self._by_tensor(values)
        bodies = [
            bytes(fitted(name, (len(piece),), base).encode(piece, tensor_seed(seed, i)))
            for i, (name, piece, base) in enumerate(zip(self.types, pieces, self._bases(), strict=True))
        ]
        head = bytes(VALUES[name].id for name in self.types)
        return b"".join([head, *(varint(len(body)) for body in bodies), *bodies])

    def decode(self, data: memoryview, count: int) -> Values:
        tensors = len(self.counts)
        if len(data) < tensors or any(number not in BY_ID for number in data[:tensors]):
            raise CorruptPayload("unknown value types of tensors")
        if self.base is None and any(is_relative(BY_ID[number]) for number in data[:tensors]):
            raise CorruptPayload("codes against a model that it does not name")
        reader = Reader(data, tensors)
        sizes = [reader.varint(len(data)) for _ in self.counts]
        if reader.at + sum(sizes) != len(data):
            raise CorruptPayload("the tensors' sizes do not add up")
        pieces, at = [], reader.at
        for number, size, values, base in zip(data[:tensors], sizes, self.counts, self._bases(), strict=True):
            pieces.append(fitted(BY_ID[number], (values,), base).decode(data[at : at + size], values))
            at += size
        return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.float32)
