"""SparseBroadcastServer formulas against the hand-computed bits per weight of each, and on a real ledger."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from federation import FOUR, WHOLE, run_tiny

from fl_sim.codecs import Description
from fl_sim.communication.estimates import ESTIMATES, Traffic, estimate, traffic
from fl_sim.communication.ledger import Ledger

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
                "coo_int64": 48,
                "flsim_coo": 144,
                "flsim_bitmask": 17.0,
                "entropy": 17.0,
            },
        ),
        (0.43, {"values_only": 13.76, "feddst": 14.19, "entropy": 14.746, "bitmap": 14.76, "coo_int64": 41.28}),
        (
            0.2,
            {
                "values_only": 6.4,
                "feddst": 6.6,
                "bitmap": 7.4,
                "dasha": 12.8,
                "coo_int32": 12.8,
                "flsim_coo": 57.6,
                "entropy": 7.122,
            },
        ),
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
                "entropy": 0.4008,
            },
        ),
    ],
)
def test_bits_per_weight(density: float, bits: dict[str, float]) -> None:
    for name, expected in bits.items():
        assert 8 * ESTIMATES[name](uplink(density)) / N == pytest.approx(expected, rel=1e-4), name


def test_what_each_leaves_out() -> None:
    down = uplink(0.5, up=False)
    assert ESTIMATES["dasha"](down) == ESTIMATES["fl_pytorch"](down) == 0
    assert ESTIMATES["flsim_coo"](down) == ESTIMATES["dense"](down) == 4 * N
    assert ESTIMATES["feddst"](uplink(0.5, up=False, first=True)) == N / 8
    assert ESTIMATES["feddst"](down) == 2 * N + N / 8
    assert ESTIMATES["feddst_prunefl"](uplink(0.5)) == ESTIMATES["feddst"](uplink(0.5)) + 4 * N
    assert ESTIMATES["ssfl"](down) == N
    assert ESTIMATES["ssfl"](uplink(0.5, up=False, mask_moved=False)) == 0
    with_rest = uplink(0.5, other=100, buffers=50)
    assert ESTIMATES["values_only"](with_rest) == 2 * N + 400
    assert ESTIMATES["dispfl"](with_rest) == ESTIMATES["ssfl"](with_rest) == 2 * N + 600
    assert ESTIMATES["flsim_coo"](with_rest) == 18 * N + 0.5 * 150 * 12
    assert ESTIMATES["flsim_bitmask"](with_rest) == (N + 150) / 8 + 0.5 * 4 * (N + 150)
    assert ESTIMATES["feddip"](uplink(1.0)) == pytest.approx(8 * 4 * N / 1.048576)


@pytest.mark.parametrize(
    "name", ["values_only", "dispfl", "flsim_coo", "flsim_bitmask", "bitmap", "entropy", "coo_int64"]
)
def test_a_dense_message_costs_a_dense_message(name: str) -> None:
    for up in (True, False):
        assert ESTIMATES[name](uplink(1.0, up=up, other=100)) == 4 * (N + 100)


def test_density_zero_and_nothing_prunable() -> None:
    for formula in ESTIMATES.values():
        for message in (uplink(0.0), uplink(0.0, prunable=0, sent=0, other=10, mask_moved=False)):
            assert 0 <= formula(message) < 5 * N


def test_messages_are_told_apart_by_phase_client_and_section() -> None:
    ledger = Ledger()

    def book(direction: str, phase: str, client: int, sections: dict[str, int], nnz: int) -> None:
        dense = {"values": 400, "dense": 40, "buffers": 8}
        described = Description({**sections, "header": 44}, nnz, dense, 0.0, "whole", "float32")
        ledger.book(round=1, direction=direction, phase=phase, client=client, description=described, protocol_bytes=1)

    for client in (0, 1, 0):
        book("down", "train", client, {"values": 400, "dense": 40, "buffers": 8}, 100)
    book("down", "evaluate", 2, {"values": 400, "dense": 40, "buffers": 8}, 100)
    book("up", "train", 1, {"mask": 3, "values": 80, "dense": 40, "buffers": 8}, 20)
    ledger.book(
        round=1,
        direction="up",
        phase="train",
        client=0,
        description=Description.opaque(99),
        protocol_bytes=1,
        status="rejected",
    )
    common = {"prunable": 100, "other": 10, "buffers": 2, "index_dims": 2.0}
    down = Traffic(up=False, sent=100, mask_moved=False, first=True, **common)
    assert traffic(ledger, index_dims=2.0) == {
        down: 2,
        replace(down, first=False): 1,
        Traffic(up=True, sent=20, mask_moved=True, first=False, **common): 1,
        Traffic(True, 0, 0, 0, 0, False, False, 2.0): 1,
    }
    assert estimate(ledger, index_dims=2.0)["values_only"] == 3 * 440 + 120
    assert estimate(Ledger(), index_dims=2.0) == dict.fromkeys(ESTIMATES, 0)


def test_on_a_ledger(tmp_path: Path) -> None:
    report = run_tiny(tmp_path, *WHOLE, *FOUR, "client.target=clients.presets:topk", "client.density=0.1")
    messages = traffic(report.ledger, index_dims=3.9)
    assert sum(n for m, n in messages.items() if m.up) == sum(n for m, n in messages.items() if not m.up) == 8
    assert {m.prunable for m in messages} == {23_824}
    assert {m.sent for m in messages if m.up} == {2382}
    assert {(m.other, m.buffers) for m in messages} == {(234, 224)}
    got = estimate(report.ledger, index_dims=3.9)
    measured = report.summary["total_bytes"]
    assert got["ssfl"] < got["values_only"] < measured < got["bitmap"] < got["coo_int32"] < got["dense"]
