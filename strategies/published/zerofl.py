"""ZeroFL (Qiu et al., 2022, arXiv 2208.02507): sparse forward passes on the client, uploads of the largest weights.

SWAT: each layer's forward pass has its `1 - sparsity` share of largest weights; all weights are updated, as if
the gradient passed through the selection. Upload "Top-K-Weights": the `1 - sparsity + mask_ratio` share of each
layer with the largest magnitude. The server averages sparse models: a weight that a client did not send counts as zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from clients.local import LocalClient
from clients.transformed import Through, Transform
from fl_sim.core.types import Mask, Params, Task, Update, UserError
from fl_sim.sparsity import apply_mask, magnitude, topk_mask
from fl_sim.training.client import Client, ClientContext
from fl_sim.training.loop import Training
from strategies.aggregation import coverage_mean
from strategies.base import Method
from strategies.reading import ReadOnce
from strategies.server_step import ServerState


@dataclass(frozen=True)
class Largest:
    """The `density` share of each layer with the largest magnitude."""

    density: float

    def of(self, params: Params) -> Mask:
        """Their mask."""
        keep = {name: round(self.density * value.numel()) for name, value in params.items()}
        return topk_mask(magnitude({name: value.detach() for name, value in params.items()}), keep)

    def upload(self, task: Task, params: Params) -> Mask | None:
        """Upload mask of a client."""
        return self.of(params)

    def transform(self, task: Task, ctx: ClientContext) -> Transform:
        """Weights with the others at zero; the gradient passes straight through to all of them."""

        def sparse(params: Params) -> Params:
            kept = self.of(params)
            return {n: v + (torch.where(kept[n], v, 0.0) - v).detach() for n, v in params.items()}

        return sparse


def client(*, training: Training, sparsity: float = 0.9, mask_ratio: float = 0.0) -> Client:
    """ZeroFL's client: sparse forward passes, and an upload of the largest weights.

    Args:
        training: the config's `[training]` table.
        sparsity: share of each layer that is zero in forward passes, from 0 to below 1.
        mask_ratio: further share of each layer that is uploaded, from 0 to `sparsity`.
    """
    if not 0 <= sparsity < 1 or not 0 <= mask_ratio <= sparsity:
        raise UserError(
            f"client: sparsity = {sparsity} must be from 0 to below 1, mask_ratio = {mask_ratio} from 0 to sparsity"
        )
    forward, sent = Largest(1 - sparsity), Largest(1 - sparsity + mask_ratio)
    return LocalClient(training, loss=Through(forward.transform), upload=sent.upload)


def sparse_mean(state: ServerState, updates: Iterable[Update]) -> Params:
    """Weighted mean of the clients' sparse models, zeros included."""
    whole = (replace(each, params=apply_mask(each.params, each.mask or {}), mask=None) for each in updates)
    return coverage_mean(state, ReadOnce(whole))


def server() -> Method:
    """ZeroFL's server. Goes with `strategies.published.zerofl:client`."""
    return Method(aggregate=sparse_mean)
