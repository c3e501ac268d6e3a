"""Compressed images, which anybody may have made, as one uint8 array. `pictures` says how each is read."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from fl_sim.core.errors import in_one_line
from fl_sim.core.parquet import FREE_BYTES
from fl_sim.core.types import UserError
from fl_sim.data.pictures import CHANNELS, Images, Pixels, Unclear, pixels_of, read_as, scaled, too_narrow, unreadable

if TYPE_CHECKING:
    from PIL import Image

MOST_PIXELS = 1 << 22
"""Of one image. A few bytes can declare more; models here take images of some hundred pixels a side."""
MOST_PER_BYTE = 100
"""Bytes that a byte of a file may become, beyond `FREE_BYTES`; those of photographs become ten."""
PIECE = 256
"""Images that a thread decodes before it asks for more."""


Size = tuple[int, int]
"""(height, width)."""


class _Colours(Exception):
    """Colour images among those that were taken for grey, because the first is."""


def decode(
    encoded: Sequence[bytes | None], *, stored: int, where: Callable[[int], str], resize: Size | None = None
) -> tuple[Images, list[str]]:
    """Decode compressed images: uint8 (N, C, H, W), and notes on what was changed.

    Grey images among colour ones get three equal channels.

    Args:
        encoded: the bytes of each image file.
        stored: length of the files that held them.
        where: number of an image -> its file, for messages.
        resize: bring all to this size, bilinear over the area of a pixel; None = all must have one size.

    Raises:
        UserError: names the image that is missing, damaged, of another size, or not grey or RGB of 8 bits a channel; 16-bit
            images use fewer bits; or the images are larger than so many bytes can hold.
    """
    if not encoded:
        raise UserError("data.source: no images")
    shape = _shape(_opened(encoded[0], where(0)), resize)
    try:
        return _decoded(encoded, shape, stored, where, resize)
    except _Colours:
        return _decoded(encoded, (CHANNELS["RGB"], *shape[1:]), stored, where, resize)


def _decoded(
    encoded: Sequence[bytes | None],
    shape: tuple[int, int, int],
    stored: int,
    where: Callable[[int], str],
    resize: Size | None,
) -> tuple[Images, list[str]]:
    expanded, most = len(encoded) * math.prod(shape), FREE_BYTES + MOST_PER_BYTE * stored
    if expanded > most:
        raise UserError(f"data.source: images of {stored} bytes that expand to {expanded}; allowed: {most}")
    images = np.empty((len(encoded), *shape), dtype=np.uint8)
    wide: dict[int, int] = {}  # number of a 16-bit image -> its largest pixel
    grey, resized = list[int](), list[int]()

    def put(start: int) -> None:
        for number in range(start, min(start + PIECE, len(encoded))):
            pixels = _pixels(_opened(encoded[number], where(number)), where(number))
            if pixels.dtype != np.uint8:
                wide[number] = int(pixels.max())
                pixels = scaled(pixels)
            if resize is not None and pixels.shape[1:] != resize:
                resized.append(number)
                pixels = _resized(pixels, resize)
            if pixels.shape[0] > shape[0]:
                raise _Colours
            if pixels.shape[0] < shape[0]:
                grey.append(number)
            if pixels.shape[1:] != shape[1:]:
                first = _shape(_opened(encoded[0], where(0)), None)
                sizes = f"{where(0)} has {first}, {where(number)} has {pixels.shape}"
                raise UserError(
                    f"data.source: images must have one (channels, height, width): {sizes}; data.resize gives them one"
                )
            images[number] = pixels  # a single channel fills all three

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(put, range(0, len(encoded), PIECE)):
            pass
    if wide and (why := too_narrow(wide.values())):
        raise _refusal(where(min(wide)), why)
    notes = [f"{len(grey)} of {len(images)} images are grey, among colour ones: they get three equal channels"]
    size = f"{shape[1]} x {shape[2]} pixels"
    return images, notes * bool(grey) + [f"{len(resized)} of {len(images)} images are resized to {size}"] * bool(
        resized
    )


def _resized(pixels: Pixels, size: Size) -> Images:
    from PIL import Image

    planes = [Image.fromarray(plane).resize((size[1], size[0]), Image.Resampling.BILINEAR) for plane in pixels]
    return np.stack([np.asarray(plane) for plane in planes])


def _opened(data: bytes | None, name: str) -> Image.Image:
    """An image of which only the header was read, and of a kind that can be read."""
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise _refusal(name, "no image: missing" if data is None else "no image: 0 bytes")
    try:
        image = Image.open(io.BytesIO(data))
        several = getattr(image, "is_animated", False)
    except UnidentifiedImageError as error:
        raise _refusal(name, f"no image that is known here ({len(data)} bytes)") from error
    except Exception as error:  # decoders raise whatever a broken file leads them to
        raise _refusal(name, f"cannot be decoded: {in_one_line(error)}") from error
    if image.width * image.height > MOST_PIXELS:
        raise _refusal(name, f"{image.width} x {image.height} pixels; allowed: {MOST_PIXELS}")
    if why := unreadable(image) or ("holds several pictures; needed: one" if several else None):
        raise _refusal(name, why)
    return image


def _shape(image: Image.Image, resize: Size | None) -> tuple[int, int, int]:
    """(channels, height, width)."""
    return (CHANNELS[read_as(image)], *(resize or (image.height, image.width)))


def _pixels(image: Image.Image, name: str) -> Pixels:
    try:
        return pixels_of(image)
    except Unclear as error:
        raise _refusal(name, str(error)) from error
    except Exception as error:  # as above
        raise _refusal(name, f"cannot be decoded: {in_one_line(error)}") from error


def _refusal(name: str, why: str) -> UserError:
    return UserError(f"data.source: {name}: {why}")
