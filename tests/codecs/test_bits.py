"""Bit segments: round trips of any size and density, sizes against the floor, and words that no encoder writes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fl_sim.codecs import CorruptPayload, bits

SEGMENTS = st.lists(st.tuples(st.integers(0, 300), st.floats(0, 1)), max_size=6)


@given(SEGMENTS, st.integers(0, 1000))
def test_segments_come_back(sizes: list[tuple[int, float]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    segments = [rng.random(size) < density for size, density in sizes]
    counts, words = bits.encode(segments)
    told = [(int(s.sum()), len(s)) for s in segments]
    assert counts == b"".join(bits.varint(ones) for ones, size in told if size)
    for sent, got in zip(segments, bits.decode(memoryview(words), told), strict=True):
        np.testing.assert_array_equal(sent, got)


@pytest.mark.parametrize("density", [0.001, 0.01, 0.2, 0.5, 0.8, 0.999])
def test_a_long_segment_is_within_two_thousandths_of_its_floor(density: float) -> None:
    segment = np.random.default_rng(3).random(1_000_000) < density
    _, words = bits.encode([segment])
    assert len(words) < 1.002 * bits.floor_bits(int(segment.sum()), len(segment)) / 8 + 8


def forged(word: int, ones: int, size: int) -> memoryview:
    """One word as it would be coded for a segment of `size` bits that says it has `ones` ones."""
    coder, words = bits.Encoder(), bits._words()
    count = words.counts[word]
    coder.choices(words.ranks[[word]], words.sizes[[count]])
    coder.symbols(np.array([count], dtype=np.int32), bits._model(ones, size))
    return memoryview(coder.words())


def test_words_that_no_encoder_writes_are_refused() -> None:
    legal = int(np.packbits([1, 0, 1] + [0] * 13).view("<u2")[0])
    beyond = int(np.packbits([1, 0] + [0] * 13 + [1]).view("<u2")[0])
    assert bits.decode(forged(legal, 2, 10), [(2, 10)])[0].nonzero()[0].tolist() == [0, 2]
    with pytest.raises(CorruptPayload, match="padded"):
        bits.decode(forged(beyond, 2, 10), [(2, 10)])
    with pytest.raises(CorruptPayload, match="number of ones"):
        bits.decode(forged(legal, 3, 10), [(3, 10)])
    with pytest.raises(CorruptPayload, match="left over"):
        bits.decode(memoryview(bytes(forged(legal, 2, 10)) + b"\1\0\0\0"), [(2, 10)])
    with pytest.raises(CorruptPayload, match="cut off"):
        bits.decode(forged(legal, 2, 10)[:-1], [(2, 10)])
    with pytest.raises(CorruptPayload, match="left over"):
        bits.decode(memoryview(b"\1\0\0\0"), [(0, 10)])
