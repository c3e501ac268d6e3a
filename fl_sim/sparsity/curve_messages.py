"""Messages of distortion curves, which a server asks of its clients at a pruning event.

The request is the task of a round, in a message of type `query.curves` whose header holds a
`fl_sim.communication.task_header.CurveRequest`. The answer is a payload of `fl_sim.codecs` like any other, a float32
curve for every prunable tensor in its auxiliary section, with the number of calibration images as its number of examples:
kilobytes, booked like everything.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fl_sim import codecs
from fl_sim.codecs import CorruptPayload, Schema
from fl_sim.sparsity.curves import Curves

ACTION = "curves"


def answer_schema(names: Sequence[str], levels: int) -> Schema:
    """Schema of an answer: one curve for each prunable tensor."""
    return Schema.of({name: torch.zeros(levels) for name in names}, (), auxiliary=names)


def encode_curves(curves: Curves) -> bytes:
    """Encode all curves as one payload; all have equally many levels."""
    values = {name: torch.tensor(curve, dtype=torch.float32) for name, curve in curves.items()}
    schema = answer_schema(list(values), len(next(iter(values.values()))))
    return codecs.encode(values, None, schema=schema)


def decode_curves(data: bytes | memoryview, schema: Schema) -> dict[str, list[float]]:
    """Invert `encode_curves` for a schema of `answer_schema`.

    Raises:
        CorruptPayload: other bytes, or a distortion below zero.
    """
    values, _ = codecs.decode(data, schema=schema)
    if any(bool((value < 0).any()) for value in values.values()):
        raise CorruptPayload("a distortion is below zero")
    return {name: value.tolist() for name, value in values.items()}
