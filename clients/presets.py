"""Clients by name: each a line of composition over `LocalClient`.

A preset takes keyword arguments only: `training` from the config's `[training]` table, the rest from `[client]`.
"""

from __future__ import annotations

from clients.local import LocalClient, ProximalLoss, TopK
from fl_sim.training import Training
from fl_sim.types import Client


def fedavg(*, training: Training) -> Client:
    """Plain local SGD; uploads everything that is alive (FedAvg; McMahan et al., 2017)."""
    return LocalClient(training)


def fedprox(*, training: Training, mu: float = 0.01) -> Client:
    """FedAvg with a proximal term of weight `mu` (FedProx; Li et al., 2020)."""
    return LocalClient(training, loss=ProximalLoss(mu))


def topk(*, training: Training, density: float = 0.1) -> Client:
    """Uploads the `density` share of weights that changed most; add `wire.error_feedback = true` to carry the rest over."""
    return LocalClient(training, upload=TopK(density))
