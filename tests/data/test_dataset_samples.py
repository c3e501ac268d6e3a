"""Samples of a `Dataset`: pictures of Pillow mean what they show, and what is no pair is refused."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from fl_sim.core.types import UserError
from fl_sim.data import Data

SHADES = np.stack([np.stack([np.roll(np.arange(30, dtype=np.uint8) * 8, k)] * 5) for k in range(3)], 2)
"""(5, 30, 3): thirty colours, each once in a row."""
COLOURS = Image.fromarray(SHADES)
GREYS = Image.fromarray(SHADES[:, :, 0].copy())
PALETTE = COLOURS.quantize(64)
RGB_OF_PALETTE = np.asarray(PALETTE.convert("RGB")).transpose(2, 0, 1)
GREY, WIDE = SHADES[None, :, :, 0], SHADES[:, :, 0].astype(np.uint16)


class Samples(Dataset[object]):
    def __init__(self, *samples: object) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return 30

    def __getitem__(self, number: int) -> object:
        return self.samples[min(number, len(self.samples) - 1)]


READ: Mapping[str, tuple[Image.Image, np.ndarray]] = {
    "palette": (PALETTE, RGB_OF_PALETTE),
    "opaque RGBA": (COLOURS.convert("RGBA"), SHADES.transpose(2, 0, 1)),
    "opaque LA": (GREYS.convert("LA"), GREY),
    "opaque PA": (PALETTE.convert("PA"), RGB_OF_PALETTE),
    "1 bit": (Image.fromarray(GREY[0] > 99), (GREY > 99) * np.uint8(255)),
    "16 bits": (Image.fromarray(WIDE * 250), np.round(GREY * (250.0 / 257)).astype(np.uint8)),
}


@pytest.mark.parametrize("kind", READ)
def test_pictures_are_read_as_those_of_a_folder(kind: str) -> None:
    picture, shown = READ[kind]
    data = Data.of(Samples((picture, 0)), num_classes=2, validation=0)
    assert torch.equal(data.train.images[0], torch.from_numpy(shown.copy()))


def see_through(mode: str) -> Image.Image:
    made = COLOURS.convert("RGBA")
    made.putpixel((1, 1), (9, 9, 9, 7))
    return made.convert(mode)


def palette_with_alpha() -> Image.Image:
    made = Image.new("P", (30, 5))
    made.putpalette([9, 9, 9, 7] * 256, "RGBA")
    return made


def turned() -> Image.Image:
    made = COLOURS.copy()
    made.getexif()[0x0112] = 6
    return made


UNCLEAR: Mapping[str, tuple[Image.Image, str]] = {
    "CMYK": (COLOURS.convert("CMYK"), "sample 3 of the Dataset is of mode CMYK; needed: grey, palette or RGB"),
    "YCbCr": (COLOURS.convert("YCbCr"), "mode YCbCr"),
    "fractions": (GREYS.convert("F"), "mode F; .*; or an array, whose numbers are taken as they are"),
    "32 bits": (GREYS.convert("I"), "mode I;"),
    "transparent": (see_through("RGBA"), "sample 3 of the Dataset has transparent pixels"),
    "transparent LA": (see_through("LA"), "transparent pixels"),
    "palette with alpha": (palette_with_alpha(), "transparent pixels"),
    "dark 16 bits": (Image.fromarray(WIDE), r"sample 3 of the Dataset is 16-bit grey, .* \(largest pixel 232\)"),
    "turned": (turned(), "is to be turned"),
}


@pytest.mark.parametrize("kind", UNCLEAR)
def test_a_picture_with_several_readings_is_refused(kind: str) -> None:
    picture, why = UNCLEAR[kind]
    with pytest.raises(UserError, match=why):
        Data.of(Samples((GREYS, 0), (GREYS, 0), (GREYS, 0), (picture, 0)), num_classes=2)


@pytest.mark.parametrize("inputs", [[COLOURS] * 30, Samples(([GREYS, GREYS], 0))], ids=["a list", "pairs of pictures"])
def test_lists_of_pictures_are_refused(inputs: object) -> None:
    """NumPy would read palette numbers, and put channels last."""
    with pytest.raises(UserError, match=r"inputs are a list of pictures of Pillow; needed: .* a Dataset of pairs"):
        Data.of(inputs, [0, 1] * 15 if isinstance(inputs, list) else None, num_classes=2)


@pytest.mark.parametrize(
    ("sample", "why"),
    [
        ({"x": GREY, "y": 0}, "inputs: sample 0 of the Dataset is a dict with the keys 'x', 'y'; needed: a pair"),
        ("ab", "sample 0 of the Dataset is of type str; needed: a pair"),
        ({1, 2}, "is of type set"),
        (GREYS, "is of type Image"),
    ],
)
def test_a_sample_that_merely_unpacks_to_two_things_is_refused(sample: object, why: str) -> None:
    with pytest.raises(UserError, match=why):
        Data.of(Samples(sample))
