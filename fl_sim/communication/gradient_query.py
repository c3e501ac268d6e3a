"""Messages of a client's gradients of the global model, by which a server grows or chooses weights (RigL, PruneFL, SSFL).

The request is a task in a message of type `query.gradients`, whose header holds a
`fl_sim.communication.task_header.GradientRequest`. The answer is a payload of the prunable tensors: the largest gradients,
float32, with a mask of which they are; all of them travel where the share is 1.
"""

from __future__ import annotations

import torch

from fl_sim import codecs
from fl_sim.codecs import Schema
from fl_sim.core.types import Mask, Params

ACTION = "gradients"


def largest(gradients: Params, share: float, alive: Mask | None, schema: Schema) -> Mask | None:
    """Mask of the gradients that are sent: the `share` of the weights that the pruning mask removes with the largest ones.

    Args:
        gradients: of every prunable tensor.
        share: from 0 to 1; 1 sends the gradients of all weights, pruned or not (None).
        alive: the pruning mask; None = nothing is pruned, and the share is of all weights.
        schema: of the prunable tensors.
    """
    if share == 1:
        return None
    flat = schema.flat(gradients).abs()
    if alive is not None:
        flat = flat.masked_fill(schema.flat_mask(alive), -1.0)
    count = round(share * int((flat >= 0).sum()))
    sent = torch.zeros(len(flat), dtype=torch.bool)
    sent[flat.topk(count).indices] = True
    return schema.view_mask(sent)


def encode_gradients(gradients: Params, share: float, alive: Mask | None, schema: Schema) -> bytes:
    """Encode the gradients that `largest` chooses. Raises ValueError where one is not finite."""
    return codecs.encode(gradients, largest(gradients, share, alive, schema), schema=schema)


def decode_gradients(data: bytes | memoryview, schema: Schema) -> Params:
    """Invert `encode_gradients`; what was not sent is zero.

    Raises:
        CorruptPayload: other bytes.
    """
    return codecs.decode(data, schema=schema)[0]
