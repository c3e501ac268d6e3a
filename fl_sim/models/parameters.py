"""How parameters enter and leave a model: `snapshot` and `load`."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fl_sim.core.types import FlatParams, Params

COUNTER = "num_batches_tracked"


def entries(model: nn.Module) -> dict[str, Tensor]:
    """State-dict entries that federations know, not copied. `num_batches_tracked` counts one process's batches: it stays."""
    return {name: value for name, value in model.state_dict(keep_vars=True).items() if not name.endswith(COUNTER)}


def snapshot(model: nn.Module, names: Iterable[str] | None = None) -> FlatParams:
    """Detached CPU copies of a model's state as views of one float32 buffer: all of it in state-dict order, or these `names`.

    `snapshot(model, task.params)` has the order in which updates are encoded, and spares the encoder a copy of the model.
    """
    own = entries(model)
    return FlatParams.pack({name: own[name].detach().cpu() for name in (own if names is None else names)})


def load(model: nn.Module, params: Params) -> nn.Module:
    """Copy parameters into a resident model, in place, and return it. Names that `params` lacks keep their values.

    Raises:
        ValueError: a name that the model does not have, or another shape.
    """
    own = entries(model)
    for name, value in params.items():
        if name not in own:
            raise ValueError(f"the model has no entry {name!r}")
        if own[name].shape != value.shape:
            raise ValueError(f"{name!r} has shape {tuple(value.shape)}, the model's has {tuple(own[name].shape)}")
    if params:  # the copy refuses empty lists
        with torch.no_grad():
            torch._foreach_copy_([own[name] for name in params], list(params.values()))
    return model
