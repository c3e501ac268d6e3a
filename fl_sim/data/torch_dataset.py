"""A map-style `torch.utils.data.Dataset` as arrays: its samples (input, target), read once."""

from __future__ import annotations

import numpy as np
from torch.utils.data import Dataset

from fl_sim.core.errors import USERS_OWN, UserError, error_line
from fl_sim.data.arrays import Array, as_array


def is_dataset(value: object) -> bool:
    """Whether a value is a data set of PyTorch."""
    return isinstance(value, Dataset)


def read_dataset(dataset: object, name: str) -> dict[str, object]:
    """Read all samples: inputs and targets. Pictures of Pillow become (N, C, H, W); tensors and arrays are taken as they are.

    Raises:
        UserError: no length, samples that are no pairs or of several shapes, or whatever the data set raises.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise UserError(f"data: {name} are a {type(dataset).__name__} without a length; needed: a map-style Dataset")
    inputs: list[Array] = []
    targets: list[Array] = []
    try:
        for number in range(len(dataset)):
            one, target = dataset[number]
            inputs.append(_as_chw(one))
            targets.append(as_array(target, "targets"))
    except UserError:
        raise
    except USERS_OWN as error:  # the user's own data set, whatever it raises
        raise UserError(f"data: {name}: sample {len(inputs)} of the Dataset raised {error_line(error)}") from error
    for what, some in ((name, inputs), ("targets", targets)):
        if len({one.shape for one in some}) != 1:
            shapes = sorted({str(one.shape) for one in some})[:3]
            raise UserError(f"data: {what} have the shapes {', '.join(shapes) or 'of no samples'}; needed: one shape")
    return {"inputs": np.stack(inputs), "targets": np.stack(targets)}


def _as_chw(one: object) -> Array:
    """An input as an array; a picture of Pillow, (height, width, channels), with its channels first."""
    made = as_array(one, "inputs")
    if not hasattr(one, "getbands"):
        return made
    return made[None] if made.ndim == 2 else np.moveaxis(made, 2, 0)
