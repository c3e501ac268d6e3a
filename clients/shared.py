"""Shared random upload mask, for when nothing may depend on the client's data."""

from __future__ import annotations

from dataclasses import dataclass

from clients.local import require_share
from fl_sim.core.types import Mask, Params, Task
from fl_sim.sparsity import Shared


@dataclass(frozen=True)
class SharedRandom:
    """Send the `density` share of prunable coordinates that the round's shared mask names, as every other client does."""

    density: float

    def __post_init__(self) -> None:
        require_share(self.density)

    def __call__(self, task: Task, params: Params) -> Mask | None:
        return Shared(self.density, task.seed)(task.round, params)
