"""How a picture of Pillow is read: uint8 channels, or 16-bit grey that is scaled to them, or a reason why not.

Grey pictures of 16 bits are scaled, 65535 to 255, where they use that range. Any other picture that is not of 8 bits a
channel, grey or RGB, is refused. Pillow would make it fit without a word: palette numbers look like grey, 16-bit grey is
clipped, transparent pixels show whatever colour lies under them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import Image

Images = NDArray[np.uint8]
Pixels = NDArray[np.uint8] | NDArray[np.uint16]
"""(channels, height, width); uint16 for 16-bit grey."""
CHANNELS: Mapping[str, int] = {"L": 1, "RGB": 3}
READ_AS: Mapping[str, str] = {"1": "L", "L": "L", "LA": "L", "P": "RGB", "PA": "RGB", "RGB": "RGB", "RGBA": "RGB"}
"""Pillow's modes that lose nothing -> the mode that they are read as; an alpha channel must be opaque."""
WIDE = ("I;16", "I;16B")
"""Pillow's modes of 16-bit grey; such pictures are read as grey of 8 bits."""
FULL = 0xFFFF
LEAST_USED = 15
"""Bits of 16 that the largest pixel of all images must have; with fewer, scaling would leave some dozen grey levels."""
WITH_ALPHA = ("LA", "PA", "RGBA")
ALLOWED = "grey, palette or RGB of at most 8 bits a channel, or 16-bit grey"
SIXTEEN_BITS = re.compile(r";16[BLN]")
"""In the layout of a file's pixels, as Pillow names it, where the decoder keeps the high byte of 16 bits."""
PHOTOMETRIC, WHITE_IS_ZERO = 262, 0
"""A TIFF's tag and value for inverted grey, which Pillow does not turn round in 16 bits."""
ORIENTATION = 0x0112
"""The EXIF tag by which a camera says how its picture is to be turned; 1 = not at all."""


class Unclear(ValueError):
    """A picture whose pixels have no meaning here, or several."""


def is_picture(value: object) -> bool:
    """Whether a value is a picture of Pillow, which need not be installed."""
    return hasattr(value, "getbands") and hasattr(value, "convert")


def unreadable(image: Image.Image) -> str | None:
    """Why a picture cannot be read, of what is known without its pixels; None where it can."""
    if image.mode in WIDE:
        inverted = getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == WHITE_IS_ZERO
        return "is 16-bit grey whose white is 0; save it with black as 0" if inverted else None
    if image.mode not in READ_AS:
        return f"is of mode {image.mode}; needed: {ALLOWED}"
    if any(SIXTEEN_BITS.search(str(part)) for part in getattr(image, "tile", ())):
        return f"has 16 bits a channel; needed: {ALLOWED}"
    return None


def read_as(image: Image.Image) -> str:
    """The mode of Pillow, of 8 bits a channel, that a readable picture becomes."""
    return "L" if image.mode in WIDE else READ_AS[image.mode]


def pixels_of(image: Image.Image) -> Pixels:
    """The pixels of a readable picture.

    Raises:
        Unclear: some are transparent, or the picture is to be turned.
    """
    image.load()
    if _has_alpha(image) and np.asarray(image.convert("RGBA"))[:, :, 3].min() < 255:
        raise Unclear("has transparent pixels, whose colour is not defined; save it without transparency")
    if (turned := image.getexif().get(ORIENTATION, 1)) != 1:
        raise Unclear(f"is to be turned (EXIF orientation {turned}); save it upright")
    mode = image.mode if image.mode in WIDE else READ_AS[image.mode]
    array = np.asarray(image if image.mode == mode else image.convert(mode))
    return array[None] if array.ndim == 2 else np.moveaxis(array, 2, 0)


def scaled(pixels: Pixels) -> Images:
    """16-bit grey as 8 bits, rounded: 65535 becomes 255."""
    return ((pixels.astype(np.uint32) * 255 + FULL // 2) // FULL).astype(np.uint8)


def too_narrow(largest: Iterable[int]) -> str | None:
    """Why 16-bit pictures with these largest pixels cannot be scaled; None where they can."""
    most = max(largest)
    if (bits := most.bit_length()) >= LEAST_USED:
        return None
    used = f"is 16-bit grey, and all such images use {bits} of the 16 bits (largest pixel {most})"
    return f"{used}; scale them to the range 0 to {FULL}, or to 8 bits"


def _has_alpha(image: Image.Image) -> bool:
    of_palette = getattr(image.palette, "mode", "").endswith("A")
    return image.mode in WITH_ALPHA or "transparency" in image.info or of_palette
