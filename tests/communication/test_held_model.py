"""Runs whose values code against the model that the receiver holds: the same training, fewer bytes; else refused before it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from federation import run_tiny, tiny

from fl_sim import Report
from fl_sim.core.types import UserError
from fl_sim.simulation.replaying import asked, replay_run

UP, BROADCAST = (
    "wire.uplink.values=float32-delta",
    ["wire.broadcast.density=1.0", "wire.broadcast.values=float32-delta"],
)
PRUNED = ["strategy.target=strategies.presets:global_magnitude", "strategy.density=0.3", "strategy.at=1"]


def bytes_of(report: Report) -> dict[str, int]:
    return {str(way): size for (way,), size in report.ledger.total(by=("direction",)).items()}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return run_tiny(tmp_path_factory.mktemp("dense"))


@pytest.mark.parametrize("method", [[], PRUNED], ids=["dense", "pruned"])
def test_training_is_the_same_and_bytes_are_fewer(tmp_path: Path, dense: Report, method: list[str]) -> None:
    plain = run_tiny(tmp_path / "plain", *method) if method else dense
    held = run_tiny(tmp_path / "held", *method, UP, *BROADCAST)
    assert all(torch.equal(plain.params[name], value) for name, value in held.params.items())
    assert bytes_of(held)["up"] < 0.85 * bytes_of(plain)["up"]
    assert bytes_of(held)["down"] < 0.9 * bytes_of(plain)["down"]


def test_the_downlink_alone_codes_against_the_seeded_model(tmp_path: Path, dense: Report) -> None:
    plain, held = dense, run_tiny(tmp_path, "wire.downlink.values=float32-delta", UP)
    assert all(torch.equal(plain.params[name], value) for name, value in held.params.items())
    assert bytes_of(held)["down"] < 0.75 * bytes_of(plain)["down"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["wire.uplink.values=float32-delta", "wire.uplink.content=difference"], "allowed: parameters"),
        ([UP, "wire.downlink.values=bfloat16"], "bit for bit"),
        ([UP, "wire.downlink.content=difference"], "bit for bit"),
    ],
)
def test_what_cannot_be_held_is_refused(tmp_path: Path, options: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        tiny(tmp_path, *options)


def test_a_downlink_that_is_rounded_for_each_layer_is_refused(tmp_path: Path) -> None:
    options = ["strategy.target=strategies.presets:layer_adaptive", "strategy.kilobytes=20", "data.noise=8"]
    with pytest.raises(UserError, match="leaves the downlink"):
        run_tiny(tmp_path, *options, UP)


def test_smallest_masks_change_bytes_alone_and_a_replay_knows_them(tmp_path: Path) -> None:
    options = ["client.target=clients.presets:topk", "client.density=0.05", "wire.record_payloads=1"]
    plain = run_tiny(tmp_path / "plain", *options)
    small = run_tiny(tmp_path / "small", *options, "wire.uplink.masks=smallest")
    assert all(torch.equal(plain.params[name], value) for name, value in small.params.items())
    up = bytes_of(small)["up"]
    assert up < bytes_of(plain)["up"]
    recoding = asked(plain, ["wire.uplink.masks=smallest"])
    assert replay_run(plain, recoding).total("up") == up


def test_an_unknown_way_of_masks_is_refused(tmp_path: Path) -> None:
    for key in ("wire.uplink.masks", "wire.broadcast.masks"):
        with pytest.raises(UserError, match="allowed: fast, smallest"):
            tiny(tmp_path, f"{key}=small")
