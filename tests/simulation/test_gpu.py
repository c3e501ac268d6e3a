"""Federations on a GPU: what they share with those on the CPU, bytes included. Only where there is a CUDA device."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from federation import run_tiny, tiny
from interruption import KillAfter, Killed

from fl_sim import Report, run
from fl_sim.bench import cohort, inference
from fl_sim.models import build
from fl_sim.simulation import resume
from fl_sim.simulation.federation import Federation
from fl_sim.training import precision

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
DEVICE = "cuda"
METHODS = {
    "dense": ["evaluate.clients=2"],
    "topk": ["client.target=clients.presets:topk", "client.density=0.1", "wire.error_feedback=true"],
    "masked": ["strategy.target=strategies.presets:global_magnitude", "strategy.density=0.2"],
    "gated": ["client.target=clients.presets:adaptive_pruning", "gating.macs_budget=0.5"],
}
EXACT = "training.precision=float32"


@pytest.fixture(scope="module")
def on(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Report]:
    """A method's finished run of one round on a device."""
    return cache(
        lambda device, method, *options: run_tiny(
            tmp_path_factory.mktemp(method), "rounds=1", f"device={device}", EXACT, *METHODS[method], *options
        )
    )


@pytest.mark.parametrize("method", METHODS)
def test_the_first_round_on_a_gpu_is_that_of_the_cpu_up_to_rounding(on: Callable[..., Report], method: str) -> None:
    gpu, cpu = on(DEVICE, method), on("cpu", method)
    assert gpu.params.keys() == cpu.params.keys()
    assert all(value.device.type == "cpu" for value in gpu.params.values())
    for name, value in cpu.params.items():
        assert float((gpu.params[name] - value).norm()) <= 0.02 * float(value.norm()) + 1e-4, name
    assert gpu.ledger.messages(phase="train") == cpu.ledger.messages(phase="train")
    if method in ("dense", "masked"):  # elsewhere rounding may choose other coordinates
        assert gpu.ledger.total() == cpu.ledger.total()


@pytest.mark.parametrize("method", ["dense", "masked", "gated"])
def test_clients_that_train_together_on_a_gpu_equal_those_in_turn(on: Callable[..., Report], method: str) -> None:
    together, alone = on(DEVICE, method, "engine=cohort"), on(DEVICE, method)
    for name, value in alone.params.items():
        assert float((together.params[name] - value).norm()) <= 0.02 * float(value.norm()) + 1e-4, name
    assert together.ledger.messages(phase="train") == alone.ledger.messages(phase="train")


@pytest.mark.parametrize("asked", ["channels_last", "bfloat16"])
def test_every_precision_trains_and_sends_float32(tmp_path: Path, asked: str) -> None:
    report = run_tiny(tmp_path, "rounds=4", f"device={DEVICE}", f"training.precision={asked}")
    assert report.summary["failures"] == {"raised": 0, "rejected": 0, "late": 0, "lost": 0}
    assert all(value.dtype == torch.float32 for value in report.params.values() if value.is_floating_point())
    assert report.number("accuracy", "final") > 0.5


def test_the_probe_chooses_a_precision_and_the_engine_is_inline(tmp_path: Path) -> None:
    report = run_tiny(tmp_path, "rounds=1", f"device={DEVICE}", "training.precision=auto", "engine=auto")
    assert report.summary["engine"] == "inline"
    model = build("cnn_bn", in_channels=1, image_size=8).to(DEVICE)
    assert precision.choose(model, torch.zeros(32, 1, 8, 8, device=DEVICE)) in precision.PRECISIONS


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    asked = tiny(tmp_path, "rounds=3", f"device={DEVICE}", EXACT, *METHODS["topk"])
    with pytest.raises(Killed):
        run(asked, KillAfter(2))
    resumed = resume(asked, left := KillAfter(99))
    assert left.seen == [3]
    assert len(resumed.rounds) == 3
    assert all(torch.isfinite(value).all() for value in resumed.params.values())


def test_the_device_is_the_one_asked_for(tmp_path: Path) -> None:
    federation = Federation.build(tiny(tmp_path, f"device={DEVICE}"))
    assert federation.first.device.type == DEVICE


def test_benches_measure_the_gpu() -> None:
    rows = inference.measure(model="resnet8", side=8, gates=["*.conv1"], repeats=2, device=DEVICE)
    assert all(row.microseconds > 0 for row in rows)
    (row,) = cohort.measure(DEVICE, cohort.Grid(["cnn_bn"], [2], [2]))
    assert row.ratio > 0
    assert DEVICE == "cpu" or row.peak_mb > 0
