"""Count Sketches of the change, `wire.codec.uplink = "sketch"`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import ceil

import numpy as np
import torch
from torch import Tensor

from fl_sim.codecs import CorruptPayload, Schema
from fl_sim.core.types import Params, UserError
from fl_sim.sparsity.selection import top_of_few

Hashes = Iterable[tuple[Tensor, Tensor]]
"""(bucket, sign) of each value, for each row of a sketch."""


class CountSketch:
    """Count Sketch (Charikar et al., 2002), the compressor of FetchSGD (Rothchild et al., 2020, section 3): heavy hitters.

    With hash functions h_r and random signs s_r of each of an odd number of rows r, which both ends draw from one seed:

        sent: S[r, h_r(i)] += s_r(i) x_i and a,    estimate of x_i: median over r of s_r(i) S[r, h_r(i)]

    The k = ceil(density d) largest estimates, e, are decoded as a e, the others as 0. A value far above ||x||_2 / sqrt(columns)
    is found. With density = 1, a is 1 and the mean over seeds is x: the error of a row is symmetric about 0, and so is the
    median of an odd number of rows. With a smaller density a = <x, e> / ||e||^2, so that ||a e - x||^2 = ||x||^2 - <x, e>^2 /
    ||e||^2: contractive whatever x is, which the paper's proof assumes of heavy hitters; with error feedback. All tensors
    are one vector. FetchSGD itself, whose server adds sketches up and keeps the error, is `strategies.published.fetchsgd`.

        seed 8 bytes | a float32 | float32 table, rows x columns

    Args:
        rows: an odd number.
        share: numbers of the table over values of the model, above 0 and at most 1.
        density: share of the values that is decoded, above 0 and at most 1.
    """

    stateless = True

    def __init__(self, *, rows: int = 5, share: float = 0.2, density: float = 0.02) -> None:
        if rows < 1 or rows % 2 == 0:
            raise UserError(f"rows = {rows}: must be an odd number, so that the median is unbiased")
        if not (0 < share <= 1 and 0 < density <= 1):
            raise UserError(f"share = {share}, density = {density}: must be above 0 and at most 1")
        self.rows, self.share, self.density = rows, share, density

    def encode(self, tensors: Params, state: Params, rng: torch.Generator) -> bytes:
        """See `fl_sim.codecs.Codec`; draws the seed of the hash functions, and keeps nothing."""
        seed = int(torch.randint(2**62, (1,), generator=rng))
        vector = torch.cat([value.reshape(-1) for value in tensors.values()])
        columns = self._columns(vector.numel())
        table = sketched(vector, self._hashes(vector.numel(), columns, seed), columns)
        numbers = torch.cat([torch.tensor([self._factor(vector, table, seed)]), table.reshape(-1)])
        if not bool(torch.isfinite(numbers).all()):
            raise UserError("a value is beyond the range of this codec: a sum of float32 overflows")
        return seed.to_bytes(8, "little") + numbers.numpy().astype("<f4").tobytes()

    def _factor(self, vector: Tensor, table: Tensor, seed: int) -> float:
        """The number by which estimates are multiplied."""
        if self.density == 1:
            return 1.0
        found = self._found(table, vector.numel(), seed).double()
        square = float(found.square().sum())
        return float(vector.double() @ found) / square if square else 0.0

    def _found(self, table: Tensor, size: int, seed: int) -> Tensor:
        """The largest estimates, of equal ones the first; 0 elsewhere."""
        said = estimated(table, self._hashes(size, table.shape[1], seed))
        return said.masked_fill(~top_of_few([said.abs()], ceil(self.density * size)), 0)

    def decode(self, data: bytes, schema: Schema) -> Params:
        """See `fl_sim.codecs.Codec`.

        Raises:
            CorruptPayload: another length, or a number that is not finite.
        """
        if len(data) != self.size(schema):
            raise CorruptPayload("another length than the schema says")
        numbers = torch.from_numpy(np.frombuffer(data, "<f4", offset=8).astype(np.float32))
        if not bool(torch.isfinite(numbers).all()):
            raise CorruptPayload("a number that is not finite")
        table, seed = numbers[1:].view(self.rows, -1), int.from_bytes(data[:8], "little") % 2**62
        return dict(schema.view(numbers[0] * self._found(table, schema.size, seed)))

    def size(self, schema: Schema) -> int:
        """Bytes of each message."""
        return 12 + 4 * self.rows * self._columns(schema.size)

    def _columns(self, size: int) -> int:
        return max(1, ceil(self.share * size / self.rows))

    def _hashes(self, size: int, columns: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        draw = torch.Generator().manual_seed(seed)
        for _ in range(self.rows):
            buckets = torch.randint(columns, (size,), generator=draw)
            yield buckets, torch.randint(2, (size,), generator=draw) * 2.0 - 1


def sketched(vector: Tensor, hashes: Hashes, columns: int) -> Tensor:
    """The Count Sketch (rows, columns) of a vector."""
    return torch.stack([torch.zeros(columns).scatter_add_(0, where, signs * vector) for where, signs in hashes])


def estimated(table: Tensor, hashes: Hashes) -> Tensor:
    """What a sketch says of each value."""
    said = [row[where] * signs for row, (where, signs) in zip(table, hashes, strict=True)]
    return torch.stack(said).median(dim=0).values
