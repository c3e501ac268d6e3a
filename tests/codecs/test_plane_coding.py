"""zstd over planes of bytes: its working memory is kept, which must change no byte and cross no thread."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import zstandard

from fl_sim.codecs.errors import CorruptPayload
from fl_sim.codecs.plane_coding import raw, shuffled, unshuffled


def _fresh(values: np.ndarray[tuple[int], np.dtype[np.float32]]) -> bytes:
    planes = values.view(np.uint8).reshape(-1, 4).T
    return zstandard.ZstdCompressor(level=1, write_content_size=True).compress(planes.tobytes())


def test_bytes_do_not_depend_on_what_was_compressed_before() -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(size).astype(np.float32) for size in (42, 300_000, 1, 42, 5_000)]
    with ThreadPoolExecutor(4) as threads:
        made = list(threads.map(lambda values: shuffled(raw(values), 4), arrays * 8))
        assert made == [_fresh(values) for values in arrays] * 8
        back = threads.map(lambda i: unshuffled(memoryview(made[i]), 4, arrays[i % 5].nbytes), range(len(made)))
        assert list(back) == [values.tobytes() for values in arrays] * 8


def test_a_damaged_frame_leaves_the_next_one_alone() -> None:
    values = np.zeros(1000, dtype=np.float32)
    good = shuffled(raw(values), 4)
    with pytest.raises(CorruptPayload):
        unshuffled(memoryview(good[:-2]), 4, values.nbytes)
    assert unshuffled(memoryview(good), 4, values.nbytes) == values.tobytes()
