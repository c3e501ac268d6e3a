"""Singular vectors of each weight matrix, drawn at random, `wire.codec.uplink = "atomo"`."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from clients.low_rank_codec import is_factored
from fl_sim.codecs import CorruptPayload, Schema
from fl_sim.core.types import Params, UserError


class Atomo:
    """Spectral ATOMO (Wang et al., 2018, algorithm 1): low-rank factors of each matrix, unbiased for any of them.

    A tensor as the matrix M = sum_i sigma_i u_i v_i^T keeps each of its singular vectors with a probability p_i:

        sent: sigma_i / p_i u_i and v_i of those that are kept,    decoded: their sum,    sum_i p_i = rank

    Its mean is M. p_i = min(1, sigma_i c), which has the least variance among all p of this sum; a matrix of at most so many
    singular values that are not 0 arrives as it is. `unbiased = false` keeps the `rank` largest: the best factors of that rank
    (Eckart and Young, 1936), contractive, so it goes with error feedback. A tensor whose `rank` factors would be no smaller
    travels as it is. How many are kept, and with that the bytes, is random where `unbiased` is true.

        for each tensor: number of vectors u16 | float32 sigma u / p of each | float32 v of each; or the tensor, float32

    Args:
        rank: singular vectors that are kept on average, at least 1.
        unbiased: whether they are drawn.
    """

    stateless = True

    def __init__(self, *, rank: int = 2, unbiased: bool = True) -> None:
        if rank < 1:
            raise UserError(f"rank = {rank}: must be at least 1")
        self.rank, self.unbiased = rank, unbiased

    def encode(self, tensors: Params, state: Params, rng: torch.Generator) -> bytes:
        """See `fl_sim.codecs.Codec`; keeps nothing."""
        return b"".join(part for value in tensors.values() for part in self._parts(value, rng))

    def _parts(self, value: Tensor, rng: torch.Generator) -> Iterator[bytes]:
        if not is_factored(value.shape, self.rank):
            yield _bytes(value)
            return
        left, sigma, right = torch.linalg.svd(value.flatten(1), full_matrices=False)
        p = probabilities(sigma, self.rank) if self.unbiased else (torch.arange(len(sigma)) < self.rank).float()
        kept = torch.rand(len(p), generator=rng) < p
        yield int(kept.sum()).to_bytes(2, "little")
        yield _bytes((left[:, kept] * (sigma / p)[kept]).T)
        yield _bytes(right[kept])

    def decode(self, data: bytes, schema: Schema) -> Params:
        """See `fl_sim.codecs.Codec`.

        Raises:
            CorruptPayload: another length, or more singular vectors than a matrix has.
        """
        made, at = {}, 0
        for name, shape in zip(schema.names, schema.shapes, strict=True):
            if not is_factored(shape, self.rank):
                made[name] = _floats(data, at, shape)
                at += 4 * shape.numel()
                continue
            rows, columns = shape[0], shape[1:].numel()
            count = int.from_bytes(data[at : at + 2], "little")
            if count > min(rows, columns):
                raise CorruptPayload("more singular vectors than the matrix has")
            left = _floats(data, at + 2, torch.Size((count, rows)))
            right = _floats(data, at + 2 + 4 * count * rows, torch.Size((count, columns)))
            at += 2 + 4 * count * (rows + columns)
            made[name] = (left.T @ right).view(shape)
        if at != len(data):
            raise CorruptPayload("another length than the schema and the numbers of vectors say")
        return made


def probabilities(sigma: Tensor, total: int) -> Tensor:
    """Probabilities in proportion to singular values, those at most 1, that sum to `total`, or are 1 for all that are not 0.

    Args:
        sigma: the largest first.
    """
    rest = sigma.double().flip(0).cumsum(0).flip(0)
    for sure, (value, left) in enumerate(zip(sigma.tolist(), rest.tolist(), strict=True)):
        if left == 0 or value * (total - sure) <= left:
            drawn = sigma[sure:].double() * ((total - sure) / left if left else 0)
            return torch.cat([torch.ones(sure), drawn.float()])
    return torch.ones(len(sigma))


def _bytes(value: Tensor) -> bytes:
    return value.contiguous().numpy().astype("<f4").tobytes()


def _floats(data: bytes, at: int, shape: torch.Size) -> Tensor:
    if at + 4 * shape.numel() > len(data):
        raise CorruptPayload("another length than the schema and the numbers of vectors say")
    return torch.from_numpy(np.frombuffer(data, "<f4", count=shape.numel(), offset=at).astype(np.float32)).view(shape)
