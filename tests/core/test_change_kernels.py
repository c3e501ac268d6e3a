"""Floats as changes of held floats: the compiled form and NumPy cut them alike, and put each together again from its bin."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fl_sim.core.kernels import change_reference as reference
from fl_sim.core.kernels import coding
from fl_sim.core.kernels.change_reference import BELOW, BINS, FINITE, FIRST, SAME, WHOLE

FORMS = (coding, reference)
SPECIAL = np.array(
    [0, 1 << 31, 1, 0x80000001, 0x007FFFFF, 0x00800000, 0x80800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000,
     0x7FC00001, 0xFFFFFFFF, 0x3F800000, 0xBF800000, 0x3F7FFFFF, 0x3F800001],
    dtype=np.uint32,
)  # fmt: skip


def floats(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Bits of (values, what they change)."""
    rng = np.random.default_rng(len(kind))
    if kind == "special":
        values, base = (part.ravel() for part in np.meshgrid(SPECIAL, SPECIAL))
    elif kind == "any":
        values, base = (rng.integers(0, 2**32, 4000, dtype=np.uint32) for _ in range(2))
    else:
        old = rng.normal(0, 0.05, 4000).astype(np.float32)
        old[::7] *= np.float32(1e-38)
        size = {"large": 2.0, "usual": 0.04, "of a unit in the last place": 2.0**-23}[kind]
        new = old + (rng.normal(0, 0.05 * size, 4000) * rng.integers(0, 2, 4000)).astype(np.float32)
        new[::50] = 0
        values, base = new.view(np.uint32), old.view(np.uint32)
    return np.ascontiguousarray(values), np.ascontiguousarray(base)


def cut(form, values: np.ndarray, base: np.ndarray, lowest: int, shift: int) -> tuple[np.ndarray, ...]:
    n = len(values)
    keys, symbols, signs = np.zeros(n, np.uint16), np.zeros(n, np.uint8), np.zeros(n, np.uint8)
    widths, places = np.zeros(n, np.uint8), np.zeros(n, np.uint32)
    form.change_keys(values, base, keys)
    form.change_cut(values, base, keys, lowest, shift, symbols, signs, widths, places)
    return keys, symbols, signs, widths, places


@pytest.mark.parametrize("shift", [0, 2, 4])
@pytest.mark.parametrize("kind", ["special", "any", "large", "usual", "of a unit in the last place"])
def test_every_float_comes_back_whatever_the_bins_are(kind: str, shift: int) -> None:
    values, base = floats(kind)
    n = len(values)
    for lowest in (0, (16 * 1000 >> shift), (FINITE >> shift) - BINS - FIRST):
        made = [cut(form, values, base, lowest, shift) for form in FORMS]
        assert all(np.array_equal(mine, other) for mine, other in zip(*made, strict=True))
        _, symbols, signs, widths, places = made[0]
        bins = []
        for form in FORMS:
            firsts, spans, again = np.zeros(n, np.uint32), np.zeros(n, np.uint32), np.zeros(n, np.uint8)
            assert form.change_bins(base, symbols, signs, lowest, shift, firsts, spans, again)
            back = places.copy()
            assert form.change_join(back, firsts, spans, symbols, signs)
            assert back.tolist() == values.tolist()
            assert again.tolist() == widths.tolist()
            bins.append((firsts, spans))
        assert all(np.array_equal(mine, other) for mine, other in zip(*bins, strict=True))
        placed = (symbols != SAME) & (symbols != WHOLE)
        assert all(places[placed] < spans[placed])
        assert np.array_equal(values == base, symbols == SAME)


def test_a_bin_has_the_floats_between_its_borders_and_no_others() -> None:
    """Weights of any size moved by 1 to 1 + 1/16: the bin of 1 holds exactly the floats of that range."""
    old = np.array([0.0, 1e-20, 0.3, -0.3, 0.9, -1.03, 100.0, 3e7], np.float32)
    one, shift = 16 * 1023, 0
    lowest = one - 3
    symbol = np.full(len(old), one - lowest + FIRST, np.uint8)
    for sign in (0, 1):
        firsts, spans, widths = np.zeros(8, np.uint32), np.zeros(8, np.uint32), np.zeros(8, np.uint8)
        signs = np.full(8, sign, np.uint8)
        fine = coding.change_bins(old.view(np.uint32), symbol, signs, lowest, shift, firsts, spans, widths)
        assert not fine, "3e7 has no float at a distance of 1"
        assert spans[-1] == 0
        for place in (np.zeros(8, np.uint32), spans - np.uint32(1)):
            made = place.copy()
            coding.change_join(made, firsts, spans, symbol, signs)
            moved = made.view(np.float32).astype(np.float64) - old.astype(np.float64)
            moved = (-moved if sign else moved)[:-1]
            assert (moved >= 1).all()
            assert (moved < 1 + 1 / 16).all()
            outward = np.nextafter(
                made.view(np.float32)[:-1], np.float32(math.inf) * (1 if (place.any() != bool(sign)) else -1)
            )
            beyond = np.abs(outward.astype(np.float64) - old[:-1].astype(np.float64))
            assert ((beyond < 1) | (beyond >= 1 + 1 / 16)).all()


def test_what_is_not_in_its_bin_is_said() -> None:
    old = np.ones(1, np.float32).view(np.uint32)
    symbols, signs = np.full(1, BELOW, np.uint8), np.zeros(1, np.uint8)
    for form in FORMS:
        firsts, spans, widths = np.zeros(1, np.uint32), np.zeros(1, np.uint32), np.zeros(1, np.uint8)
        assert form.change_bins(old, symbols, signs, 16 * 1000, 0, firsts, spans, widths)
        assert form.change_join(spans - np.uint32(1), firsts, spans, symbols, signs)
        assert not form.change_join(spans.copy(), firsts, spans, symbols, signs)


def test_a_context_is_the_distance_of_a_weights_last_place_from_its_tensors_change() -> None:
    """Exponents of 1.0 (127) and others against scales; a unit in the last place lies 23 below the exponent."""
    base = np.array([1.0, -1.0, 2.0, 2.0**-40, 0.0, 1.0, 1.0, 1.0], np.float32).view(np.uint32)
    sizes, scales = np.array([5, 0, 2, 1], np.int64), np.array([111, 9, 255, 0], np.uint8)
    found = []
    for form in FORMS:
        contexts = np.zeros(8, np.uint8)
        form.change_contexts(base, sizes, scales, np.array([12, 13, 14, 15], np.uint8), contexts)
        found.append(contexts.tolist())
    # 111 - (127 - 23) = 7 is below 8: 7 + 4; the other sign alike; one more exponent one less; far above; above; and 0 at least.
    assert found == [[11, 11, 10, 12, 12, 14, 14, 0]] * 2
    rng = np.random.default_rng(3)
    bits, made = rng.integers(0, 2**32, 3000, dtype=np.uint32), np.zeros((2, 3000), np.uint8)
    for form, contexts in zip(FORMS, made, strict=True):
        ends = np.array([1000, 2000], np.int64), np.array([100, 140], np.uint8), np.array([12, 30], np.uint8)
        form.change_contexts(bits, *ends, contexts)
    assert made[0].tolist() == made[1].tolist()


@pytest.mark.parametrize("form", FORMS, ids=["chosen", "NumPy"])
def test_what_would_leave_a_buffer_is_refused(form) -> None:
    u8, u16, u32, i64 = (lambda n, t=t: np.zeros(n, t) for t in (np.uint8, np.uint16, np.uint32, np.int64))
    last = FINITE - BINS - FIRST
    form.change_cut(u32(2), u32(2), u16(2), last, 0, u8(2), u8(2), u8(2), u32(2))
    for call in (
        lambda: form.change_keys(u32(2), u32(3), u16(2)),
        lambda: form.change_cut(u32(2), u32(2), u16(2), last + 1, 0, u8(2), u8(2), u8(2), u32(2)),
        lambda: form.change_cut(u32(2), u32(2), u16(2), -1, 0, u8(2), u8(2), u8(2), u32(2)),
        lambda: form.change_cut(u32(2), u32(2), u16(2), 0, 5, u8(2), u8(2), u8(2), u32(2)),
        lambda: form.change_cut(u32(2), u32(2), u16(2), 0, 0, u8(2), u8(1), u8(2), u32(2)),
        lambda: form.change_bins(u32(2), u8(2), u8(2), last + 1, 0, u32(2), u32(2), u8(2)),
        lambda: form.change_bins(u32(2), u8(3), u8(2), 0, 0, u32(2), u32(2), u8(2)),
        lambda: form.change_join(u32(2), u32(2), u32(3), u8(2), u8(2)),
        lambda: form.change_contexts(u32(2), i64(1) + 2, u8(1), u8(1), u8(3)),
        lambda: form.change_contexts(u32(2), i64(1) + 3, u8(1), u8(1), u8(2)),
        lambda: form.change_contexts(u32(2), i64(2) + np.array([3, -1]), u8(2), u8(2), u8(2)),
        lambda: form.change_contexts(u32(2), i64(2) + 1, u8(1), u8(2), u8(2)),
        lambda: form.change_contexts(u32(2), i64(2) + 1, u8(2), u8(1), u8(2)),
    ):
        with pytest.raises(ValueError):
            call()
