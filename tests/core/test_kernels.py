"""The innermost loops: both forms compute the same bits, and neither leaves its buffers."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_sim.core import kernels
from fl_sim.core.kernels import reference

FORMS = pytest.mark.parametrize("form", [kernels, reference], ids=["chosen", "NumPy"])
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
BEYOND = 70  # longer than a vector of any processor, with a tail


def drawn(seed: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 2**32, size, dtype=np.uint32).view(np.float32)  # all magnitudes, subnormal ones too
    values = np.where(np.isfinite(values), values, np.float32(0.1))
    return rng.normal(size=size), rng.random(size), values, rng.random(size) < 0.5


def test_where_there_is_a_compiler_the_loops_are_compiled() -> None:
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if (shutil.which("cc") or shutil.which("gcc")) is None or not headers.exists():
        pytest.skip("no C compiler, or no headers of Python, here")
    assert kernels.FORM == "compiled"


def test_without_the_compiled_form_numpy_does_the_same() -> None:
    program = """
import sys
sys.modules["fl_sim.core.kernels._compiled"] = None
from fl_sim import kernels
assert kernels.FORM == "NumPy" and kernels.add_sent is kernels.reference.add_sent
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@FORMS
@given(seed=st.integers(0, 2**32 - 1), size=st.integers(0, BEYOND), weight=st.integers(1, 2**31 - 1))
@settings(deadline=None)
def test_sums_are_those_of_python_floats(form, seed: int, size: int, weight: int) -> None:
    total, covered, values, sent = drawn(seed, size)
    old, seen = total.tolist(), covered.tolist()
    pairs = list(zip(old, values.tolist(), strict=True))
    form.add_scaled(total, values, float(weight))
    assert total.tolist() == [a + weight * b for a, b in pairs]

    total = np.array(old)
    form.add_sent(total, covered, values, sent, float(weight))
    assert total.tolist() == [a + weight * b if s else a for (a, b), s in zip(pairs, sent.tolist(), strict=True)]
    assert covered.tolist() == [c + weight if s else c for c, s in zip(seen, sent.tolist(), strict=True)]


@given(seed=st.integers(0, 2**32 - 1), size=st.integers(0, BEYOND), weight=st.floats(0.0, 1e6))
@settings(deadline=None)
def test_both_forms_agree_bit_for_bit_whatever_the_weight(seed: int, size: int, weight: float) -> None:
    total, covered, values, sent = drawn(seed, size)
    sums = [[total.copy(), covered.copy()] for _ in range(2)]
    for form, (mine, counted) in zip((kernels, reference), sums, strict=True):
        form.add_scaled(mine, values, weight)
        form.add_sent(mine, counted, values, sent, weight)
    assert sums[0][0].tobytes() == sums[1][0].tobytes()
    assert sums[0][1].tobytes() == sums[1][1].tobytes()


@FORMS
@given(seed=st.integers(0, 2**32 - 1), size=st.integers(0, BEYOND), weight=st.floats(0.0, 2.0))
@settings(deadline=None)
def test_a_moved_change_has_the_bits_of_three_steps_of_pytorch(form, seed: int, size: int, weight: float) -> None:
    y, b, x = (
        torch.from_numpy(np.random.default_rng((seed, n)).normal(size=size).astype(np.float32)) for n in range(3)
    )
    out = torch.full_like(x, torch.nan)
    form.moved(out.numpy(), y.numpy(), b.numpy(), x.numpy(), weight)
    assert torch.equal(out, torch.sub(y, b).mul_(weight).add_(x))


@FORMS
@given(seed=st.integers(0, 2**32 - 1), size=st.integers(1, BEYOND), weight=st.integers(1, 2**20))
@settings(deadline=None)
def test_squares_are_those_of_python_floats(form, seed: int, size: int, weight: int) -> None:
    total, _, values, _ = drawn(seed, size)
    values = np.where(np.abs(values) < 1e15, values, np.float32(2.0))
    positions = np.random.default_rng(seed).integers(0, size, size)
    old = total.tolist()
    form.add_squares(total, values, positions, float(weight))
    picked = values[positions].tolist()
    assert total.tolist() == [a + weight * (b * b) for a, b in zip(old, picked, strict=True)]


@FORMS
@pytest.mark.parametrize("position", [5, 2**40, -1, -6])
def test_a_position_outside_the_values_is_refused_before_anything_is_added(form, position: int) -> None:
    total = np.zeros(3)
    with pytest.raises(IndexError):
        form.add_squares(total, np.ones(5, np.float32), np.array([0, 1, position]), 1.0)
    assert not total.any()


@FORMS
@given(values=st.lists(FLOATS, max_size=BEYOND), where=st.integers(0, BEYOND), sign=st.booleans())
@settings(deadline=None)
def test_one_special_value_is_found_wherever_it_is(form, values: list[float], where: int, sign: bool) -> None:
    array = np.array(values, dtype=np.float32)
    assert form.all_finite(array) is True
    for bits in (0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF):  # infinity, the first NaN, a quiet one, the last
        special = struct.unpack("<f", struct.pack("<I", bits | sign << 31))[0]
        spoiled = np.insert(array, min(where, len(array)), 0)
        spoiled.view(np.uint32)[min(where, len(array))] = bits | sign << 31
        assert not np.isfinite(special)
        assert form.all_finite(spoiled) is False


@FORMS
def test_the_largest_and_smallest_values_are_finite(form) -> None:
    info = np.finfo(np.float32)
    extremes = np.array([info.max, info.min, info.tiny, info.smallest_subnormal, -0.0], dtype=np.float32)
    assert form.all_finite(extremes) is True
    assert form.all_finite(np.full(1000, info.max)) is True


@FORMS
@given(seed=st.integers(0, 2**64 - 1), size=st.integers(0, BEYOND))
@settings(deadline=None)
def test_random_bits_are_those_of_numpys_pcg64(form, seed: int, size: int) -> None:
    bits = np.empty(size, dtype=np.uint32)
    form.random_bits(seed, bits)
    words = np.random.PCG64(seed).random_raw(size // 2 + 1).tolist()
    assert bits.tolist() == [half for word in words for half in (word & 0xFFFFFFFF, word >> 32)][:size]


@FORMS
@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_of_more_than_64_bits_is_refused(form, seed: int) -> None:
    with pytest.raises(OverflowError):
        form.random_bits(seed, np.empty(2, dtype=np.uint32))


def test_a_piece_of_a_larger_array_leaves_the_rest_alone() -> None:
    total, covered, values, sent = drawn(0, 100)
    before = total.copy(), covered.copy()
    kernels.add_scaled(total[3:90], values[3:90], 2.0)
    kernels.add_sent(total[10:20], covered[10:20], values[10:20], sent[10:20], 2.0)
    for now, old, touched in ((total, before[0], slice(3, 90)), (covered, before[1], slice(10, 20))):
        outside = np.ones(100, dtype=bool)
        outside[touched] = False
        assert np.array_equal(now[outside], old[outside])
        assert not np.array_equal(now, old)


def _read_only(array: np.ndarray) -> np.ndarray:
    array.setflags(write=False)
    return array


@pytest.mark.skipif(kernels.FORM != "compiled", reason="no C compiler here")
@pytest.mark.parametrize(
    "change",
    [
        {0: np.zeros(7)},
        {0: np.zeros(8, np.float32)},
        {0: _read_only(np.zeros(8))},
        {0: np.zeros(16)[::2]},
        {0: np.zeros(8, np.int64)},
        {1: np.zeros(9)},
        {1: _read_only(np.zeros(8))},
        {1: np.zeros(8, np.float32)},
        {2: np.zeros(8)},
        {2: np.zeros(7, np.float32)},
        {2: np.zeros(8, np.int32)},
        {2: np.zeros(16, np.float32)[::2]},
        {2: np.frombuffer(bytes(33), np.uint8)[1:].view(np.float32)},
        {2: memoryview(bytes(33))[1:].cast("f")},
        {2: np.zeros(8, ">f4")},
        {2: bytes(32)},
        {2: None},
        {3: np.zeros(8, np.uint8)},
        {3: np.zeros(7, bool)},
        {3: np.zeros(9, bool)},
        {4: "1"},
    ],
    ids=lambda change: "-".join(f"{at}:{type(value).__name__}" for at, value in change.items()),
)
def test_what_is_no_array_of_the_right_kind_and_length_is_refused(change: dict[int, object]) -> None:
    good = [np.zeros(8), np.zeros(8), np.zeros(8, np.float32), np.zeros(8, bool), 1.0]
    bad = [change.get(i, value) for i, value in enumerate(good)]
    with pytest.raises((TypeError, ValueError, BufferError)):
        kernels.add_sent(*bad)
    if change.keys() & {0, 2, 4}:
        with pytest.raises((TypeError, ValueError, BufferError)):
            kernels.add_scaled(bad[0], bad[2], bad[4])
    if change.keys() & {2} and len(np.atleast_1d(change[2])) == 8:
        with pytest.raises((TypeError, ValueError, BufferError)):
            kernels.all_finite(bad[2])
    kernels.add_sent(*good)


@pytest.mark.skipif(kernels.FORM != "compiled", reason="no C compiler here")
@pytest.mark.parametrize(
    "positions", [np.zeros(4, np.int64), np.zeros(3, np.int32), np.zeros(3), np.zeros(6, np.int64)[::2], [0, 1, 2]]
)
def test_positions_of_another_kind_or_length_are_refused(positions: object) -> None:
    with pytest.raises((TypeError, ValueError, BufferError)):
        kernels.add_squares(np.zeros(3), np.ones(5, np.float32), positions, 1.0)


@FORMS
@given(key=st.lists(st.integers(0, 2**32 - 1), max_size=9))
@settings(deadline=None)
def test_a_seed_is_the_first_state_of_numpys_seed_sequence(form, key: list[int]) -> None:
    words = np.array(key, dtype=np.uint32)
    assert form.seed(*key) == int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


@FORMS
@pytest.mark.parametrize("word", [-1, 2**32, 2**70])
@pytest.mark.parametrize("place", [0, 3, 5])
def test_a_word_of_a_seed_that_is_no_32_bits_is_refused(form, word: int, place: int) -> None:
    key = [7] * 6
    key[place] = word
    with pytest.raises(OverflowError):
        form.seed(*key)
