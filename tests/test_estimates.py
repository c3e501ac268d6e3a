"""Published formulas against the hand-computed bits per weight of each, and on a real ledger."""

from __future__ import annotations

from pathlib import Path

import pytest
from federation import run_tiny

from fl_sim.estimates import ESTIMATES, Traffic, estimate, traffic

N = 1_000_000


def uplink(density: float, **changes: object) -> Traffic:
    fields = {
        "up": True,
        "prunable": N,
        "sent": round(density * N),
        "other": 0,
        "buffers": 0,
        "mask_moved": True,
        "first": False,
        "index_dims": 4.0,
    }
    return Traffic(**{**fields, **changes})


@pytest.mark.parametrize(
    ("density", "bits"),
    [
        (
            0.5,
            {
                "dense": 32,
                "values_only": 16.0,
                "feddst": 16.5,
                "bitmap": 17.0,
                "dasha": 32,
                "coo_int32": 32,
                "flsim_coo": 144,
                "flsim_bitmask": 17.0,
            },
        ),
        (0.2, {"values_only": 6.4, "feddst": 6.6, "bitmap": 7.4, "dasha": 12.8, "coo_int32": 12.8, "flsim_coo": 57.6}),
        (
            0.01,
            {
                "values_only": 0.32,
                "feddst": 0.33,
                "bitmap": 1.32,
                "dasha": 0.64,
                "coo_int32": 0.64,
                "flsim_coo": 2.88,
                "fl_pytorch": 0.32,
            },
        ),
    ],
)
def test_bits_per_weight(density: float, bits: dict[str, float]) -> None:
    for name, expected in bits.items():
        assert 8 * ESTIMATES[name](uplink(density)) / N == pytest.approx(expected), name


def test_what_each_leaves_out() -> None:
    down = uplink(0.5, up=False)
    assert ESTIMATES["dasha"](down) == ESTIMATES["fl_pytorch"](down) == 0
    assert ESTIMATES["flsim_coo"](down) == ESTIMATES["dense"](down) == 4 * N
    assert ESTIMATES["feddst"](uplink(0.5, up=False, first=True)) == 0
    assert ESTIMATES["feddst"](down) == 2 * N + N / 8
    with_rest = uplink(0.5, other=100, buffers=50)
    assert ESTIMATES["values_only"](with_rest) == 2 * N + 400
    assert ESTIMATES["dispfl"](with_rest) == 2 * N + 600
    assert ESTIMATES["feddip"](uplink(1.0)) == pytest.approx(8 * 4 * N / 1.048576)


def test_on_a_ledger(tmp_path: Path) -> None:
    report = run_tiny(tmp_path, "client.target=clients.presets:topk", "client.density=0.1")
    messages = list(traffic(report.ledger, index_dims=3.9))
    assert [m.up for m in messages].count(True) == [m.up for m in messages].count(False) == 8
    assert {m.prunable for m in messages} == {23_824}
    assert {m.sent for m in messages if m.up} == {2382}
    assert {(m.other, m.buffers) for m in messages} == {(234, 224)}
    got = estimate(report.ledger, index_dims=3.9)
    measured = report.summary["total_bytes"]
    assert got["values_only"] < measured < got["bitmap"] < got["coo_int32"] < got["dense"]
