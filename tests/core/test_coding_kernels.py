"""The codecs' loops: the compiled form and NumPy write the same bytes, invert what they wrote, and stay in their buffers."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from properties import examples

from fl_sim.codecs import context_coding
from fl_sim.core import kernels
from fl_sim.core.kernels import coding, coding_reference, mask_reference, rounding_reference

reference = SimpleNamespace(**{**vars(coding_reference), **vars(mask_reference), **vars(rounding_reference)})
FORMS = (coding, reference)


def test_both_modules_of_the_package_are_compiled_or_neither_is() -> None:
    assert coding.FORM == kernels.FORM


def table(counts: np.ndarray, bits: int) -> np.ndarray:
    """Slots that sum to 2**bits, at least one for every symbol that occurs."""
    slots = np.where(counts > 0, 1 + counts * ((1 << bits) - 256) // max(1, counts.sum()), 0)
    slots[np.argmax(slots)] += ((1 << bits) - slots.sum()) * bool(slots.any())
    return slots.astype(np.uint16)


@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(0, 600),
    kinds=st.integers(1, 5),
    bits=st.integers(8, 12),
    lanes=st.sampled_from([1, 2, 4, 8, 16, 32, 256]),
    spread=st.sampled_from([0.01, 2.0, 60.0]),
)
@settings(deadline=None, max_examples=examples(60))
def test_symbols_come_back_from_the_same_bytes(seed, size, kinds, bits, lanes, spread) -> None:
    rng = np.random.default_rng(seed)
    symbols = np.minimum(np.abs(rng.normal(0, spread, size)), 255).astype(np.uint8)
    contexts = rng.integers(0, kinds, size).astype(np.uint8)
    counts = [np.zeros(256 * kinds, np.int64) for _ in FORMS]
    ends = rng.integers(0, 2**16, lanes).astype(np.uint16)
    codes = []
    for form, found in zip(FORMS, counts, strict=True):
        form.count_symbols(symbols, contexts, found)
        tables = np.concatenate([table(row, bits) for row in found.reshape(kinds, 256)])
        out = np.zeros(2 * size + 4 * lanes, np.uint8)
        codes.append(out[form.rans_encode(symbols, contexts, tables, bits, ends, out) :])
    assert codes[0].tobytes() == codes[1].tobytes()
    assert counts[0].tolist() == counts[1].tolist()
    assert counts[0].sum() == size
    damaged = codes[0].copy()
    damaged[-1] ^= 1
    for form in FORMS:
        back, found = np.zeros(size, np.uint8), np.zeros(lanes, np.uint16)
        assert form.rans_decode(codes[0], contexts, tables, bits, found, back) == 1
        assert back.tolist() == symbols.tolist()
        assert found.tolist() == ends.tolist()
        for other in (damaged, codes[0][:-2], np.append(codes[0], np.zeros(2, np.uint8))):
            fine = form.rans_decode(other, contexts, tables, bits, found, back)
            # A damaged bit may make a code of other symbols, or of other numbers in the lanes.
            other_code = (found != ends).any() or (back != symbols).any()
            assert not fine or (len(other) == len(damaged) and other_code)


@pytest.mark.parametrize("lanes", [4, 8, 16, 64])
@pytest.mark.parametrize("spread", [0.3, 40.0])
def test_lanes_that_are_coded_at_once_write_the_same_bytes(lanes: int, spread: float) -> None:
    rng = np.random.default_rng(lanes)
    symbols = np.minimum(np.abs(rng.normal(0, spread, 3003)), 255).astype(np.uint8)
    contexts, ends = rng.integers(0, 2, 3003).astype(np.uint8), rng.integers(0, 2**16, lanes).astype(np.uint16)
    for bits in (8, 10, 12):
        codes = []
        for form in FORMS:
            counts, out = np.zeros(512, np.int64), np.zeros(2 * 3003 + 4 * lanes, np.uint8)
            form.count_symbols(symbols, contexts, counts)
            tables = np.concatenate([table(row, bits) for row in counts.reshape(2, 256)])
            codes.append(out[form.rans_encode(symbols, contexts, tables, bits, ends, out) :].tobytes())
        assert codes[0] == codes[1]


@given(
    seed=st.integers(0, 2**32 - 1),
    blocks=st.lists(st.integers(0, 40), max_size=5),
    top=st.sampled_from([1, 7, 127]),
    spread=st.sampled_from([1e-30, 1.0, 1e30]),
)
@settings(deadline=None, max_examples=examples(60))
def test_integers_are_rounded_and_scaled_alike(seed: int, blocks: list[int], top: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    sizes, size = np.array(blocks, np.int64), sum(blocks)
    values = (spread * rng.normal(size=size)).astype(np.float32)
    units = (spread * rng.random(len(blocks)) + 1e-38).astype(np.float32)
    noise, made = rng.integers(0, 2**32, size, dtype=np.uint32), []
    for form in FORMS:
        symbols, back, sums = np.zeros(size, np.uint8), np.zeros(size, np.float32), np.zeros(len(blocks), np.int64)
        form.round_blocks(values, noise, units, sizes, top, symbols)
        form.scale_blocks(symbols, units, sizes, back)
        form.block_sums(symbols, sizes, sums)
        made.append((symbols.tolist(), back.tolist(), sums.tolist()))
    assert made[0] == made[1]
    unit = np.repeat(units, sizes)
    inside = np.abs(values) <= (top - 1) * unit
    assert (np.abs(back - values)[inside] <= 1.001 * unit[inside]).all()


@given(seed=st.integers(0, 2**32 - 1), size=st.integers(0, 200), most=st.integers(0, 32))
@settings(deadline=None, max_examples=examples(60))
def test_bits_of_any_width_come_back(seed: int, size: int, most: int) -> None:
    rng = np.random.default_rng(seed)
    widths = rng.integers(0, most + 1, size).astype(np.uint8)
    values = rng.integers(0, 2**32, size, dtype=np.uint32)
    kept = [value & ((1 << width) - 1) for value, width in zip(values.tolist(), widths.tolist(), strict=True)]
    half, streams = size // 2, []
    for form in FORMS:
        out = np.zeros(4 * size, np.uint8)
        streams.append(out[: form.pack_bits(values, widths, out)])
    assert streams[0].tobytes() == streams[1].tobytes()
    for form in FORMS:
        back = np.zeros(size, np.uint32)
        form.unpack_bits(streams[0], 0, widths, back)
        assert back.tolist() == kept
        form.unpack_bits(streams[0], int(widths[:half].sum()), widths[half:], back[half:])
        assert back.tolist() == kept


@pytest.mark.parametrize(("width", "mantissa"), [(32, 23), (16, 10), (16, 7)])
def test_differences_of_floats_are_exact_and_count_the_floats_between(width: int, mantissa: int) -> None:
    rng = np.random.default_rng(width + mantissa)
    sign, top = 1 << (width - 1), (1 << (width - 1 - mantissa)) - 1 << mantissa
    special = [0, sign, 1, sign | 1, top, sign | top, top | 1, 2 * sign - 1, sign - 1]
    values = np.array([*special, *rng.integers(0, 2 * sign, 500)], dtype=np.uint32)
    base = np.where(rng.random(len(values)) < 0.3, values, rng.permutation(values)).astype(np.uint32)
    made = []
    for form in FORMS:
        lengths, exponents, extra = (np.zeros(len(values), t) for t in (np.uint8, np.uint8, np.uint32))
        form.float_split(values, base, width, mantissa, lengths, exponents, extra)
        made.append((lengths.tolist(), exponents.tolist(), extra.tolist()))
        form.float_join(extra, base, lengths, width)
        assert extra.tolist() == values.tolist()
    assert made[0] == made[1]
    one = np.array([sign | 0], np.uint32), np.array([0], np.uint32)  # -0 is one below 0
    coding.float_split(*one, width, mantissa, lengths[:1], exponents[:1], extra[:1])
    assert (lengths[0], extra[0]) == (1, 1)


def refused(form) -> None:
    kinds = (np.uint8, np.uint16, np.uint32, np.int64, np.float32)
    u8, u16, u32, i64, f32 = (lambda n, t=t: np.zeros(n, t) for t in kinds)
    full = u16(256)
    full[0] = 256
    for call in (
        lambda: form.rans_encode(u8(3), u8(2), full, 8, u16(1), u8(99)),
        lambda: form.rans_encode(u8(3), u8(3), full, 8, u16(1), u8(9)),
        lambda: form.rans_encode(u8(3), u8(3) + np.uint8(1), full, 8, u16(1), u8(99)),
        lambda: form.rans_encode(u8(3), u8(3), full + np.uint16(1), 8, u16(1), u8(99)),
        lambda: form.rans_encode(u8(3) + np.uint8(1), u8(3), full, 8, u16(1), u8(99)),
        lambda: form.rans_encode(u8(3), u8(3), full[:255], 8, u16(1), u8(99)),
        lambda: form.rans_encode(u8(3), u8(3), full, 13, u16(1), u8(99)),
        lambda: form.rans_encode(u8(3), u8(3), full, 8, u16(3), u8(99)),
        lambda: form.rans_decode(u8(9), u8(2), full, 8, u16(1), u8(3)),
        lambda: form.rans_decode(u8(9), u8(3) + np.uint8(1), full, 8, u16(1), u8(3)),
        lambda: form.rans_decode(u8(9), u8(3), full, 8, u16(512), u8(3)),
        lambda: form.count_symbols(u8(3), u8(3) + np.uint8(1), i64(256)),
        lambda: form.count_symbols(u8(3), u8(3), i64(255)),
        lambda: form.pack_bits(u32(2), u8(2) + np.uint8(33), u8(99)),
        lambda: form.pack_bits(u32(2), u8(2) + np.uint8(8), u8(1)),
        lambda: form.unpack_bits(u8(2), 1, u8(2) + np.uint8(8), u32(2)),
        lambda: form.unpack_bits(u8(2), -1, u8(2), u32(2)),
        lambda: form.unpack_bits(u8(2), 2**62, u8(2), u32(2)),
        lambda: form.round_blocks(f32(2), u32(3), f32(1) + 1, i64(1) + 2, 7, u8(2)),
        lambda: form.round_blocks(f32(2), u32(2), f32(1) + 1, i64(1) + 3, 7, u8(2)),
        lambda: form.round_blocks(f32(2), u32(2), f32(2) + 1, i64(1) + 2, 7, u8(2)),
        lambda: form.round_blocks(f32(2), u32(2), f32(1) + 1, i64(1) + 2, 128, u8(2)),
        lambda: form.scale_blocks(u8(2), f32(1), i64(1) + 1, f32(2)),
        lambda: form.scale_blocks(u8(2), f32(2), i64(2) + np.array([-1, 3]), f32(2)),
        lambda: form.block_sums(u8(2), i64(1) + 2, i64(2)),
        lambda: form.float_split(u32(2), u32(3), 32, 23, u8(2), u8(2), u32(2)),
        lambda: form.float_split(u32(2), u32(2), 64, 52, u8(2), u8(2), u32(2)),
        lambda: form.float_join(u32(2), u32(2), u8(2) + np.uint8(17), 16),
    ):
        with pytest.raises(ValueError):
            call()


@pytest.mark.parametrize("form", FORMS, ids=["chosen", "NumPy"])
def test_what_would_leave_a_buffer_is_refused(form) -> None:
    refused(form)
    empty = np.zeros(256, np.uint16)
    assert (
        form.rans_decode(
            np.zeros(9, np.uint8), np.zeros(3, np.uint8), empty, 8, np.zeros(1, np.uint16), np.zeros(3, np.uint8)
        )
        == 0
    )


@pytest.mark.skipif(coding.FORM != "compiled", reason="no C compiler here")
def test_other_element_types_are_refused() -> None:
    with pytest.raises(ValueError, match="expected aligned arrays"):
        coding.count_symbols(np.zeros(3, np.int16), np.zeros(3, np.uint8), np.zeros(256, np.int64))
    with pytest.raises((BufferError, ValueError), match="contiguous"):
        coding.pack_bits(np.zeros(3, np.uint32)[::2], np.zeros(2, np.uint8), np.zeros(9, np.uint8))


@given(
    shapes=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4), st.sampled_from([1, 3, 9, 12])), max_size=4),
    density=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=examples(40))
def test_masks_come_back_from_the_same_bytes(shapes, density: float, seed: int) -> None:
    squash, stretch = context_coding._logistic()
    sizes = [int(np.prod(shape)) for shape in shapes]
    bits = (np.random.default_rng(seed).random(sum(sizes)) < density).astype(np.uint8)
    ones = np.array([part.sum() for part in np.split(bits, np.cumsum(sizes)[:-1])] if sizes else [], np.int64)
    told, codes = np.array(shapes, np.int64).reshape(-1), []
    for form in FORMS:
        out = np.zeros(4 * len(bits) + 9, np.uint8)
        codes.append(out[: form.mask_encode(bits, told, ones, squash, stretch, out)])
        assert form.mask_encode(bits, told, ones, squash, stretch, out[: len(codes[-1])]) == len(codes[-1])
        assert form.mask_encode(bits, told, ones, squash, stretch, out[: len(codes[-1]) - 1]) == -1
    assert codes[0].tobytes() == codes[1].tobytes()
    partly = np.concatenate([np.full(n, 0 < k < n) for n, k in zip(sizes, ones.tolist(), strict=True)] or [bits > 1])
    for form in FORMS:
        back = np.zeros(len(bits), np.uint8)
        assert form.mask_decode(codes[0], told, ones, squash, stretch, back) == 1
        assert back.tolist() == (bits * partly).tolist()
        assert form.mask_decode(codes[0][:-1], told, ones, squash, stretch, back) == 0
        assert form.mask_decode(np.append(codes[0], np.uint8(0)), told, ones, squash, stretch, back) == 0


@pytest.mark.parametrize("form", FORMS, ids=["chosen", "NumPy"])
def test_masks_that_do_not_fit_their_shapes_are_refused(form) -> None:
    squash, stretch = context_coding._logistic()
    bits, out = np.zeros(6, np.uint8), np.zeros(99, np.uint8)
    for shape, ones in (
        ([2, 3], [1]),
        ([2, 3, 2], [1]),
        ([-2, -3, 1], [1]),
        ([2, 3, 1], [7]),
        ([2**40, 2**40, 0], [0]),
    ):
        given = np.array(shape, np.int64), np.array(ones, np.int64)
        with pytest.raises(ValueError):
            form.mask_encode(bits, *given, squash, stretch, out)
        with pytest.raises(ValueError):
            form.mask_decode(out, *given, squash, stretch, bits)
    with pytest.raises(ValueError):
        form.mask_encode(bits, np.array([2, 3, 1]), np.array([1]), squash[1:], stretch, out)


def test_the_logistic_function_and_its_inverse_are_those_of_mathematics() -> None:
    squash, stretch = context_coding._logistic()
    logits = np.arange(-3072, 3073) / 256
    assert np.abs(squash - (65536 / (1 + np.exp(-logits))).clip(1, 65535)).max() <= 1
    missed = squash[stretch + 3072].astype(np.int64) - (16 * np.arange(4096) + 8)
    assert missed.min() >= 0
    assert missed.max() <= 64  # a step of the logit where the function is steepest
