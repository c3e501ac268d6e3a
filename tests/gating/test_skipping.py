"""Inference that skips: the same function as the gated model, in narrow tensors; the benchmark that times it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from federation import run_tiny
from gated import images, lively, unit
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner

from fl_sim.cli.app import app
from fl_sim.core.types import UserError
from fl_sim.gating import Gated, backward_only, gate, keeping
from fl_sim.gating.narrow import add_channels, highest, widen
from fl_sim.gating.skipping import exported, folded, skipping
from fl_sim.models import build
from fl_sim.training.model_file import read_model


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-5 * b.abs().max())


@pytest.mark.parametrize("keep", [0.1, 0.5, 1.0])
@pytest.mark.parametrize(
    ("name", "salience"),
    [
        *((name, salience) for name in ("cnn_bn", "resnet8") for salience in ("gate", "gate_relu", "weight")),
        ("resnet18", "gate"),
    ],
)
def test_skipping_is_the_gated_model(name: str, keep: float, salience: str) -> None:
    gated, x = gate(lively(build(name)), keep, salience).eval(), images(2)
    with torch.no_grad():
        assert close(skipping(gated)(x), gated(x))


def test_bottlenecks_skip_too() -> None:
    gated, x = gate(lively(build("resnet50")), {"layer2": 0.5}).eval(), images(1, 8)
    with torch.no_grad():
        assert close(skipping(gated)(x), gated(x))


def test_patterns_and_ties() -> None:
    x = images(3)
    for keep in ({"*.conv1": 0.5}, {"*.conv2": 0.5}, {"layer1": 0.25, "layer3": 1.0}):
        gated = gate(lively(build("resnet8")), keep).eval()
        with torch.no_grad():
            assert close(skipping(gated)(x), gated(x))
            tied = unit(gated)
            assert close(skipping(tied)(x), tied(x))


class Pools(nn.Module):
    """Narrow values through pooling, two additions and a flattened map; a depthwise convolution; a gate on raw input."""

    def __init__(self) -> None:
        super().__init__()

        def pair(before: int, after: int, groups: int = 1) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(before, after, 3, padding=1, groups=groups), nn.BatchNorm2d(after))

        self.stem, self.left, self.right = pair(3, 8), pair(8, 8), pair(8, 8)
        self.depthwise, self.last = pair(8, 8, groups=8), pair(8, 12)
        self.pool, self.flatten, self.fc = nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12 * 16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = torch.relu(self.left(x)) + self.pool(self.right(x)).repeat_interleave(2, 2).repeat_interleave(2, 3)
        x = self.pool(torch.relu(self.depthwise(x)))
        return self.fc(self.flatten(self.pool(torch.relu(self.last(x)))))


@pytest.mark.parametrize("salience", ["gate", "weight"])
def test_other_ways_through_a_graph(salience: str) -> None:
    torch.manual_seed(0)
    gated, x = gate(lively(Pools()), 0.5, salience).eval(), images(2)
    assert len(gated.gates) == 4
    with torch.no_grad():
        assert close(skipping(gated)(x), gated(x))
    assert (gated.count_macs(x) < gate(Pools(), 1.0, salience).count_macs(x)).all()


def test_convolutions_really_are_narrow() -> None:
    gated = gate(lively(build("resnet8")), 0.5).eval()
    fast, shapes = skipping(gated), []
    convolve = torch.nn.functional.conv2d
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.nn.functional, "conv2d", lambda x, w, *rest: shapes.append(w.shape) or convolve(x, w, *rest)
        )
        fast(images(1, 32))
    macs = sum(w.numel() * p for w, p in zip(shapes, [1024] * 3 + [256] * 3 + [64] * 3, strict=True)) + 640
    assert macs == gated.count_macs(images(1, 32)).item()


def test_folding_keeps_the_function_and_exporting_too(tmp_path: Path) -> None:
    model, x = lively(build("resnet8")).eval(), images(1)
    gated = gate(model, 0.5).eval()
    fast = skipping(gated)
    with torch.no_grad():
        assert close(folded(model)(x), model(x))
        script = exported(fast, images(1, seed=1))
        assert close(script(x), gated(x))
        script.save(str(tmp_path / "fast.pt"))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fast.modules())


@given(st.permutations(range(6)), st.integers(1, 6))
def test_channels_return_to_their_places(order: list[int], k: int) -> None:
    channels, values = torch.tensor(order[:k]), torch.randn(1, k, 2, 2)
    wide = widen(values, channels, 6)
    assert torch.equal(wide[:, channels], values)
    assert wide.count_nonzero() == values.count_nonzero()
    dense = torch.randn(1, 6, 2, 2)
    assert torch.equal(add_channels(dense, values, channels), dense + wide)
    assert highest(torch.tensor([0.5, 1.0, 0.5, 1.0]), 3).tolist() == [1, 3, 0]


def test_what_cannot_skip_is_refused() -> None:
    for made in (gate(build("resnet8"), salience=s) for s in ("activation", "taylor")):
        with pytest.raises(UserError, match="nothing to skip"):
            skipping(made)
    with pytest.raises(UserError, match="nothing to skip"):
        skipping(gate(build("resnet8"), masking=backward_only))


def test_the_benchmark_runs() -> None:
    command = ["bench", "inference", "--model", "resnet8", "--repeats", "3", "--side", "16", "--json"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    rows = json.loads(done.output)["rows"]
    assert [r["speedup"] for r in rows if r["execution"] == "dense"] == [1.0]
    for row in rows:
        assert 0 < row["low"] <= row["microseconds"] <= row["high"]
        assert row["macs"] == pytest.approx(
            rows[0]["macs"] * (1 if row["execution"].startswith("dense") else 0.5), rel=0.1
        )


def test_the_documented_export_is_the_runs_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path("docs/adaptive_pruning.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    report = run_tiny(tmp_path, "client.target=clients.presets:adaptive_pruning", "gating.salience=gate", "rounds=1")
    (tmp_path / "runs").mkdir()
    report.folder.rename(tmp_path / "runs" / "digits-adaptive")
    monkeypatch.chdir(tmp_path)
    model = read_model(Path("runs/digits-adaptive"))
    assert isinstance(model, Gated)
    exec(compile(code, "docs", "exec"), {})
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert close(torch.jit.load("global.pt")(x), model(x))
        with keeping(model, 0.25):
            assert close(torch.jit.load("small.pt")(x), model(x))
            assert not close(torch.jit.load("global.pt")(x), model(x))
