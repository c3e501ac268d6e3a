"""`fl-sim bench codec --updates`: floors and ratios of a recorded run; what cannot be read is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from federation import run_tiny

from fl_sim.bench import recorded
from fl_sim.codecs.value_coding import VALUES
from fl_sim.core.types import UserError


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


def test_a_run_without_recorded_updates_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="record_payloads"):
        recorded.measure(run_tiny(tmp_path, "rounds=1"))
    masked = run_tiny(tmp_path, "rounds=1", "wire.record_payloads=1", "client.target=clients.presets:topk")
    with pytest.raises(UserError, match="under masks"):
        recorded.measure(masked)
