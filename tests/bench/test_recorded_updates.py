"""`fl-sim bench codec --updates`: floors and ratios of a recorded run; what cannot be read is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from federation import run_tiny

from fl_sim.bench import recorded
from fl_sim.codecs.value_coding import VALUES
from fl_sim.communication.recorded_updates import RecordedUpdate
from fl_sim.core.types import FlatParams, UserError


def test_every_codec_is_measured_against_its_floor(tmp_path: Path) -> None:
    rows = recorded.measure(run_tiny(tmp_path, "wire.record_payloads=1", "cohort.size=2"), repeats=1)
    by = {(row.rounds, row.what, row.codec): row for row in rows}
    assert {row.rounds for row in rows} == {"1 to 1", "2 to 2"}
    for rounds in ("1 to 1", "2 to 2"):
        assert by[rounds, "model", "float32-delta"].ratio < by[rounds, "model", "float32-zstd"].ratio < 1
        assert by[rounds, "mask 5%", "smallest"].ratio <= by[rounds, "mask 5%", "fast"].ratio
        for name in recorded.INTEGERS:  # 7,000 values: their scales and tables are some percent
            assert 0.9 < by[rounds, "change", name].ratio < 1.2, name
    assert set(recorded.INTEGERS) == {"int8", "int4", "int2", "sign"} <= VALUES.keys()
    assert all(row.encode_mbps > 0 and row.decode_mbps > 0 for row in rows)


def test_steps_give_the_sent_weights_to_whoever_holds_the_received_ones() -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, (2, 1000), dtype=np.uint32)
    bits[:, :4] = [[0, 0x80000000, 1, 0x80000001], [0x80000000, 0, 0x80000001, 1]]
    received, sent = (
        FlatParams.view(torch.from_numpy(row.view(np.float32).copy()), ["w"], [torch.Size([1000])]) for row in bits
    )
    change = recorded.steps(RecordedUpdate(1, 0, received, sent)).astype(np.int64)
    place = bits.view(np.int32) ^ (bits.view(np.int32) >> 31 & 0x7FFFFFFF)
    whole = (place[0] + change).astype(np.int32)
    assert (whole ^ (whole >> 31 & 0x7FFFFFFF)).view(np.uint32).tolist() == bits[1].tolist()
    up = {"w": torch.tensor([1.0, -1.0])}
    near = {"w": torch.from_numpy(np.nextafter(up["w"].numpy(), np.float32(9)))}
    assert recorded.steps(RecordedUpdate(1, 0, FlatParams.pack(up), FlatParams.pack(near))).tolist() == [1, 1]


def test_a_run_without_recorded_updates_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="record_payloads"):
        recorded.measure(run_tiny(tmp_path, "rounds=1"))
    masked = run_tiny(tmp_path, "rounds=1", "wire.record_payloads=1", "client.target=clients.presets:topk")
    with pytest.raises(UserError, match="under masks"):
        recorded.measure(masked)
