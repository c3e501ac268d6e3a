"""Per-sample gates: identities with the plain network, exact zeros, independence of the batch, MACs, stability."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torchvision
from gated import images, lively, unit
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from fl_sim import count_macs
from fl_sim.core.types import UserError
from fl_sim.data import load as load_data
from fl_sim.gating import SALIENCES, Gated, backward_only, gate
from fl_sim.gating.graph import kept_channels, top_channels
from fl_sim.models import build, freeze, head_names, personal_names, prunable_names
from fl_sim.training import TrainingDiverged, local_sgd, snapshot

SKIPPING = ("gate", "gate_relu", "weight")


@given(
    st.lists(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=6, max_size=6), min_size=1), st.integers(1, 6)
)
def test_top_channels_are_exact_with_ties_to_the_lowest_index(rows: list[list[float]], keep: int) -> None:
    mask = top_channels(torch.tensor(rows), keep)
    for row, chosen in zip(rows, mask.tolist(), strict=True):
        best = sorted(range(6), key=lambda c: (-row[c], c))[:keep]
        assert [c for c in range(6) if chosen[c]] == sorted(best)


@given(st.integers(1, 512), st.integers(1, 100))
def test_kept_channels_are_rounded_to_the_nearest_number(channels: int, percent: int) -> None:
    kept = kept_channels(percent / 100, channels)
    assert kept >= 1
    assert abs(100 * kept - percent * channels) <= 50 or kept == 1


def test_kept_channels_are_those_of_the_authors_code() -> None:
    assert [kept_channels(0.7, channels) for channels in (16, 32, 64, 10)] == [11, 22, 45, 7]
    assert [kept_channels(ratio, 5) for ratio in (0.01, 0.1, 0.5, 0.7, 1.0)] == [1, 1, 2, 4, 5]  # halves go to even


@pytest.mark.parametrize("salience", ["gate", "activation", "taylor", "weight"])
@pytest.mark.parametrize("name", ["cnn_bn", "resnet8", "resnet18"])
def test_keeping_all_with_unit_gates_is_the_plain_network_bit_for_bit(name: str, salience: str) -> None:
    model = lively(build(name))
    gated, x = unit(gate(model, keep=1.0, salience=salience)), images(3)
    for mode in (True, False):
        model.train(mode)
        gated.train(mode)
        assert torch.equal(model(x), gated(x))
    model.train()(x).square().sum().backward()
    gated.train()(x).square().sum().backward()
    own = dict(gated.named_parameters())
    for path, p in model.named_parameters():
        assert torch.equal(p.grad, own[f"net.{path}"].grad), path


@pytest.mark.parametrize("salience", [s for s in SALIENCES if s != "taylor"])
@pytest.mark.parametrize("masking", ["both_ways", "backward_only"])
def test_a_channel_off_for_the_whole_batch_has_exactly_zero_gradient(salience: str, masking: str) -> None:
    import fl_sim.gating

    gated = gate(lively(build("resnet8")), keep=0.25, salience=salience, masking=getattr(fl_sim.gating, masking))
    gated.train()(images(2)).square().sum().backward()
    grads = {name: p.grad for name, p in gated.named_parameters()}
    off_somewhere = 0
    for conv, mask in gated.masks().items():
        on = mask.any(dim=0)
        off_somewhere += int((~on).sum())
        for name in gated.groups[conv]:
            if masking == "backward_only" and "gates" in name:
                continue  # the dense forward pass multiplies by every score
            rows = grads[name].flatten(1) if grads[name].dim() > 1 else grads[name][:, None]
            assert bool((rows[~on] == 0).all()), name
            assert bool((rows[on] != 0).any(dim=1).all()) or rows.shape[1] == 1, name
    assert off_somewhere > 10


def test_the_gradient_is_the_sum_over_the_samples_that_had_the_channel_on() -> None:
    model = gate(lively(build("cnn_bn")), keep=0.5).eval()
    x = images(6)

    def gradient(batch: Tensor) -> Tensor:
        model.zero_grad()
        model(batch).square().sum().backward()
        return model.net.get_parameter("6.weight").grad.clone()

    alone = [gradient(x[i : i + 1]) for i in range(6)]
    masks = []
    for i in range(6):
        model(x[i : i + 1])
        masks.append(model.masks()["6"][0])
    expected = sum(g * m.view(-1, 1, 1, 1) for g, m in zip(alone, masks, strict=True))
    assert torch.allclose(gradient(x), expected, rtol=1e-4, atol=1e-6)
    assert all(bool((g[~m] == 0).all()) for g, m in zip(alone, masks, strict=True))


@pytest.mark.parametrize("salience", list(SALIENCES))
def test_masks_do_not_depend_on_the_batch(salience: str) -> None:
    gated = gate(lively(build("resnet8")), keep=0.5, salience=salience).eval()
    x = images(5)
    with torch.no_grad():
        together = gated(x)
        masks = gated.masks()
        for i in range(5):
            assert (gated(x[i : i + 1])[0] - together[i]).abs().max() < 1e-4 * together.abs().max()
            assert all(torch.equal(gated.masks()[conv][0], mask[i]) for conv, mask in masks.items())


def brute_force(gated: Gated, sample: Tensor, skips: bool) -> int:
    """MACs of one sample of a gated resnet8, counted one (input channel, output channel) pair at a time."""
    plain = build("resnet8")
    gated(sample[None])
    on = {conv: mask[0].tolist() for conv, mask in gated.masks().items()}
    side = {"conv1": 16, "layer1": 16, "layer2": 8, "layer3": 4}
    total = plain.fc.weight.numel()
    for path, conv in plain.named_modules():
        if not isinstance(conv, nn.Conv2d):
            continue
        for c_out in range(conv.out_channels):
            for c_in in range(conv.in_channels):
                computed = not skips or on.get(path, [True] * 999)[c_out]
                fed = not path.endswith("conv2") or on[path.replace("conv2", "conv1")][c_in]
                if computed and fed:
                    total += conv.kernel_size[0] ** 2 * side[path.split(".")[0]] ** 2
    return total


@pytest.mark.parametrize("salience", ["gate", "weight", "activation"])
def test_macs_equal_a_brute_force_count(salience: str) -> None:
    gated = gate(lively(build("resnet8")), keep=0.4, salience=salience).eval()
    x = images(2)
    assert gated.count_macs(x).tolist() == [brute_force(gated, s, salience in SKIPPING) for s in x]
    assert not gated.training


@pytest.mark.parametrize(("name", "macs"), [("resnet20", 40.81e6), ("resnet32", 69.13e6)])
@pytest.mark.parametrize("salience", list(SALIENCES))
def test_macs_with_every_channel_on_are_the_dense_count(name: str, macs: float, salience: str) -> None:
    model = build(name)
    counted = gate(model, keep=1.0, salience=salience).count_macs(images(2, 32))
    assert counted.dtype == torch.int64
    assert counted.tolist() == [count_macs(model, (3, 32, 32))] * 2
    assert counted[0].item() == pytest.approx(macs, rel=2e-3)


@pytest.mark.parametrize("name", ["cnn_bn", "resnet50"])
def test_what_saves_macs_and_what_does_not(name: str) -> None:
    model, x = build(name), images(2)
    dense = count_macs(model, (3, 16, 16))
    mean = {s: gate(model, keep=0.5, salience=s).count_macs(x).float().mean().item() for s in SALIENCES}
    assert mean["taylor"] == dense
    assert mean["gate"] == mean["weight"] < mean["activation"] < dense
    assert gate(model, keep=0.5, masking=backward_only).count_macs(x).tolist() == [dense] * 2


def test_half_the_macs_of_resnet32_take_a_ratio_of_about_0_62() -> None:
    gated = gate(build("resnet32"), keep=0.618)
    assert gated.count_macs(images(1, 32)).item() / 69.13e6 == pytest.approx(0.5, abs=0.02)
    assert gated.gate_macs < 0.001 * 69.13e6


def test_keep_by_layer_and_wrong_input() -> None:
    model = build("resnet8")
    gated = gate(model, keep={"layer1": 0.5, "layer1.0.conv2": 0.25, "layer3.*": 1.0})
    assert gated.keep == {"layer1.0.conv1": 0.5, "layer1.0.conv2": 0.25, "layer3.0.conv1": 1.0, "layer3.0.conv2": 1.0}
    assert list(gate(model, keep={"*.conv1": 0.5}).gates) == [f"layer{i}.0.conv1" for i in (1, 2, 3)]
    gated.set_keep(0.01)
    assert all(g.kept == 1 for g in gated.gates.values())
    for keep in (0.0, 1.5, float("nan"), {"layer9": 0.5}, {"layer1": -1.0}):
        with pytest.raises(UserError, match=r"^gating\.keep.*(must be|no gated convolution)"):
            gate(model, keep=keep)
    with pytest.raises(UserError, match="did you mean 'gate'"):
        gate(model, salience="gates")
    with pytest.raises(UserError, match="no inner convolution"):
        gate(build("mlp", image_size=8))


def test_the_model_is_left_alone_and_the_seed_decides() -> None:
    model = build("cnn_bn")
    before, state = snapshot(model).flat, torch.random.get_rng_state()
    first, same, other = (gate(model, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    first.train()(images(2)).sum().backward()
    assert torch.equal(snapshot(model).flat, before)
    assert all(p.grad is None for p in model.parameters())
    for name in (n for n, _ in first.named_parameters() if "gates" in n):
        assert torch.equal(first.get_parameter(name), same.get_parameter(name))
        assert not torch.equal(first.get_parameter(name), other.get_parameter(name))


@pytest.mark.parametrize("salience", list(SALIENCES))
def test_use_counts_what_was_on(salience: str) -> None:
    gated = gate(lively(build("cnn_bn")), keep=0.25, salience=salience).train()
    counts = {conv: torch.zeros(g.channels) for conv, g in gated.gates.items()}
    for seed in range(3):
        gated(images(4, seed=seed)).square().sum().backward()
        for conv, mask in gated.masks().items():
            counts[conv] += mask.sum(0)
    gated.eval()(images(4))
    for conv, use in gated.use().items():
        assert torch.equal(use.active, counts[conv] / 12)
        assert use.active.sum().item() == pytest.approx(0.25 * len(use.active))
        assert bool(((use.salience > 0) == (use.active > 0)).all())
    gated.reset()
    assert all(not use.salience.any() and not use.active.any() for use in gated.use().values())


def test_counters_and_masks_are_no_parameters_of_the_federation() -> None:
    gated = gate(build("resnet8"))
    plain = build("resnet8")
    names = set(snapshot(gated))
    assert {n for n in names if "gates" not in n} == {f"net.{n}" for n in snapshot(plain)}
    assert {n for n in names if "gates" in n} == {n for n, _ in gated.named_parameters() if "gates" in n}
    assert set(prunable_names(gated)) > {f"net.{n}" for n in prunable_names(plain)}


@pytest.mark.parametrize("salience", ["gate", "activation", "weight"])
def test_layout_and_dtype_change_results_within_tolerance_only(salience: str) -> None:
    gated, x = gate(lively(build("resnet8")), keep=0.5, salience=salience).eval(), images(4)
    with torch.no_grad():
        plain = gated(x)
        last = copy.deepcopy(gated).to(memory_format=torch.channels_last)
        assert torch.allclose(last(x.contiguous(memory_format=torch.channels_last)), plain, rtol=1e-3, atol=1e-4)
        seen = []
        gated.net.get_submodule("gates.layer1_0_conv1").register_forward_hook(lambda m, i, o: seen.append(o.dtype))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = gated(x).float()
    assert seen == [torch.bfloat16]
    assert (half - plain).abs().mean() < 0.2 * plain.abs().mean()


@pytest.mark.parametrize(
    "salience", ["gate", "weight", *(pytest.param(s, marks=pytest.mark.slow) for s in ("activation", "taylor"))]
)
def test_200_steps_at_a_high_rate_stay_finite_and_fall(salience: str) -> None:
    data = load_data("digits").train
    gated = gate(build("resnet8", in_channels=1, width=0.5), keep=0.5, salience=salience)
    rng = torch.Generator().manual_seed(0)
    first = local_sgd(gated, data, lr=0.1, steps=20, batch_size=16, rng=rng)["loss"]
    local_sgd(gated, data, lr=0.1, steps=160, batch_size=16, rng=rng)
    last = local_sgd(gated, data, lr=0.1, steps=20, batch_size=16, rng=rng)["loss"]
    assert last < 0.5 * first


@pytest.mark.parametrize("salience", list(SALIENCES))
def test_a_step_never_waits_for_the_device(salience: str) -> None:
    gated = gate(build("resnet8"), keep=0.5, salience=salience).train()
    # Fake tensors have no values: whatever asks for one (a branch, `.item()`, an index of unknown size) raises.
    with FakeTensorMode(allow_non_fake_inputs=True):
        out = gated(torch.randn(2, 3, 8, 8)).square().mean()
        out.backward()
        with pytest.raises(DataDependentOutputException):
            float(out.detach())


def without_its_classifier(make: Callable[[], nn.Module]) -> nn.Module:
    """A VGG without its 120 million weights behind the last convolution, which are never made."""
    with torch.device("meta"):
        model = make()
        model.classifier = nn.Linear(512 * 7 * 7, 10)
    model.to_empty(device="cpu")
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear):
            module.reset_parameters()
    return model


FAMILIES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(num_classes=10), 51),
    "mobilenet_v1": (lambda: build("mobilenet_v1", width=0.25), 26),
    "vgg11_bn": (lambda: without_its_classifier(torchvision.models.vgg11_bn), 7),
    "vgg16": (lambda: build("vgg16"), 12),
    "wrn-16-8": (lambda: build("wrn-16-8", width=0.125), 6),
}


@pytest.mark.parametrize("name", list(FAMILIES))
def test_other_families(name: str) -> None:
    make, gates = FAMILIES[name]
    model, x = lively(make()).eval(), images(2, 32)
    gated = unit(gate(model, keep=1.0)).eval()
    assert len(gated.gates) == gates
    with torch.no_grad():
        assert torch.equal(gated(x), model(x))
    assert gated.count_macs(x).tolist() == [count_macs(model, (3, 32, 32))] * 2
    assert (gate(model, keep=0.5).count_macs(x) < 0.75 * gated.count_macs(x)).all()


def test_the_published_gate_diverges_where_the_bounded_one_trains() -> None:
    data, options = load_data("digits").train, {"lr": 0.1, "steps": 6, "batch_size": 32}
    for salience, outcome in (("gate_relu", pytest.raises(TrainingDiverged)), ("gate", nullcontext())):
        rng = torch.Generator().manual_seed(0)
        with outcome:
            local_sgd(gate(build("resnet20", in_channels=1), salience=salience), data, rng=rng, **options)


def test_the_head_of_a_gated_model_is_its_classifier() -> None:
    """The gates have linear layers, which come after the classifier in module order."""
    plain = build("cnn_bn", in_channels=1, image_size=8)
    gated = gate(build("cnn_bn", in_channels=1, image_size=8), seed=0)
    assert any("linear" in name for name, _ in gated.named_parameters())
    assert head_names(gated) == [f"net.{name}" for name in head_names(plain)] == ["net.11.weight", "net.11.bias"]
    assert personal_names(gated, "head") == head_names(gated)
    assert freeze(gated, "head") == head_names(gated)


@pytest.mark.parametrize("wrap", [torch.jit.script, lambda model: torch.compile(model, backend="eager")])
def test_a_model_that_is_no_plain_module_is_refused_in_one_line(wrap: Callable[[nn.Module], nn.Module]) -> None:
    wrapped = wrap(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)))
    with pytest.raises(UserError, match="cannot be traced, as gates and cut channels need it") as told:
        gate(wrapped, {"*": 0.5})
    assert "\n" not in str(told.value)
