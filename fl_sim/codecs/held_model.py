"""The model that a receiver holds, where a payload codes against it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import xxhash
from torch import Tensor

from fl_sim.codecs import tensor_coding
from fl_sim.codecs.errors import CorruptPayload
from fl_sim.codecs.schema import Schema
from fl_sim.codecs.value_coder import Values
from fl_sim.core.types import Params


@dataclass(frozen=True)
class HeldModel:
    """The receiver's values at the coordinates that a payload carries.

    Attributes:
        sent: at the prunable coordinates that travel.
        others: of all tensors that are not prunable.
    """

    sent: Values
    others: Values

    @classmethod
    def of(cls, base: Params, alive: Tensor | None, schema: Schema) -> HeldModel:
        """The part of a held model that a payload of these coordinates (None = all) codes against."""
        flat = schema.flat(base).numpy()
        prunable, others = flat[: schema.prunable_size], flat[schema.prunable_size :]
        return cls(prunable if alive is None else tensor_coding.gathered(prunable, alive.numpy()), others)

    @cached_property
    def hash(self) -> bytes:
        """Eight bytes over the bits of all values: two ends compare them before they code against these values."""
        check = xxhash.xxh3_64(self.sent.data)
        check.update(self.others.data)
        return check.digest()


def held(named: bytes | None, base: Params | None, alive: Tensor | None, schema: Schema) -> HeldModel | None:
    """The model that a payload codes against; None where it names none.

    Raises:
        CorruptPayload: it names another one than `base`.
    """
    if named is None:
        return None
    if base is None:
        raise CorruptPayload("codes against a model, and none is held")
    found = HeldModel.of(base, alive, schema)
    if found.hash != named:
        raise CorruptPayload("codes against another model than the one that is held")
    return found
