"""`fl-sim bench codec`, `pruning` and `inference` at toy size: which rows they give and what those hold, not how fast."""

from __future__ import annotations

import math

import pytest
import torch

from fl_sim import count_macs
from fl_sim.bench import codec, inference, pruning
from fl_sim.core.types import UserError
from fl_sim.models import build

LAYERS = {"toy": codec.shapes(1, 4)}


def test_every_codec_is_measured_on_every_model_and_density() -> None:
    rows = codec.measure(models=LAYERS, densities=[0.05, 0.5], repeats=1)
    assert [(row.model, row.density, row.codec) for row in rows] == [
        ("toy", density, name)
        for density, codecs in ((0.05, codec.CODECS), (0.5, codec.CODECS), (1.0, codec.WHOLE))
        for name in codecs
    ]
    assert all(min(row.encode_mbps, row.decode_mbps, row.peak_mb) > 0 for row in rows)


def test_sizes_are_bytes_over_the_floor_of_the_sample() -> None:
    sample = codec.sample(LAYERS["toy"], 0.1)
    kept, total = int(sample.mask.sum()), len(sample.mask)
    assert 4 * kept < sample.floor < 4 * kept + total / 8
    found = {row.codec: row.bytes_over_floor for row in codec.measure(models=LAYERS, densities=[0.1], repeats=1)}
    assert found["COO int32"] == pytest.approx(8 * kept / sample.floor)
    assert found["bitmap"] == pytest.approx((4 * kept + math.ceil(total / 8)) / sample.floor)
    assert 1 < found["fl_sim float32"] < found["bitmap"]


@pytest.mark.parametrize("name", codec.CODECS)
def test_every_codec_of_the_table_returns_what_was_written(name: str) -> None:
    """Otherwise the table would compare payloads that do not hold the same."""
    sample = codec.sample(LAYERS["toy"], 0.1)
    write, read = codec.CODECS[name]
    found = read(write(sample), sample)
    if isinstance(found, tuple):  # (parameters, mask)
        found = sample.schema.flat(found[0]).numpy()
    assert torch.equal(torch.as_tensor(found), torch.from_numpy(sample.values * sample.mask))


def test_a_whole_model_comes_back_exactly_where_nothing_is_lost() -> None:
    sample = codec.sample(LAYERS["toy"], 1.0)
    assert sample.mask.all()
    assert sample.floor == 4 * len(sample.mask)
    for name, expected in (("float32-delta", sample.old + sample.values), ("float32-zstd", sample.values)):
        write, read = codec.WHOLE[f"fl_sim {name}"]
        params, mask = read(write(sample), sample)
        assert mask is None
        assert torch.equal(sample.schema.flat(params), torch.from_numpy(expected)), name
    for name in ("int8", "int4", "int2", "sign"):
        write, read = codec.WHOLE[f"fl_sim {name}"]
        assert len(write(sample)) < {"int8": 0.3, "int4": 0.16, "int2": 0.1, "sign": 0.1}[name] * sample.floor


def test_selection_is_measured_beside_torchs_own() -> None:
    rows = pruning.measure(weights=[3000, 5000], repeats=2, allocations=[])
    operations = {row.operation for row in rows}
    assert [row.size for row in rows] == ["3,000 weights"] * 6 + ["5,000 weights"] * 6
    assert len(operations) == 6
    assert "torch global_unstructured" in operations
    assert all(row.seconds > 0 and row.spread >= 0 for row in rows)
    assert len(pruning.table(rows).splitlines()) == 1 + len(rows)


def test_every_execution_of_the_model_has_its_macs_and_quartiles() -> None:
    rows = {row.execution: row for row in inference.measure(model="resnet8", side=8, gates=["*.conv1"], repeats=3)}
    gated = {f"gates at *.conv1, {how}" for how in ("times zero", "skipped", "skipped, exported")}
    assert {name for name in rows if not name.startswith("dense")} == gated
    assert rows["dense"].macs == count_macs(build("resnet8", image_size=8), (3, 8, 8)) / 1e6
    assert all(rows[name].macs < 0.6 * rows["dense"].macs for name in gated)
    assert all(row.low <= row.microseconds <= row.high for row in rows.values())
    assert rows["dense"].speedup == 1
    assert max(row.over_fastest_dense for name, row in rows.items() if name.startswith("dense")) >= 1


def test_a_device_that_is_not_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA device here"):
        inference.measure(model="resnet8", side=8, repeats=2, device="cuda")
