"""Scaled signs: one bit a value, `wire.codec.uplink = "signsgd"`."""

from __future__ import annotations

import numpy as np
import torch

from fl_sim.codecs import CorruptPayload, Schema
from fl_sim.core.types import Params


class SignSGD:
    """signSGD: the sign of each value and one magnitude a tensor; goes with a majority vote, or with error feedback.

    Bernstein et al. (2018, algorithm 3) send sign(x), and the server takes a majority vote. Karimireddy et al. (2019,
    algorithm 1, EF-SIGNSGD) scale it, C(x) = ||x||_1 / d sign(x), which is contractive by x's density:
    ||C(x) - x||^2 = (1 - ||x||_1^2 / (d ||x||_2^2)) ||x||_2^2. Zero has the sign +1, so that every value is one bit.

        for each tensor: magnitude float32 | ceil(d / 8) bytes of bits, 1 = positive, padded with zeros
    """

    stateless = True

    def encode(self, tensors: Params, state: Params, rng: torch.Generator) -> bytes:
        """See `fl_sim.codecs.Codec`; keeps and draws nothing."""
        parts = []
        for value in tensors.values():
            flat = value.reshape(-1).numpy()
            magnitude = np.abs(flat).mean(dtype=np.float64) if flat.size else 0.0
            parts += [np.array(magnitude, "<f4").tobytes(), np.packbits(flat >= 0).tobytes()]
        return b"".join(parts)

    def decode(self, data: bytes, schema: Schema) -> Params:
        """See `fl_sim.codecs.Codec`.

        Raises:
            CorruptPayload: another length, a negative or infinite magnitude, or bits behind the last value.
        """
        sizes = [-(-count // 8) for count in schema.numels]
        if len(data) != sum(sizes) + 4 * len(sizes):
            raise CorruptPayload("another length than the schema says")
        made: Params = {}
        for name, shape, count, size in zip(schema.names, schema.shapes, schema.numels, sizes, strict=True):
            magnitude, bits = (
                np.frombuffer(data[:4], "<f4")[0],
                np.unpackbits(np.frombuffer(data[4 : 4 + size], np.uint8)),
            )
            data = data[4 + size :]
            if not (np.isfinite(magnitude) and magnitude >= 0) or bits[count:].any():
                raise CorruptPayload("a magnitude that is negative or not finite, or bits behind the last value")
            signs = bits[:count].astype(np.float32) * 2 - 1
            made[name] = torch.from_numpy(signs * magnitude).view(shape)
        return made
