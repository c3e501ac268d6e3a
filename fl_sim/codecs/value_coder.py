"""What a value type does: bytes of the sparse values, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float32]
Counts = tuple[int, ...]
"""Values of each tensor, one after the other."""


def tensor_slices(counts: Counts, count: int) -> list[slice]:
    """Where each tensor's values lie among `count`; without counts all values are one tensor's."""
    ends = np.cumsum(counts or (count,)).tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


class ValueCoder(Protocol):
    """A value type: encodes and decodes the sparse values. `id` is its number in the payload."""

    @property
    def id(self) -> int:
        """Number on the wire."""

    def encode(self, values: Values, seed: int) -> bytes | memoryview:
        """Bytes of 1-D finite float32 values; `seed` feeds stochastic rounding.

        Raises:
            ValueError: a value that this type cannot hold.
        """

    def decode(self, data: memoryview, count: int) -> Values:
        """`count` values; `count` is known to the receiver.

        Raises:
            CorruptPayload: the bytes do not hold exactly that many.
        """


@runtime_checkable
class Together(ValueCoder, Protocol):
    """A value type that takes several clients' values in less time than one after the other."""

    def encode_all(self, values: Values, seeds: Sequence[int]) -> list[bytes]:
        """What `encode` makes of each row of (clients, values), with its seed; raises as it does."""

    def decode_all(self, data: Sequence[memoryview], count: int) -> Values:
        """What `decode` makes of each, as the rows of (clients, count); raises as it does, and never says of which."""
