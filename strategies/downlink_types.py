"""Value types of the downlink: the same for all tensors, or chosen for each layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fl_sim.core.types import Task, UserError
from fl_sim.runtime.server_context import ServerContext
from fl_sim.sparsity.bit_allocation import LayerAdaptive
from fl_sim.sparsity.curves import calibration

Downlink = Callable[[ServerContext, Task, int], Sequence[str] | None]
"""(run, task, seed of the payload) -> a value type for each prunable tensor; None leaves it to `wire.downlink`."""


def configured_types(context: ServerContext, task: Task, seed: int) -> None:
    """The value type of `wire.downlink` for all tensors."""
    return


@dataclass(frozen=True)
class Adapted:
    """A type for every layer, chosen anew for every model sent: the least output distortion within the bytes.

    Attributes:
        choose: the budget and the types.
        images: how many of the server's images (`data.proxy` or `data.noise`) the distortion is measured on.
    """

    choose: LayerAdaptive
    images: int

    def __call__(self, context: ServerContext, task: Task, seed: int) -> Sequence[str]:
        if context.proxy is None:
            raise UserError("strategy: a layer-adaptive downlink needs images: set data.proxy (a share) or data.noise")
        if context.exchange.downlink.content != "parameters":
            raise UserError("wire.downlink.content: a layer-adaptive downlink sends 'parameters'")
        images = calibration(context.proxy, self.images)
        schema = context.exchange.schema
        return self.choose(context.model(task.params), task.params, task.mask, images, schema=schema, seed=seed)
