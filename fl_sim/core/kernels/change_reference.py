"""Floats as changes of held floats, by bins of the real change: reference in NumPy.

A change is cut into its bin and its place among the floats of that bin. Bins are ranges of magnitudes that start at the same
places for all weights, whatever the size of the weight: `key` is the exponent of the change as float64 and the four bits
below it, and a bin is `2**shift` keys. The floats between the held weight plus one border and the held weight plus the next
are counted in the order of floats. A place therefore takes few bits where floats are far apart, and the frequency of a bin
does not depend on the size of its weight.

Symbols: 0, the same bits; 1, a change below the first border; 2 to 254, the bins from `lowest` on; 255, the float as it is:
a change beyond the last border, NaN, infinity, and whatever the arithmetic of float64 puts into a neighbouring bin.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Words = NDArray[np.uint32]
Keys = NDArray[np.uint16]
Sizes = NDArray[np.int64]

SAME, BELOW, FIRST, WHOLE = 0, 1, 2, 255
BINS = WHOLE - FIRST
MANTISSA, COARSE, FAR = 23, 12, 8
"""Bits below a float's exponent; contexts of weights whose unit in the last place is `2**-FAR` of the typical change or more."""
KEY_SHIFT, FINITE, OTHER_ZERO, SIGN = 48, 0x7FF0, 0x7FFF, 0x80000000


def _real(bits: Words) -> NDArray[np.float64]:
    return bits.view(np.float32).astype(np.float64)


def _in_order(bits: Words) -> Words:
    return np.where(bits & SIGN, ~bits, bits | SIGN).astype(np.uint32)


def _not_below(x: NDArray[np.float64]) -> Words:
    """The first float that is not below each number, by its number in the order of floats; one border among subnormals."""
    near = x.astype(np.float32)
    number = _in_order(near.view(np.uint32)) + (near.astype(np.float64) < x)
    tiny = np.where(x > 0, 0x80800000, 0x7F800000)
    return np.where(np.abs(x) < 2.0**-126, tiny, number).astype(np.uint32)


def _border(symbols: NDArray[np.int64], lowest: int, shift: int) -> NDArray[np.float64]:
    bits = (lowest + symbols - FIRST).astype(np.uint64) << np.uint64(KEY_SHIFT + shift)
    return np.where(symbols < FIRST, np.uint64(0), bits).view(np.float64)


def _bins(base: Words, symbols: NDArray[np.int64], mirror: Words, lowest: int, shift: int) -> tuple[Words, Words]:
    """(number of the first float, floats) of each bin."""
    held = _real(np.where(base & 0x7F800000, base, base & SIGN).astype(np.uint32) ^ mirror)
    first = _not_below(held + _border(symbols, lowest, shift))
    return first, _not_below(held + _border(symbols + 1, lowest, shift)) - first


def _widths(symbols: NDArray[np.int64], spans: Words) -> Bytes:
    bits = np.frexp((spans - np.uint32(1)).astype(np.float64))[1]
    return np.where(symbols == SAME, 0, np.where(symbols == WHOLE, 32, bits)).astype(np.uint8)


def _require(lowest: int, shift: int, *arrays: NDArray[np.generic]) -> None:
    if not 0 <= shift <= 4 or not 0 <= lowest <= (FINITE >> shift) - BINS - FIRST:
        raise ValueError("bins of 0 to 4 bits below the octave, of finite changes")
    if len({len(array) for array in arrays}) != 1:
        raise ValueError("expected arrays of equal length")


def change_keys(values: Words, base: Words, keys: Keys, /) -> None:
    """The key of each change, 0 where there is none.

    Args:
        values, base: bits of float32.
        keys: receives the magnitude of the change as float64 without its sign and its 48 lowest bits.
    """
    _require(0, 4, values, base, keys)
    with np.errstate(invalid="ignore"):
        change = _real(values) - _real(base)
    key = change.view(np.uint64) >> np.uint64(KEY_SHIFT) & np.uint64(0x7FFF)
    keys[:] = np.where(values == base, 0, np.where(key > 0, key, OTHER_ZERO))


def change_cut(
    values: Words,
    base: Words,
    keys: Keys,
    lowest: int,
    shift: int,
    symbols: Bytes,
    signs: Bytes,
    widths: Bytes,
    extra: Words,
    /,
) -> None:
    """Cut changes into symbols and places.

    Args:
        values, base, keys: of `change_keys`.
        lowest: the first bin, in units of `2**shift` keys.
        shift: 0 to 4; bins are `2**(shift - 4)` octaves wide.
        symbols: receives them.
        signs: receives 1 for a negative change that has a place, else 0.
        widths: receives the bits of each place.
        extra: receives the places.
    """
    _require(lowest, shift, values, base, keys, symbols, signs, widths, extra)
    bins = (keys >> shift).astype(np.int64) - lowest
    found = np.where(keys == 0, SAME, np.where(bins < 0, BELOW, np.where(bins >= BINS, WHOLE, bins + FIRST)))
    with np.errstate(all="ignore"):
        mirror = np.where(_real(values) < _real(base), SIGN, 0).astype(np.uint32)
        first, spans = _bins(base, found, mirror, lowest, shift)
    place = _in_order(values ^ mirror) - first
    found = np.where((found != SAME) & (place >= spans), WHOLE, found)
    symbols[:] = found
    signs[:] = np.where((found == SAME) | (found == WHOLE), 0, mirror >> 31)
    widths[:] = _widths(found, spans)
    extra[:] = np.where(found == SAME, 0, np.where(found == WHOLE, values, place))


def change_bins(
    base: Words, symbols: Bytes, signs: Bytes, lowest: int, shift: int, firsts: Words, spans: Words, widths: Bytes, /
) -> bool:
    """The bins of symbols: whether each has a float. Arguments as `change_cut`.

    Args:
        firsts, spans: receive the number of the first float and of all floats of each bin.
        widths: receives the bits of each place.
    """
    _require(lowest, shift, base, symbols, signs, firsts, spans, widths)
    found = symbols.astype(np.int64)
    with np.errstate(all="ignore"):
        first, spans[:] = _bins(base, found, signs.astype(np.uint32) << np.uint32(31), lowest, shift)
    firsts[:] = np.where(found == SAME, base, first)
    widths[:] = _widths(found, spans)
    return bool(((spans > 0) | (found == SAME) | (found == WHOLE)).all())


def change_join(extra: Words, firsts: Words, spans: Words, symbols: Bytes, signs: Bytes, /) -> bool:
    """Invert `change_cut`: places become the bits of floats. Whether each place is in its bin."""
    _require(0, 4, extra, firsts, spans, symbols, signs)
    alone = (symbols == SAME) | (symbols == WHOLE)
    inside = bool((alone | (extra < spans)).all())
    number = firsts + extra
    moved = np.where(number & SIGN, number ^ np.uint32(SIGN), ~number) ^ (signs.astype(np.uint32) << np.uint32(31))
    extra[:] = np.where(symbols == SAME, firsts, np.where(symbols == WHOLE, extra, moved))
    return inside


def change_contexts(base: Words, sizes: Sizes, scales: Bytes, ranks: Bytes, contexts: Bytes, /) -> None:
    """The context of each change, given what it changes.

    Args:
        base: bits of float32, all tensors one after the other.
        sizes: values of each tensor.
        scales: exponent of each tensor's typical change, as a float32 stores it.
        ranks: the context of each tensor's changes where a unit in the last place of the base is far below the typical change;
            elsewhere the context is the distance of the two, from 0 to `COARSE - 1`.
        contexts: receives one for each value.
    """
    if len(base) != len(contexts):
        raise ValueError("expected arrays of equal length")
    if not len(sizes) == len(scales) == len(ranks) or (sizes < 0).any() or sizes.sum() != len(base):
        raise ValueError("a scale and a rank for each tensor, and as many changes as they have")
    distances = np.repeat(scales.astype(np.int64) + MANTISSA, sizes) - (base >> np.uint32(MANTISSA) & np.uint32(255))
    contexts[:] = np.where(distances < FAR, np.maximum(0, distances + COARSE - FAR), np.repeat(ranks, sizes))
