"""Compressed images, which anybody may have made, as one uint8 array.

Grey images of 16 bits are scaled, 65535 to 255, where they use that range. Any other image that is not of 8 bits a channel,
grey or RGB, is refused by name. Pillow would make it fit without a word: 16-bit grey is clipped, transparent pixels show
whatever colour lies under them.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fl_sim.core.errors import in_one_line
from fl_sim.core.parquet import FREE_BYTES
from fl_sim.core.types import UserError

if TYPE_CHECKING:
    from PIL import Image

Images = NDArray[np.uint8]
MOST_PIXELS = 1 << 22
"""Of one image. A few bytes can declare more; models here take images of some hundred pixels a side."""
MOST_PER_BYTE = 100
"""Bytes that a byte of a file may become, beyond `FREE_BYTES`; those of photographs become ten."""
CHANNELS: Mapping[str, int] = {"L": 1, "RGB": 3}
READ_AS: Mapping[str, str] = {"1": "L", "L": "L", "LA": "L", "P": "RGB", "PA": "RGB", "RGB": "RGB", "RGBA": "RGB"}
"""Pillow's modes that lose nothing -> the mode that they are read as; an alpha channel must be opaque."""
WIDE = ("I;16", "I;16B")
"""Pillow's modes of 16-bit grey; such images are read as grey of 8 bits."""
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
    if wide and (bits := max(wide.values()).bit_length()) < LEAST_USED:
        first = _refusal(where(min(wide)), f"is 16-bit grey, and all such images use {bits} of the 16 bits")
        raise UserError(
            f"{first} (largest pixel {max(wide.values())}); scale them to the range 0 to {FULL}, or to 8 bits"
        )
    notes = [f"{len(grey)} of {len(images)} images are grey, among colour ones: they get three equal channels"]
    size = f"{shape[1]} x {shape[2]} pixels"
    return images, notes * bool(grey) + [f"{len(resized)} of {len(images)} images are resized to {size}"] * bool(
        resized
    )


def _resized(pixels: Images | NDArray[np.uint16], size: Size) -> Images:
    from PIL import Image

    planes = [Image.fromarray(plane).resize((size[1], size[0]), Image.Resampling.BILINEAR) for plane in pixels]
    return np.stack([np.asarray(plane) for plane in planes])


def scaled(pixels: Images | NDArray[np.uint16]) -> Images:
    """16-bit grey as 8 bits, rounded: 65535 becomes 255."""
    return ((pixels.astype(np.uint32) * 255 + FULL // 2) // FULL).astype(np.uint8)


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
    if several:
        raise _refusal(name, "holds several pictures; needed: one")
    if image.mode in WIDE:
        if getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == WHITE_IS_ZERO:
            raise _refusal(name, "is 16-bit grey whose white is 0; save it with black as 0")
        return image
    if image.mode not in READ_AS:
        raise _refusal(name, f"is of mode {image.mode}; needed: {ALLOWED}")
    if any(SIXTEEN_BITS.search(str(part)) for part in image.tile):
        raise _refusal(name, f"has 16 bits a channel; needed: {ALLOWED}")
    return image


def _shape(image: Image.Image, resize: Size | None) -> tuple[int, int, int]:
    """(channels, height, width)."""
    return (CHANNELS[_read_as(image)], *(resize or (image.height, image.width)))


def _read_as(image: Image.Image) -> str:
    return "L" if image.mode in WIDE else READ_AS[image.mode]


def _pixels(image: Image.Image, name: str) -> Images | NDArray[np.uint16]:
    """uint8 (C, H, W); uint16 for 16-bit grey."""
    try:
        image.load()
        turned = image.getexif().get(ORIENTATION, 1)
        see_through = _has_alpha(image) and np.asarray(image.convert("RGBA"))[:, :, 3].min() < 255
        mode = image.mode if image.mode in WIDE else READ_AS[image.mode]
        array = np.asarray(image if image.mode == mode else image.convert(mode))
    except Exception as error:  # as above
        raise _refusal(name, f"cannot be decoded: {in_one_line(error)}") from error
    if see_through:
        raise _refusal(name, "has transparent pixels, whose colour is not defined; save it without transparency")
    if turned != 1:
        raise _refusal(name, f"is to be turned (EXIF orientation {turned}); save it upright")
    return array[None] if array.ndim == 2 else np.moveaxis(array, 2, 0)


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in WITH_ALPHA or "transparency" in image.info


def _refusal(name: str, why: str) -> UserError:
    return UserError(f"data.source: {name}: {why}")
