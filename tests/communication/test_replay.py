"""Replay: the recorded masks under our own codec give the measured bytes again; other codecs give their formulas."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from federation import run_tiny

from fl_sim import Report
from fl_sim.communication.mask_log import read_masks, replay
from fl_sim.core.types import UserError
from fl_sim.simulation.federation import Federation

TOPK = ["client.target=clients.presets:topk", "client.density=0.1", "wire.record_masks=true"]
PRUNED = [
    "strategy.target=strategies.presets:global_magnitude",
    "strategy.density=0.2",
    "wire.record_masks=true",
    "rounds=4",
]


def priced(report: Report, values: str, mask: str) -> dict[str, float]:
    from fl_sim import Experiment

    schema = Federation.build(Experiment.load(report.folder / "config.toml")).first.exchange.schema
    return replay(report.ledger, read_masks(report.folder / "masks.parquet", schema), schema, values=values, mask=mask)


@pytest.mark.parametrize("method", [TOPK, PRUNED])
def test_our_own_codec_gives_the_measured_bytes(tmp_path: Path, method: list[str]) -> None:
    report = run_tiny(tmp_path, *method)
    got = priced(report, "float32", "fl_sim")
    assert got == {"up": report.summary["uplink_bytes"], "down": report.summary["downlink_bytes"]}


def test_other_codecs_cost_what_they_say(tmp_path: Path) -> None:
    report = run_tiny(tmp_path, *TOPK)
    up = {mask: priced(report, "float32", mask)["up"] for mask in ("free", "fl_sim", "bitmap", "coo")}
    masks, sent = 8, 2382
    assert up["bitmap"] - up["free"] == masks * -(-23_824 // 8)
    assert up["coo"] - up["free"] == masks * 4 * sent
    assert up["free"] < up["fl_sim"] < up["bitmap"] < up["coo"]
    assert priced(report, "int8", "free")["up"] < up["free"] - masks * 2.9 * sent
    assert priced(report, "float32", "coo")["down"] == report.summary["downlink_bytes"]


def test_runs_without_masks_and_unknown_codecs_are_refused(tmp_path: Path, finished: Callable[..., Report]) -> None:
    with pytest.raises(UserError, match="record_masks"):
        priced(finished(), "float32", "coo")
    report = run_tiny(tmp_path / "masks", *TOPK)
    with pytest.raises(UserError, match="allowed: fl_sim, coo"):
        priced(report, "float32", "zip")
    (report.folder / "masks.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"masks\.parquet"):
        priced(report, "float32", "coo")
