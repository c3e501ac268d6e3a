"""Levels of a few bits after a random rotation, `wire.codec.uplink = "eden"`."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri
from torch import Tensor

from clients.rotation_codec import block_sizes, hadamard, padded, rows
from fl_sim.codecs import CorruptPayload, Schema, symbol_coding
from fl_sim.core.types import Params, UserError

MOST_BITS, STEPS, TINY = 8, 10, 1e-300


class Eden:
    """EDEN (Vargaftik et al., ICML 2022): a randomly rotated vector in 2^bits levels of a normal distribution.

    With the rotation R = H D / sqrt(d) of DRIVE (`clients.rotation_codec`), and Q, which takes each coordinate to the
    nearest of the 2^bits levels of the Lloyd-Max quantiser of N(0, 1):

        sent: Q(z) and S, z = sqrt(d) R x / ||x||_2,    decoded: R^T (S Q(z)),    S = ||x||_2^2 / <R x, Q(z)>

    This S makes <decoded, x> = ||x||_2^2 exactly, and the mean over rotations x: unbiased, for rotations that are uniform,
    which the paper proves and H D approximates. The error E ||decoded - x||^2 / ||x||^2 goes to D / (1 - D) as d grows, D the
    quantiser's error: 0.571, 0.133, 0.0358 and 0.0096 for 1 to 4 bits. `unbiased = false` takes S = <R x, Q(z)> /
    ||Q(z)||_2^2, which has the least error, D, and goes with error feedback.

    All tensors are one vector, cut into blocks of 4096; the last block is filled up with zeros to a power of two. Levels
    are entropy-coded, an option of the paper: 2^bits of them take a little less than `bits` bits. The bytes: seed, 8;
    levels of all blocks by `fl_sim.codecs.symbol_coding`, where the float32 S of each block ride.

    Args:
        bits: of a level, from 1 to 8. unbiased: which S.
    """

    stateless = True

    def __init__(self, *, bits: int = 4, unbiased: bool = True) -> None:
        if not isinstance(bits, int) or not 1 <= bits <= MOST_BITS:
            raise UserError(f"bits = {bits}: must be a whole number from 1 to {MOST_BITS}")
        self.bits, self.unbiased = bits, unbiased

    def encode(self, tensors: Params, state: Params, rng: torch.Generator) -> bytes:
        """See `fl_sim.codecs.Codec`; draws the seed of the rotation, and keeps nothing."""
        seed = int(torch.randint(2**62, (1,), generator=rng))
        flat = torch.cat([value.reshape(-1) for value in tensors.values()])
        levels = torch.from_numpy(lloyd_max(self.bits)).double()
        edges, scales, symbols = (levels[1:] + levels[:-1]) / 2, [], []
        for places, signs in rows(flat.numel(), seed):
            x = torch.zeros(signs.numel())
            x[: places.stop - places.start] = flat[places]
            rotated = hadamard(x.view(signs.shape) * signs).double()
            squares = x.view(signs.shape).double().square().sum(1)
            z = rotated * (signs.shape[1] / squares.clamp(min=TINY)).sqrt()[:, None]
            chosen = torch.bucketize(z, edges)
            scales += self._scales(squares, rotated, levels[chosen])
            symbols.append(chosen.to(torch.uint8).view(-1))
        if not np.isfinite(np.array(scales, np.float32)).all():
            raise UserError("a value is beyond the range of this codec: its rotation overflows float32")
        written, rider = torch.cat(symbols).numpy(), np.array(scales, "<f4").tobytes()
        return seed.to_bytes(8, "little") + symbol_coding.encode(
            written, symbol_coding.single(len(written)), 1, rider=rider
        )

    def _scales(self, squares: Tensor, rotated: Tensor, levels: Tensor) -> list[float]:
        """S of each block: 0 where all of it is 0 once rotated, NaN where its sums overflow."""
        along = (rotated * levels).sum(1)
        along = torch.where(along.isfinite(), along, torch.nan)
        found = squares / along if self.unbiased else along / levels.square().sum(1)
        return torch.where(along == 0, 0, found).tolist()

    def decode(self, data: bytes, schema: Schema) -> Params:
        """See `fl_sim.codecs.Codec`.

        Raises:
            CorruptPayload: another length or a damaged code, or a scale that is negative or not finite.
        """
        sizes = [padded(size) for size in block_sizes(schema.size)]
        if len(data) < 8:
            raise CorruptPayload("too short for a seed")
        contexts = symbol_coding.single(sum(sizes))
        symbols, rider = symbol_coding.with_rider(memoryview(data)[8:], contexts, 1, 1 << self.bits, 4 * len(sizes))
        scales = np.frombuffer(rider, "<f4")
        if not (np.isfinite(scales) & (scales >= 0)).all():
            raise CorruptPayload("a scale that is negative or not finite")
        values, at, flat = torch.from_numpy(lloyd_max(self.bits)[symbols]), 0, torch.empty(schema.size)
        # Scales come after the rotation, whose sums they could overflow.
        factors = torch.from_numpy(np.repeat(scales.astype(np.float32), sizes))
        for places, signs in rows(schema.size, int.from_bytes(data[:8], "little")):
            part = slice(at, at + signs.numel())
            made = hadamard(values[part].view(signs.shape)) * signs * factors[part].view(signs.shape)
            flat[places], at = made.view(-1)[: places.stop - places.start], part.stop
        return dict(schema.view(flat))


@lru_cache
def lloyd_max(bits: int) -> NDArray[np.float32]:
    """The 2^bits levels of least squared error for N(0, 1), ascending (Lloyd, 1982; Max, 1960, table I).

    Each level is the mean of what is nearest to it. Newton's method for the positive half, which mirrors the other, from the
    levels of many bits (Panter and Dite, 1951): quantiles of N(0, 3). Not to be changed.
    """
    half = 1 << (bits - 1)
    levels = 3**0.5 * ndtri(0.5 + (np.arange(half) + 0.5) / (2 * half))
    for _ in range(STEPS):
        inner = (levels[1:] + levels[:-1]) / 2
        density = np.exp(-(np.concatenate([[0.0], inner, [np.inf]]) ** 2) / 2) / (2 * np.pi) ** 0.5
        mass = -np.diff(ndtr(-np.concatenate([[0.0], inner, [np.inf]])))
        mean = -np.diff(density) / mass
        # How the mean of a cell moves with the levels of which an edge of it is the middle.
        below = density[1:-1] * (mean[1:] - inner) / mass[1:] / 2
        above = density[1:-1] * (inner - mean[:-1]) / mass[:-1] / 2
        moves = np.diag(np.append(0, below) + np.append(above, 0)) + np.diag(below, -1) + np.diag(above, 1)
        levels = levels + np.linalg.solve(np.eye(half) - moves, mean - levels)
    return np.concatenate([-levels[::-1], levels]).astype(np.float32)
