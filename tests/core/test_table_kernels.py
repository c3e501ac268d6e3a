"""Tables of slots for rANS: the compiled form and NumPy make, write, read and refuse the same ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from properties import examples

from fl_sim.core.kernels import coding, table_reference
from fl_sim.core.kernels.table_reference import CUT_OFF, NO_SUCH_SYMBOL, NOT_PADDED, OTHER_SUM, REFUSED

FORMS = (coding, table_reference)
BOTH = pytest.mark.parametrize("form", FORMS, ids=["chosen", "NumPy"])


def room(kinds: int) -> np.ndarray:
    return np.zeros(3 + 2 * kinds + 512 * kinds, np.uint8)


def made(form, counts: np.ndarray, fewest: int = 8, most: int = 12) -> tuple[int, np.ndarray]:
    tables = np.full(len(counts), 7, np.uint16)
    return form.table_make(counts, fewest, most, tables), tables


def written(form, tables: np.ndarray, precision: int) -> np.ndarray:
    out = room(len(tables) // 256)
    return out[: form.table_write(tables, precision, out)]


def drawn(seed: int, kinds: int, alphabet: int, largest: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    counts = np.zeros((kinds, 256), np.int64)
    counts[:, :alphabet] = largest ** rng.random((kinds, alphabet)) * (rng.random((kinds, alphabet)) < 0.7)
    counts[rng.random(kinds) < 0.2] = 0
    return counts.reshape(-1)


@given(
    seed=st.integers(0, 2**32 - 1),
    kinds=st.integers(1, 5),
    alphabet=st.sampled_from([1, 3, 17, 256]),
    largest=st.sampled_from([1.5, 40.0, 1e6, 1e9]),
    fewest=st.integers(8, 12),
    most=st.integers(8, 12),
)
@settings(deadline=None, max_examples=examples(200))
def test_both_forms_make_write_and_read_the_same_tables(seed, kinds, alphabet, largest, fewest, most) -> None:
    counts = drawn(seed, kinds, alphabet, largest)
    fewest = min(fewest, most)
    (precision, tables), (other, others) = (made(form, counts, fewest, most) for form in FORMS)
    assert precision == other
    assert tables.tolist() == others.tolist()
    rows = counts.reshape(-1, 256)
    sums = tables.reshape(-1, 256).sum(axis=1)
    assert (sums == np.where(rows.any(axis=1), 1 << precision, 0)).all()
    assert ((tables > 0) == (counts > 0)).all()
    # No slot is more than one from its share, but where each symbol must have one.
    share = rows / np.maximum(1, rows.sum(axis=1, keepdims=True)) * (1 << precision)
    most_moved = np.abs(tables.reshape(-1, 256) - share).max(axis=1)
    assert (most_moved <= 1.5 + (rows > 0).sum(axis=1)).all()
    data = [written(form, tables, precision) for form in FORMS]
    assert data[0].tobytes() == data[1].tobytes()
    more = np.append(data[0], np.uint8(99))
    for form in FORMS:
        back = np.full(len(tables), 7, np.uint16)
        assert form.table_read(more, precision, 256, back) == len(data[0])
        assert back.tolist() == tables.tolist()
        assert data[0][0] == precision


@given(seed=st.integers(0, 2**32 - 1), kinds=st.integers(1, 3), alphabet=st.sampled_from([3, 256]))
@settings(deadline=None, max_examples=examples(400))
def test_both_forms_read_damaged_tables_alike(seed: int, kinds: int, alphabet: int) -> None:
    rng = np.random.default_rng(seed)
    precision, tables = made(coding, drawn(seed, kinds, alphabet, 50.0))
    data = written(coding, tables, precision).copy()
    if rng.random() < 0.3:
        data = data[: rng.integers(0, len(data) + 1)]
    for place in rng.integers(0, max(1, len(data)), rng.integers(0, 3)) if len(data) else []:
        data[place] ^= np.uint8(1 << rng.integers(0, 8))
    found = []
    for form in FORMS:
        back = np.zeros(len(tables), np.uint16)
        size = form.table_read(data, 12, alphabet, back)
        found.append((size, back.tolist() if size > 0 else []))
        assert size in REFUSED or 0 < size <= len(data)
        if size > 0:
            assert set(back.reshape(-1, 256).sum(axis=1).tolist()) <= {0, 1 << int(data[0])}
            assert not back.reshape(-1, 256)[:, alphabet:].any()
    assert found[0] == found[1]


@BOTH
def test_each_reason_of_a_refusal_is_told(form) -> None:
    counts = np.zeros(256, np.int64)
    counts[:3] = 5, 3, 2
    precision, tables = made(form, counts)
    data = written(form, tables, precision)
    other = data.copy()
    other[-1] ^= 1
    loose = data.copy()
    loose[4] |= 0xF0  # three lengths of 4 bits, and four bits of zeros
    for given_data, most, alphabet, reason in (
        (data[:2], 12, 256, CUT_OFF),
        (data, precision - 1, 256, CUT_OFF),
        (data, 12, 2, NO_SUCH_SYMBOL),
        (data[:-1], 12, 256, NOT_PADDED),
        (loose, 12, 256, NOT_PADDED),
        (other, 12, 256, OTHER_SUM),
    ):
        assert form.table_read(given_data, most, alphabet, np.zeros(256, np.uint16)) == reason


@BOTH
def test_a_precision_is_what_rounding_and_tables_cost_least_at(form) -> None:
    """More symbols, and more of them rare, are worth finer tables; `most` is never passed."""
    few, many = np.zeros(256, np.int64), np.zeros(256, np.int64)
    few[:3], many[:200] = 1000, 1000
    assert made(form, few)[0] == 8  # sqrt(3000 * 3) / 2 = 47 has 6 bits
    assert made(form, many)[0] == 12  # sqrt(200,000 * 200) / 2 = 3162 has 12
    assert made(form, many, 8, 9)[0] == 9
    assert made(form, few, 10, 12)[0] == 10
    rare = few.copy()
    rare[3:20] = 1
    assert made(form, rare)[0] == 9  # sqrt(3017 * (20 + 8 * 17)) / 2 = 343
    assert made(form, few * 0) == (8, pytest.approx(np.zeros(256)))


@BOTH
def test_what_would_leave_a_buffer_or_overflow_is_refused(form) -> None:
    i64, u16, u8 = (lambda n, t=t: np.zeros(n, t) for t in (np.int64, np.uint16, np.uint8))
    full = u16(256)
    full[0] = 256
    for call in (
        lambda: form.table_make(i64(255), 8, 12, u16(255)),
        lambda: form.table_make(i64(256), 8, 12, u16(512)),
        lambda: form.table_make(i64(256), 7, 12, u16(256)),
        lambda: form.table_make(i64(256), 8, 13, u16(256)),
        lambda: form.table_make(i64(256) - 1, 8, 12, u16(256)),
        lambda: form.table_make(i64(256) + 2**33, 8, 12, u16(256)),
        lambda: form.table_make(i64(256) + 2**62, 8, 12, u16(256)),
        lambda: form.table_write(full, 9, u8(999)),
        lambda: form.table_write(full, 8, u8(516)),
        lambda: form.table_write(full[:255], 8, u8(999)),
        lambda: form.table_write(u16(256) + np.uint16(257), 13, u8(999)),
        lambda: form.table_read(u8(99), 13, 256, u16(256)),
        lambda: form.table_read(u8(99), 12, 257, u16(256)),
        lambda: form.table_read(u8(99), 12, 256, u16(255)),
    ):
        with pytest.raises(ValueError, match=r"256|equal length"):
            call()
