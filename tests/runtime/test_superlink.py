"""The same apps under Flower's own runtimes, over real processes and HTTP: the inline result, and Flower's own byte counts."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from federation import tiny
from safetensors.torch import load_file
from superlink import environment, flwr_run, runs, superlink

from fl_sim import Experiment, Report, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

OVERRIDES = [
    "data.clients=2",
    "cohort.size=2",
    "rounds=2",
    "client.target=clients.presets:topk",
    "wire.error_feedback=true",
]


def written(tmp_path: Path) -> Path:
    """The experiment as a file that every process can read."""
    path = tmp_path / "experiment.toml"
    path.write_text(tiny(tmp_path / "out", *OVERRIDES).to_toml())
    return path


def inline(tmp_path: Path, config: Path) -> Report:
    return run(Experiment.load(config, [f'out="{tmp_path / "inline"}"']))


def of_flower(tmp_path: Path) -> tuple[Report, dict[str, torch.Tensor]]:
    folder = next((tmp_path / "out").iterdir())
    return Report.load(folder), load_file(folder / "model.safetensors")


def close(expected: Report, got: Report, params: dict[str, torch.Tensor]) -> None:
    assert got.summary["engine"] == "flower"
    for name, value in expected.params.items():
        torch.testing.assert_close(params[name], value, rtol=1e-6, atol=1e-6)
    sizes = ("round", "direction", "client", "section")
    assert got.ledger.total(by=sizes) == expected.ledger.total(by=sizes)


def test_superlink_with_two_supernodes(tmp_path: Path) -> None:
    config = written(tmp_path)
    with superlink(tmp_path / "flower", nodes=2) as env:
        log = flwr_run(env, "lo", run_config={"config": str(config)})
        listed = runs(env, "lo")
    assert "finished:completed" in str(listed[0]["status"]), log[-3000:]
    report, params = of_flower(tmp_path)
    close(inline(tmp_path, config), report, params)
    traffic = listed[0]["network-traffic"]
    predicted = sum(report.ledger.total(column="protocol_bytes").values())
    counted = int(traffic["inbound-bytes"]) + int(traffic["outbound-bytes"])
    assert predicted == pytest.approx(counted, rel=0.01), (
        traffic,
        report.ledger.total(by=("direction", "phase"), column="protocol_bytes"),
    )


def test_flwr_run(tmp_path: Path) -> None:
    config = written(tmp_path)
    env = environment(tmp_path / "flower")
    options = [
        "--federation-config",
        "num-supernodes=2",
        "--federation-config",
        "client-resources-num-cpus=1",
    ]
    try:
        log = flwr_run(env, *options, run_config={"config": str(config)})
    finally:
        # `flwr run` leaves a SuperLink of its own behind, on purpose.
        subprocess.run(["pkill", "-f", str(tmp_path / "flower" / "local-superlink")], check=False)
    assert (tmp_path / "out").exists(), log[-3000:]
    report, params = of_flower(tmp_path)
    close(inline(tmp_path, config), report, params)
