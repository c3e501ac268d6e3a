"""What a client keeps from round to round: tensors in the state of its node, which every Flower runtime carries.

residual = kept_tensors(context, RESIDUAL)      # fresh copies; {} where nothing was kept
keep(context, RESIDUAL, {RESIDUAL: left_out})
"""

from __future__ import annotations

import torch
from flwr.app import ArrayRecord, Context
from torch import Tensor

from fl_sim.communication.flower_private import filled
from fl_sim.communication.kept_arrays import array_from, values_of

STATE, MASK, FROZEN, PERSONAL = "fl_sim.state", "fl_sim.mask", "fl_sim.frozen", "fl_sim.personal"
RESIDUAL, CODEC_STATE = "fl_sim.residual", "fl_sim.codec"
MODEL, VERSION = "fl_sim.model", "version"


def kept_tensors(context: Context, key: str) -> dict[str, Tensor]:
    """A client's kept tensors under `key`; fresh copies."""
    if not len(context.state) or key not in context.state:  # the rule; Flower's `get` raises and catches
        return {}
    record = context.state[key]
    items = record.items() if isinstance(record, ArrayRecord) else ()
    return {name: torch.from_numpy(values_of(array)) for name, array in items}


def keep(context: Context, key: str, tensors: dict[str, Tensor]) -> None:
    """Keep tensors in the node's state, which every Flower runtime carries from round to round."""
    if tensors or key in context.state:
        arrays: dict[str, object] = {name: array_from(value.detach().cpu().numpy()) for name, value in tensors.items()}
        context.state[key] = filled(ArrayRecord, arrays)
