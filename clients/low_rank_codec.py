"""Low-rank factors of each weight matrix, `wire.codec.uplink = "powersgd"`."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from fl_sim.codecs import CorruptPayload, Schema
from fl_sim.core.types import Params, UserError


class PowerSGD:
    """PowerSGD (Vogels et al., 2019, algorithm 1): rank-r factors by one step of subspace iteration, warm-started.

    Of a tensor as the matrix M, n x m, with the client's Q of its last upload, at first i.i.d. standard normal, m x r:

        P = orthogonalise(M Q),    Q = M^T P,    decoded: P Q^T = P P^T M

    That is a projection of M, so contractive: ||P Q^T - M||^2 = ||M||^2 - ||Q||^2. Goes with error feedback, as in the paper's
    algorithm 2. Each client has factors of its own here; the paper's workers average theirs, which are linear in M. A tensor
    whose factors would be no smaller travels as it is.

        for each tensor: P, then Q, or the tensor; float32

    Args:
        rank: r of the paper, at least 1.
    """

    def __init__(self, *, rank: int = 2) -> None:
        if rank < 1:
            raise UserError(f"rank = {rank}: must be at least 1")
        self.rank = rank

    def encode(self, tensors: Params, state: Params, rng: torch.Generator) -> bytes:
        """See `fl_sim.codecs.Codec`; keeps Q under the tensor's name."""
        parts = []
        for name, value in tensors.items():
            if not is_factored(value.shape, self.rank):
                parts.append(value)
                continue
            matrix = value.flatten(1)
            before = state.get(name)
            q = torch.randn(matrix.shape[1], self.rank, generator=rng) if before is None else before
            p = torch.linalg.qr(matrix @ q).Q
            state[name] = matrix.T @ p
            parts += [p, state[name]]
        return b"".join(part.contiguous().numpy().astype("<f4").tobytes() for part in parts)

    def decode(self, data: bytes, schema: Schema) -> Params:
        """See `fl_sim.codecs.Codec`.

        Raises:
            CorruptPayload: another length.
        """
        shapes = dict(zip(schema.names, schema.shapes, strict=True))
        if len(data) != 4 * sum(part.numel() for shape in shapes.values() for part in self._parts(shape)):
            raise CorruptPayload("another length than the schema says")
        values, made = torch.from_numpy(np.frombuffer(data, "<f4").copy()), {}
        for name, shape in shapes.items():
            parts = []
            for part in self._parts(shape):
                parts.append(values[: part.numel()].view(part))
                values = values[part.numel() :]
            made[name] = (parts[0] @ parts[1].T).view(shape) if len(parts) == 2 else parts[0]
        return made

    def _parts(self, shape: torch.Size) -> Iterator[torch.Size]:
        """Shapes of what travels of one tensor."""
        if is_factored(shape, self.rank):
            yield torch.Size((shape[0], self.rank))
            yield torch.Size((shape[1:].numel(), self.rank))
        else:
            yield shape


def is_factored(shape: torch.Size, rank: int) -> bool:
    """Whether factors of a rank are smaller than the tensor, as the matrix of its first dimension by the others."""
    rows, columns = (shape[0], shape[1:].numel()) if len(shape) > 1 else (0, 0)
    return rank * (rows + columns) < rows * columns
