"""Encoding of one direction in at most so many bytes a payload (`wire.budget`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fl_sim.codecs import Schema
from fl_sim.codecs.value_coder import Values
from fl_sim.communication.exchange import CONTENTS, Coding
from fl_sim.core.types import Mask, Params, UserError
from fl_sim.sparsity.bit_allocation import TooSmall, allotted, rounding_errors, smallest


@dataclass(frozen=True)
class BudgetCoding(Coding):
    """Encoding of one direction in at most so many bytes a payload: of all choices of a value type for each prunable tensor
    that fit, the one with the least squared error.

    Attributes:
        limit: bytes of a payload, with mask, biases, statistics and header.
        types: what is offered to each tensor, names of `fl_sim.codecs.VALUES`.
        way: "uplink" or "downlink".
    """

    limit: int = field(kw_only=True)
    types: tuple[str, ...] = field(kw_only=True)
    way: str = field(kw_only=True)

    @property
    def is_exact(self) -> bool:
        """Nobody knows beforehand: the answer is no."""
        return False

    @property
    def is_plain(self) -> bool:
        """See `Coding`."""
        return False

    def encoded(
        self,
        values: Params,
        sent_mask: Mask | None,
        reference: Params,
        *,
        schema: Schema,
        held_mask: Mask | None,
        seed: int,
        state: Params,
        types: Sequence[str] | None = None,
    ) -> bytes:
        """See `Coding`.

        Raises:
            UserError: the smallest payload has more bytes.
        """

        def encode(types: Sequence[str]) -> bytes:
            coding = Coding(content=self.content, masks=self.masks)
            return coding.encoded(
                values, sent_mask, reference, schema=schema, held_mask=held_mask, seed=seed, state=state, types=types
            )

        sent = _sent(values, sent_mask, schema)
        if not all(np.isfinite(each).all() for each in sent):
            encode(["float32"] * len(sent))  # says which parameter it is
        tried = rounding_errors(sent, self.types, seed)
        try:
            return encode(allotted(tried, self.types, self.limit, encode))
        except TooSmall as error:
            raise UserError(
                f"wire.budget: leaves {self.limit:,} bytes to a payload of the {self.way}, and the smallest has {error.least:,}"
            ) from error

    def least(self, params: Params, reference: Params, *, schema: Schema) -> int:
        """Bytes of the smallest payload of these parameters."""
        plain = Coding(content=self.content, masks=self.masks)
        outgoing = CONTENTS[self.content].outgoing
        values = params if outgoing is None else schema.view(outgoing(schema.flat(params), schema.flat(reference)))

        def encode(types: Sequence[str]) -> bytes:
            return plain.encoded(values, None, reference, schema=schema, held_mask=None, seed=0, state={}, types=types)

        return smallest(rounding_errors(_sent(values, None, schema), self.types, 0), self.types, encode)


def _sent(values: Params, sent_mask: Mask | None, schema: Schema) -> list[Values]:
    """The values of each prunable tensor that travel."""
    if sent_mask is None:
        return [values[name].reshape(-1).numpy() for name in schema.prunable]
    return [values[name][sent_mask[name]].numpy() for name in schema.prunable]
