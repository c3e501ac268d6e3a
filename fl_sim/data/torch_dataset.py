"""A map-style `torch.utils.data.Dataset` as arrays: its samples (input, target), read once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from typing import TYPE_CHECKING, cast

import numpy as np
from torch.utils.data import Dataset

from fl_sim.core.errors import USERS_OWN, UserError, error_line
from fl_sim.data.arrays import Array, as_array
from fl_sim.data.pictures import Pixels, Unclear, is_picture, pixels_of, scaled, too_narrow, unreadable

if TYPE_CHECKING:
    from PIL import Image


def is_dataset(value: object) -> bool:
    """Whether a value is a data set of PyTorch."""
    return isinstance(value, Dataset)


def read_dataset(dataset: object, name: str) -> dict[str, object]:
    """Read all samples: inputs and targets. Pictures of Pillow become (N, C, H, W); tensors and arrays are taken as they are.

    Raises:
        UserError: no length, samples that are no pairs or of several shapes, a picture that could be read in several ways,
            or whatever the data set raises.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise UserError(f"data: {name} are a {type(dataset).__name__} without a length; needed: a map-style Dataset")
    inputs: list[Array] = []
    targets: list[Array] = []
    wide: dict[int, int] = {}  # number of a 16-bit picture -> its largest pixel
    try:
        for number in range(len(dataset)):
            one, target = _pair(dataset[number], f"data: {name}: sample {number} of the Dataset")
            if is_picture(one):
                pixels = _pixels(cast("Image.Image", one), f"data: {name}: sample {number} of the Dataset")
                if pixels.dtype != np.uint8:
                    wide[number] = int(pixels.max())
                one = scaled(pixels) if number in wide else pixels
            inputs.append(as_array(one, "inputs"))
            targets.append(as_array(target, "targets"))
    except UserError:
        raise
    except USERS_OWN as error:  # the user's own data set, whatever it raises
        raise UserError(f"data: {name}: sample {len(inputs)} of the Dataset raised {error_line(error)}") from error
    if wide and (why := too_narrow(wide.values())):
        raise UserError(f"data: {name}: sample {min(wide)} of the Dataset {why}")
    for what, some in ((name, inputs), ("targets", targets)):
        if len({one.shape for one in some}) != 1:
            shapes = sorted({str(one.shape) for one in some})[:3]
            raise UserError(f"data: {what} have the shapes {', '.join(shapes) or 'of no samples'}; needed: one shape")
    return {"inputs": np.stack(inputs), "targets": np.stack(targets)}


def _pair(sample: object, where: str) -> tuple[object, object]:
    """A sample as input and target. What unpacks to two other things, such as the keys of a dict, is none."""
    if isinstance(sample, Mapping):
        keys = ", ".join(repr(key) for key in list(sample)[:4])
        raise UserError(f"{where} is a {type(sample).__name__} with the keys {keys}; needed: a pair (input, target)")
    if isinstance(sample, str | bytes | Set) or is_picture(sample):
        raise UserError(f"{where} is of type {type(sample).__name__}; needed: a pair (input, target)")
    one, target = cast("Iterable[object]", sample)
    return one, target


def _pixels(picture: Image.Image, where: str) -> Pixels:
    """Channels first. A picture whose numbers are meant as they are, not as shades, is given as an array."""
    try:
        if why := unreadable(picture):
            raise UserError(f"{where} {why}; or an array, whose numbers are taken as they are")
        return pixels_of(picture)
    except Unclear as error:
        raise UserError(f"{where} {error}") from error
