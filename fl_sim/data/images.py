"""Compressed images, which anybody may have made, as one array."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fl_sim.core.parquet import FREE_BYTES
from fl_sim.core.types import UserError

if TYPE_CHECKING:
    from PIL import Image

Images = NDArray[np.uint8]
MOST_PIXELS = 1 << 22
"""Of one image. A few bytes can declare more; models here take images of some hundred pixels a side."""
MOST_PER_BYTE = 100
"""Bytes that a byte of a file may become, beyond `FREE_BYTES`; those of photographs become ten."""
PLAIN_MODES = {"L": 1, "RGB": 3}
"""Pillow's mode -> channels; images of all others become RGB."""


def decode(encoded: Sequence[bytes | None], *, stored: int) -> Images:
    """Compressed images -> uint8 (N, C, H, W); all must have one size and one number of channels.

    `stored` is the length of the files that held them.

    Raises:
        UserError: they have not, one is none, or they are more than so many bytes can hold.
    """
    if not encoded:
        raise UserError("data.source: no images")
    shape = _shape(_opened(encoded[0]))
    expanded, most = len(encoded) * math.prod(shape), FREE_BYTES + MOST_PER_BYTE * stored
    if expanded > most:
        raise UserError(f"data.source: images of {stored} bytes that expand to {expanded}; allowed: {most}")
    images = np.empty((len(encoded), *shape), dtype=np.uint8)

    def put(number: int) -> None:
        image = _opened(encoded[number])
        if _shape(image) != shape:
            sizes = f"(channels, height, width) {shape} and {_shape(image)}"
            raise UserError(f"data.source: images must have one size, found {sizes}")
        try:
            array = np.asarray(image if image.mode in PLAIN_MODES else image.convert("RGB"))
        except Exception as error:  # decoders raise whatever a broken file leads them to
            raise UserError(f"data.source: an image cannot be decoded: {error}") from error
        images[number] = array if array.ndim == 2 else np.moveaxis(array, 2, 0)

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(put, range(len(encoded))):
            pass
    return images


def _opened(data: bytes | None) -> Image.Image:
    """An image of which only the header was read."""
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(data or b""))
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels; allowed: {MOST_PIXELS}")
    except Exception as error:  # as above
        raise UserError(f"data.source: an image cannot be decoded: {error}") from error
    return image


def _shape(image: Image.Image) -> tuple[int, int, int]:
    """(channels, height, width)."""
    return PLAIN_MODES.get(image.mode, 3), image.height, image.width
