"""Messages of a client's loss of the global model, which a selection of clients may ask for.

The request is a task in a message of type `query.losses`; the answer a payload of one float32 in its auxiliary section, with
the number of samples as its number of examples.
"""

from __future__ import annotations

import torch

from fl_sim import codecs
from fl_sim.codecs import Schema

ACTION = "losses"
SCHEMA = Schema.of({"loss": torch.zeros(1)}, (), auxiliary=["loss"])


def encode_loss(loss: float) -> bytes:
    """Encode one loss. Raises ValueError where it is not finite."""
    return codecs.encode({"loss": torch.tensor([loss], dtype=torch.float32)}, None, schema=SCHEMA)


def decode_loss(data: bytes | memoryview) -> float:
    """Invert `encode_loss`.

    Raises:
        CorruptPayload: other bytes.
    """
    return float(codecs.decode(data, schema=SCHEMA)[0]["loss"])
