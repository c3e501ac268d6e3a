"""Distortion curves: prefix reuse against the naive measurement, exact zeros, pooling, the disk cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fl_sim.core.types import UserError
from fl_sim.data import load
from fl_sim.models import build, prunable_names
from fl_sim.models.partial_forward import resumed
from fl_sim.sparsity import RateDistortion, apply_mask, magnitude, topk_mask
from fl_sim.sparsity.curve_cache import cached_curves
from fl_sim.sparsity.curves import SUMMARIES, MeasureCurves, calibration, gaussian_calibration, pooled, squared_error
from fl_sim.sparsity.rate_distortion import kept_weights
from fl_sim.training import snapshot


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Awkward(nn.Module):
    """In-place sums, a module used twice, a tied weight, a weight used without its module, a list that is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.side = nn.Conv2d(1, 4, 1)
        self.relu = nn.ReLU(inplace=True)
        self.twice = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.split = Split()
        self.tied = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.tied.weight = self.twice.weight
        self.bare = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.first(x)
        out += self.side(x)
        self.relu(out)
        out = self.twice(self.relu(self.twice(out)))
        low, high = self.split(out)
        out = self.tied(low + high)
        flat = out.mean(dim=(2, 3))
        flat = flat + nn.functional.linear(flat, self.bare.weight)
        flat.add_(1)
        return self.head(flat)


class Split(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(x), x


def models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    made = {
        "awkward": Awkward(),
        "cnn_bn": build("cnn_bn", in_channels=1, image_size=8),
        "resnet8": build("resnet8", in_channels=1, image_size=8, width=0.5),
        "mlp": build("mlp", in_channels=1, image_size=8),
    }
    for model in made.values():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return made


def naive(model: nn.Module, images: Tensor, name: str, levels: int, batch_size: int) -> Tensor:
    """(levels, N): prune by the mask functions, run the whole model."""
    model.eval()
    weight = model.get_parameter(name).detach()
    original = weight.clone()
    found = []
    with torch.no_grad():
        for kept in kept_weights(weight.numel(), levels):
            rows = []
            for part in images.split(batch_size):
                reference = model(part)
                mask = topk_mask(magnitude({name: original}), {name: kept})
                weight.copy_(apply_mask({name: original}, mask)[name])
                rows.append(squared_error(model(part), reference))
                weight.copy_(original)
            found.append(torch.cat(rows))
    return torch.stack(found)


@pytest.mark.parametrize("which", ["awkward", "cnn_bn", "resnet8", "mlp"])
def test_curves_equal_the_naive_ones_bit_for_bit(which: str) -> None:
    model = models()[which]
    images = gaussian_calibration((1, 8, 8), 7)
    for summary in SUMMARIES.values():
        measured = MeasureCurves(levels=6, summary=summary.name, batch_size=3)(model, images)
        assert list(measured) == prunable_names(model)
        for name, curve in measured.items():
            oracle = naive(model, images, name, 6, 3)
            assert curve == [summary.of(level) for level in oracle], name
            assert curve[0] == 0.0


@pytest.mark.parametrize("which", ["resnet18", "vgg16", "densenet121", "mobilenet_v1", "wrn-16-8", "fastgrnn"])
def test_models_of_the_papers_agree(which: str) -> None:
    model = build(which, in_channels=1, image_size=8).eval()
    images = gaussian_calibration((1, 8, 8), 2)
    names = prunable_names(model)
    for name in (names[0], *names[5 : -1 : 1 + len(names) // 4], names[-1]):
        parameter = model.get_parameter(name)
        before = parameter.detach().clone()
        with resumed(model, name, images) as (reference, again):
            assert torch.equal(reference, model(images))
            parameter.detach().mul_(0.5)
            changed = again()
            assert not torch.equal(changed, reference)
        with torch.no_grad():
            assert torch.equal(changed, model(images))
        parameter.detach().copy_(before)


def test_a_model_that_trained_with_channels_last_is_measured_as_any_other() -> None:
    model, images = build("resnet8", seed=1), torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    measure = MeasureCurves(levels=4)
    plain = measure(model, images)
    placed = measure(model.to(memory_format=torch.channels_last), images)  # type: ignore[call-overload]
    assert any(weight.shape[2:] == (1, 1) for weight in (model.get_parameter(name) for name in plain))
    for name, curve in plain.items():
        assert placed[name] == pytest.approx(curve, rel=1e-3, abs=1e-6)


def test_only_later_layers_run_again() -> None:
    model = build("resnet8", in_channels=1, image_size=8)
    model.eval()
    calls: list[str] = []
    for name in ("conv1", "layer1.0.conv1", "layer2.0.conv1", "layer2.0.conv2", "layer3.0.conv1", "fc"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    with resumed(model, "layer2.0.conv2.weight", torch.zeros(1, 1, 8, 8)) as (_, again):
        calls.clear()
        again()
        again()
    # The hooks of a skipped module still fire, so what is inside a skipped module tells.
    assert "layer1.0.conv1" not in calls
    assert calls.count("layer3.0.conv1") == calls.count("fc") == calls.count("layer2.0.conv2") == 2


def test_the_model_is_left_as_it_was() -> None:
    model = build("cnn_bn", in_channels=1, image_size=8)
    model[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    with pytest.raises(ZeroDivisionError):
        MeasureCurves(levels=3)(model, torch.randn(2, 1, 8, 8), progress=lambda done, total: 1 // 0)
    MeasureCurves(levels=3)(model, torch.randn(2, 1, 8, 8))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_levels_that_prune_zeros_cost_nothing_and_change_nothing() -> None:
    model = build("mlp", in_channels=1, image_size=8).eval()
    weight = model[3].weight.detach()
    weight.view(-1)[: weight.numel() // 2] = 0.0
    passes: list[int] = []
    model[3].register_forward_hook(lambda *_: passes.append(1))
    curve = MeasureCurves(levels=11)(model, torch.randn(4, 1, 8, 8), ["3.weight"])["3.weight"]
    assert curve[:6] == [0.0] * 6
    assert min(curve[6:]) > 0
    assert len(passes) == 1 + 5


def test_progress_is_told() -> None:
    seen: list[tuple[int, int]] = []
    MeasureCurves(levels=2)(models()["mlp"], torch.randn(1, 1, 8, 8), progress=lambda *at: seen.append(at))
    assert seen == [(1, 2), (2, 2)]


@pytest.mark.parametrize("summary", ["mean", "worst"])
def test_curves_of_parts_pool_to_the_curves_of_all_images(summary: str) -> None:
    model = models()["resnet8"]
    images = gaussian_calibration((1, 8, 8), 12)
    measure = MeasureCurves(levels=5, summary=summary)
    parts = images.split([5, 1, 6])
    together = pooled([measure(model, part) for part in parts], [len(part) for part in parts], summary=summary)
    whole = measure(model, images)
    assert whole.keys() == together.keys()
    for name in whole:
        assert together[name] == pytest.approx(whole[name], rel=1e-5, abs=1e-9)


def test_allocation_from_measured_curves_beats_uniform_on_what_it_minimises() -> None:
    model = build("cnn_bn", in_channels=1, image_size=8)
    images = calibration(load("digits").validation, 32)
    measure = MeasureCurves(levels=21)
    scores = magnitude({name: snapshot(model)[name] for name in prunable_names(model)})
    curves = measure(model, images)
    keep = RateDistortion(curves)(scores, 0.3)
    total = sum(score.numel() for score in scores.values())
    assert sum(keep.values()) == round(0.3 * total)

    def predicted(counts: dict[str, int]) -> float:
        return sum(
            curves[name][next(q for q, kept in enumerate(kept_weights(scores[name].numel(), 21)) if kept <= count)]
            for name, count in counts.items()
        )

    assert predicted(keep) <= predicted({name: round(0.3 * score.numel()) for name, score in scores.items()})


def test_the_disk_cache_measures_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FL_SIM_CACHE", str(tmp_path))
    model, images = models()["cnn_bn"], torch.randn(3, 1, 8, 8)
    measure = MeasureCurves(levels=4)
    seen: list[int] = []

    def measured(*, using: MeasureCurves = measure) -> dict[str, list[float]]:
        return cached_curves(using, model, images, progress=lambda done, total: seen.append(done))

    first = measured()
    assert first == measure(model, images)
    assert measured() == first
    assert seen == [1, 2, 3, 4]
    measured(using=MeasureCurves(levels=4, summary="worst"))
    assert len(seen) == 8
    model[0].weight.detach().mul_(2)
    assert measured() != first
    for file in (tmp_path / "curves").iterdir():
        file.write_text('{"0.weight": [1')
    assert measured() == measure(model, images)
    assert {file.suffix for file in (tmp_path / "curves").iterdir()} == {".json"}


def test_curves_of_bfloat16_weights_are_kept_by_their_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FL_SIM_CACHE", str(tmp_path))
    model, images = nn.Linear(4, 3).bfloat16(), torch.randn(5, 4).bfloat16()
    measure = MeasureCurves(levels=4)
    assert cached_curves(measure, model, images) == measure(model, images)
    model.weight.detach()[0, 0] += 1
    assert cached_curves(measure, model, images) == measure(model, images)
    assert len(list((tmp_path / "curves").iterdir())) == 2


def test_calibration_images_are_fixed_and_spread() -> None:
    split = load("digits").validation
    images = calibration(split, 10)
    assert torch.equal(images, calibration(split, 10))
    assert images.shape == (10, 1, 8, 8)
    assert len(calibration(split, 10**6)) == len(split)
    assert torch.equal(gaussian_calibration((3, 4, 4), 5), gaussian_calibration((3, 4, 4), 5))


@pytest.mark.parametrize(
    "wrong",
    [lambda: MeasureCurves(levels=1), lambda: MeasureCurves(summary="median"), lambda: MeasureCurves(batch_size=0)],
)
def test_wrong_options_are_refused(wrong) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError):
        wrong()


def test_no_images_are_refused() -> None:
    with pytest.raises(UserError, match="no images"):
        MeasureCurves()(models()["mlp"], torch.zeros(0, 1, 8, 8))
    with pytest.raises(UserError, match="calibration images = 0"):
        calibration(load("digits").validation, 0)
