"""Right values of small things: unit singular vectors, shares of what may be sent, groups by content, studies of other data."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch
from federation import run_tiny
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm

from fl_sim import Experiment
from fl_sim.bench.capacity_study import measure
from fl_sim.data import Data
from fl_sim.data import load as load_data
from fl_sim.models.parameters import unit_singular_vectors
from fl_sim.report import grouped


def new_way(*, num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    return nn.Sequential(nn.Flatten(), parametrizations.spectral_norm(nn.Linear(64, 16)), nn.ReLU(), nn.Linear(16, 10))


def old_way(*, num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    return nn.Sequential(nn.Flatten(), spectral_norm(nn.Linear(64, 16)), nn.ReLU(), nn.Linear(16, 10))


@pytest.mark.parametrize(("model", "u"), [("new_way", "1.parametrizations.weight.0._u"), ("old_way", "1.weight_u")])
def test_averaged_singular_vectors_have_length_1(tmp_path: Path, model: str, u: str) -> None:
    report = run_tiny(
        tmp_path, f"model.name={__name__}:{model}", "training.lr=0.3", "training.steps=2", "evaluate.clients=2"
    )
    assert float(report.params[u].norm()) < 0.9999, "the mean of different unit vectors is shorter"
    saved = load_file(report.folder / "model.safetensors")
    assert float(saved[u].norm()) == pytest.approx(1.0, abs=1e-6)
    assert float(saved[u.removesuffix("u") + "v"].norm()) == pytest.approx(1.0, abs=1e-6)


def test_a_normalised_weight_is_right_in_evaluation() -> None:
    model = new_way(num_classes=10, in_channels=1, image_size=8, width=1.0)
    for _ in range(50):
        model.train()(torch.zeros(2, 64))  # power iterations
    right = model.eval()[1].weight.clone()
    norm = model[1].parametrizations.weight[0]
    norm._u.mul_(0.8)
    norm._v.mul_(0.7)
    assert not torch.allclose(model[1].weight, right, rtol=0.1)
    assert torch.allclose(unit_singular_vectors(model)[1].weight, right, rtol=1e-5)  # type: ignore[index]


def half_frozen(*, num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    model[1].requires_grad_(False)
    return model


def test_what_the_builder_froze_is_no_weight_that_could_be_sent(tmp_path: Path) -> None:
    dense = run_tiny(tmp_path / "dense", f"model.name={__name__}:half_frozen", "rounds=1")
    assert dense.results.density.uplink_mean == 1.0
    topk = run_tiny(
        tmp_path,
        f"model.name={__name__}:half_frozen",
        "rounds=1",
        "client.target=clients.presets:topk",
        "client.density=0.25",
    )
    assert topk.results.density.uplink_mean == pytest.approx(0.25)
    pruned = run_tiny(
        tmp_path / "pruned",
        f"model.name={__name__}:half_frozen",
        "rounds=1",
        "strategy.target=strategies.presets:global_magnitude",
        "strategy.density=0.5",
    )
    total = 64 * 32 + 32 + 32 * 10 + 10
    assert pruned.results.density.model == pytest.approx(1 - 0.5 * 320 / total)


def test_runs_from_copies_of_one_file_are_one_group(tmp_path: Path) -> None:
    trained = run_tiny(tmp_path / "first", "model.name=mlp", "rounds=1").folder / "model.safetensors"
    copy, other = tmp_path / "copy.safetensors", tmp_path / "other.safetensors"
    shutil.copy(trained, copy)
    shutil.copy(
        run_tiny(tmp_path / "second", "model.name=mlp", "rounds=1", "seed=5").folder / "model.safetensors", other
    )
    runs = [
        run_tiny(tmp_path / str(seed), "model.name=mlp", "rounds=1", f"model.weights={path}", f"seed={seed}")
        for seed, path in enumerate((trained, copy, other))
    ]
    assert [len(group.reports) for group in grouped(runs)] == [2, 1]


SHIFT = 0


def source() -> Data:
    digits = load_data("digits")
    images = (digits.train.stored.numpy().astype(int) + SHIFT).clip(0, 255).astype("uint8")
    labels = digits.train.labels.numpy()
    taken = slice(0, 200)
    return Data.of(
        images[taken], labels[taken], test_inputs=images[200:260], test_targets=labels[200:260], num_classes=10
    )


def test_a_study_of_other_data_trains_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tree = {
        "out": str(tmp_path),
        "data": {"source": f"{__name__}:source"},
        "training": {"steps": 1},
        "model": {"width": 0.125},
        "study": {"pairs": [["resnet8", "resnet8"]], "alphas": [0.5], "temperatures": [2.0]},
    }

    def trainings() -> int:
        told: list[object] = []
        measure(Experiment.from_tree(tree), seeds=[0, 1], on_trial=told.append)
        return len(told)

    first = trainings()
    assert first > 0
    assert trainings() == 0
    assert "changed" not in caplog.text
    monkeypatch.setattr(f"{__name__}.SHIFT", 3)
    with caplog.at_level(logging.WARNING):
        assert trainings() == first
    assert "the data (data.source" in caplog.text
