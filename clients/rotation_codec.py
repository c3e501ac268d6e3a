"""Signs after a random rotation, `wire.codec.uplink = "drive"`."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fl_sim.codecs import CorruptPayload, Schema
from fl_sim.core.types import Params, UserError

BLOCK, TOGETHER = 4096, 64
"""Values that are rotated together; each block has one scale. Blocks whose rotations `rows` makes together."""


class Drive:
    """DRIVE (Vargaftik et al., 2021, algorithm 1), the one-bit case of EDEN (2022): signs of a randomly rotated vector.

    With the rotation R = H D / sqrt(d), H Hadamard's matrix and D random signs that both ends draw from one seed:

        sent: sign(R x) and S,    decoded: R^T (S sign(R x)),    S = ||x||_2^2 / ||R x||_1

    This S makes <decoded, x> = ||x||_2^2 exactly, and the mean over rotations x: unbiased, for rotations that are uniform,
    which the paper proves and H D approximates. `unbiased = false` takes S = ||R x||_1 / d, which has the least error and
    goes with error feedback: ||decoded - x||^2 = ||x||_2^2 - ||R x||_1^2 / d. All tensors are one vector, cut into blocks of
    4096; the last block is filled up with zeros to a power of two.

        seed 8 bytes | float32 S of each block | bits of all blocks, 1 = not negative

    Args:
        unbiased: which S.
    """

    stateless = True

    def __init__(self, *, unbiased: bool = True) -> None:
        self.unbiased = unbiased

    def encode(self, tensors: Params, state: Params, rng: torch.Generator) -> bytes:
        """See `fl_sim.codecs.Codec`; draws the seed of the rotation, and keeps nothing."""
        seed = int(torch.randint(2**62, (1,), generator=rng))
        flat = torch.cat([value.reshape(-1) for value in tensors.values()])
        scales, bits = [], []
        for block, signs in blocks(flat.numel(), seed):
            x = torch.zeros(len(signs))
            x[: block.stop - block.start] = flat[block]
            rotated = hadamard(x * signs)
            l1 = (
                rotated.double().abs().sum()
            )  # float64: squares of float32 below 1e-23 are 0 in float32, above 1e19 infinite
            unbiased = x.double().square().sum() / l1 if l1 > 0 else l1
            scales.append(float(unbiased if self.unbiased else l1 / len(signs)))
            bits.append(np.packbits((rotated >= 0).numpy()).tobytes())
        if not np.isfinite(scales).all():
            raise UserError("a value is beyond the range of this codec: its rotation overflows float32")
        return b"".join([seed.to_bytes(8, "little"), np.array(scales, "<f4").tobytes(), *bits])

    def decode(self, data: bytes, schema: Schema) -> Params:
        """See `fl_sim.codecs.Codec`.

        Raises:
            CorruptPayload: another length, or a scale that is negative or not finite.
        """
        sizes = [-(-padded(size) // 8) for size in block_sizes(schema.size)]
        if len(data) != 8 + 4 * len(sizes) + sum(sizes):
            raise CorruptPayload("another length than the schema says")
        scales, at = np.frombuffer(data, "<f4", count=len(sizes), offset=8), 8 + 4 * len(sizes)
        if not (np.isfinite(scales) & (scales >= 0)).all():
            raise CorruptPayload("a scale that is negative or not finite")
        flat = torch.empty(schema.size)
        seed = int.from_bytes(data[:8], "little")
        for (block, signs), scale, size in zip(blocks(schema.size, seed), scales.tolist(), sizes, strict=True):
            bits = np.unpackbits(np.frombuffer(data, np.uint8, count=size, offset=at))[: len(signs)]
            rotated = torch.from_numpy(bits.astype(np.float32)) * 2 - 1
            flat[block] = (hadamard(rotated) * signs * scale)[: block.stop - block.start]
            at += size
        return dict(schema.view(flat))


def hadamard(x: Tensor) -> Tensor:
    """Hadamard's matrix over sqrt(d), times each row of d = 2^k values, in d log d steps; it is its own inverse."""
    count, half = x.shape[-1], 1
    while half < count:
        pairs = x.view(*x.shape[:-1], -1, 2, half)
        upper, lower = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack((upper + lower, upper - lower), dim=-2).view(x.shape)
        half *= 2
    return x.div(count**0.5)


def block_sizes(count: int) -> list[int]:
    """Values of each block."""
    return [min(BLOCK, count - start) for start in range(0, count, BLOCK)]


def padded(size: int) -> int:
    """Values of a block once it is filled up to a power of two."""
    return 1 << (size - 1).bit_length()


def blocks(count: int, seed: int) -> list[tuple[slice, Tensor]]:
    """(place, random signs of its padded length) of each block."""
    draw, start, made = torch.Generator().manual_seed(seed), 0, []
    for size in block_sizes(count):
        signs = torch.randint(0, 2, (padded(size),), generator=draw).float() * 2 - 1
        made.append((slice(start, start + size), signs))
        start += size
    return made


def rows(count: int, seed: int) -> Iterator[tuple[slice, Tensor]]:
    """(places, random signs) of several blocks at a time, which have one length: (blocks, length)."""
    drawn = blocks(count, seed)
    whole = count // BLOCK
    for first in [*range(0, whole, TOGETHER), *([whole] if count % BLOCK else [])]:
        some = drawn[first : min(first + TOGETHER, whole) if first < whole else None]
        yield slice(some[0][0].start, some[-1][0].stop), torch.stack([signs for _, signs in some])
