"""The training loop: equal to plain PyTorch, masks hold, nothing global is touched."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fl_sim.core.types import UserError
from fl_sim.data import Split
from fl_sim.models import batchnorm_names, build, prunable_names
from fl_sim.sparsity import apply_mask, magnitude, topk_mask, uniform
from fl_sim.training import Training, TrainingDiverged, evaluate, load, local_sgd, snapshot
from fl_sim.training.loop import check_converged
from fl_sim.training.losses import CrossEntropy, Distillation, Proximal, cross_entropy
from fl_sim.training.optimizers import SGD, AdamW
from fl_sim.training.precision import PRECISIONS, choose, times_float32


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def split(count: int = 40, shape: tuple[int, ...] = (3, 8, 8)) -> Split:
    images = torch.randint(0, 256, (count, *shape), generator=rng(1), dtype=torch.uint8)
    labels = torch.randint(0, 10, (count,), generator=rng(2))
    return Split(images, labels, torch.full((shape[0],), 0.5), torch.full((shape[0],), 0.25))


def small(name: str = "cnn_bn", **options: int) -> nn.Module:
    return build(name, in_channels=3, image_size=8, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"weight_decay": 1e-3},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-3},
        {"clip_norm": 0.1},
    ],
)
def test_one_epoch_is_plain_sgd_bit_for_bit(options: dict[str, float]) -> None:
    data, ours, plain = split(), small(), small()
    local_sgd(ours, data, lr=0.1, batch_size=16, epochs=2, rng=rng(), **options)
    source = rng()
    torch.randint(2**62, (), generator=source)  # the seed of dropout is drawn first
    clip = options.pop("clip_norm", None)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, foreach=False, fused=False, **options)
    plain.train()
    images = data.images.float() * (1 / (255 * 0.25)) - 2.0
    for part in (p for _ in range(2) for p in torch.randperm(40, generator=source).split(16)):
        optimizer.zero_grad()
        functional.cross_entropy(plain(images[part]), data.labels[part]).backward()
        if clip:
            nn.utils.clip_grad_norm_(plain.parameters(), clip)
        optimizer.step()
    for name, value in snapshot(ours).items():
        assert torch.equal(value, plain.state_dict()[name]), name


def test_a_step_leaves_parameters_without_a_gradient_where_they_are() -> None:
    """As `torch.optim.SGD` does, whose momentum then starts when the first gradient comes."""
    ours, theirs = ([nn.Parameter(torch.ones(3)) for _ in range(2)] for _ in range(2))
    own, reference = SGD(ours, 0.9), torch.optim.SGD(theirs, lr=0.5, momentum=0.9)
    own.step(0.5)
    for chosen in ([0], [0, 1], [1]):
        for parameters in (ours, theirs):
            for i, parameter in enumerate(parameters):
                parameter.grad = torch.full((3,), 0.3 + i) if i in chosen else None
        own.step(0.5)
        reference.step()
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_adamw_is_pytorchs_bit_for_bit() -> None:
    """Also in the layout of channels last, for two dtypes, and where parameters have a gradient in some steps only."""

    def made() -> list[nn.Parameter]:
        source = rng(3)
        values = [torch.randn(4, 3, 2, 2, generator=source), torch.randn(5, generator=source)]
        return [*map(nn.Parameter, (values[0].to(memory_format=torch.channels_last), values[1], values[1].double()))]

    ours, theirs = made(), made()
    own, reference = AdamW(ours, 0.1), torch.optim.AdamW(theirs, weight_decay=0.1, fused=True)
    own.step(0.5)
    for number, chosen in enumerate(([0], [0, 1, 2], [1], [0, 2], [0, 1, 2])):
        source = rng(number)
        gradients = [torch.randn(parameter.shape, generator=source) for parameter in ours]
        lr = reference.param_groups[0]["lr"] = 0.1 / (number + 1)
        for parameters in (ours, theirs):
            for i, parameter in enumerate(parameters):
                parameter.grad = gradients[i].to(parameter) if i in chosen else None
        own.step(lr)
        reference.step()
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not torch.equal(ours[0], made()[0])


def test_seeding_dropout_walks_no_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.manual_seed` writes down where it was called, three times, wherever there is no GPU; a small client notices."""

    def walked(*_: object, **__: object) -> None:
        raise AssertionError("a stack was walked")

    models = [small("cnn"), small("cnn")]
    monkeypatch.setattr("traceback.format_stack", walked)
    losses = [local_sgd(model, split(), lr=0.1, rng=rng(5))["loss"] for model in models]
    assert losses[0] == losses[1], "dropout draws from the client's generator"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"nesterov": True}, "needs training.momentum"),
        ({"momentum": -1.0}, r"training.momentum = -1.0: must be from 0 to"),
        ({"weight_decay": -1.0}, r"training.weight_decay = -1.0: must be from 0 to"),
    ],
)
def test_nonsense_of_sgd_is_refused(options: dict[str, float], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Training(**options)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_mask_holds_after_every_step(optimizer: str) -> None:
    model = small()
    scores = magnitude({n: p for n, p in model.named_parameters() if n in prunable_names(model)})
    mask = topk_mask(scores, uniform(scores, 0.3))
    local_sgd(
        model, split(), lr=0.05, epochs=3, momentum=0.9, weight_decay=0.1, optimizer=optimizer, mask=mask, rng=rng()
    )
    for name, alive in mask.items():
        value = dict(model.named_parameters())[name]
        assert not value[~alive].any()
        assert not torch.signbit(value[~alive]).any()
        assert bool((value[alive] != 0).all())


def test_only_the_trainable_names_move() -> None:
    model = small()
    before = snapshot(model)
    local_sgd(model, split(), lr=0.1, weight_decay=0.5, momentum=0.9, trainable=batchnorm_names(model), rng=rng())
    moved = {name for name, value in snapshot(model).items() if not torch.equal(value, before[name])}
    assert moved == {*batchnorm_names(model), *(n for n in before if "running" in n)}
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="nope"):
        local_sgd(model, split(), trainable=["nope"])


def test_dropout_comes_from_the_generator_and_leaves_the_global_one_alone() -> None:
    results = []
    for global_seed, seed in ((1, 5), (2, 5), (2, 6)):
        model = build("cnn", in_channels=3, image_size=8)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(global_seed)
            before = torch.random.get_rng_state()
            local_sgd(model, split(), rng=rng(seed))
            assert torch.equal(torch.random.get_rng_state(), before)
        results.append(snapshot(model).flat)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[1], results[2])


def test_steps_schedule_and_metrics() -> None:
    metrics = local_sgd(small(), split(), steps=7, batch_size=16, schedule="cosine", rng=rng())
    assert metrics["steps"] == 7
    assert metrics["examples"] == 16 + 16 + 8 + 16 + 16 + 8 + 16
    assert Training(epochs=2, batch_size=16).fit(small(), split(), rng=rng())["steps"] == 6


def test_divergence_is_said() -> None:
    with pytest.raises(TrainingDiverged, match=r"within 15 steps; lower training\.lr = 1e\+30, unless an attack"):
        local_sgd(small(), split(), lr=1e30, epochs=5, batch_size=16, rng=rng())
    with pytest.raises(TrainingDiverged, match="became nan in 1 step; "):
        check_converged(float("nan"), 1, 0.1)


@pytest.mark.parametrize(
    "bad", [{"lr": 0.0}, {"optimizer": "sdg"}, {"schedule": "step"}, {"batch_size": 0}, {"precision": "int4"}]
)
def test_wrong_settings_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(UserError, match=f"training.{next(iter(bad))}"):
        Training(**bad)  # type: ignore[arg-type]


def test_a_snapshot_has_the_names_and_the_order_that_are_asked_for() -> None:
    model = small()
    whole = snapshot(model)
    names = list(whole)[3:0:-1]
    some = snapshot(model, names)
    assert list(some) == names
    assert all(torch.equal(some[name], whole[name]) for name in names)
    assert torch.equal(some.flat, torch.cat([whole[name].reshape(-1) for name in names]))
    with pytest.raises(KeyError):
        snapshot(model, ["nothing"])


def test_snapshot_and_load_are_inverse_and_strict() -> None:
    first, second = small(seed=1), small(seed=2)
    params = snapshot(first)
    assert not any(name.endswith("num_batches_tracked") for name in params)
    assert torch.equal(snapshot(load(second, params)).flat, params.flat)
    before = params.flat.clone()
    local_sgd(first, split(), rng=rng())
    assert torch.equal(params.flat, before)
    with pytest.raises(ValueError, match="no entry 'nope'"):
        load(first, {"nope": torch.zeros(1)})
    with pytest.raises(ValueError, match="shape"):
        load(first, {"0.weight": torch.zeros(1)})


@pytest.mark.parametrize("precision", PRECISIONS)
def test_evaluate_equals_a_plain_forward_pass(precision: str) -> None:
    model, data = small(), split()
    got = evaluate(model, data, batch_size=7, precision=precision)
    model.eval()
    with torch.no_grad():
        logits = model(data.images.float() * (1 / (255 * 0.25)) - 2.0)
    assert got["loss"] == pytest.approx(
        float(functional.cross_entropy(logits, data.labels)), rel=2e-2 if precision == "bfloat16" else 1e-5
    )
    if precision != "bfloat16":
        assert got["accuracy"] == int((logits.argmax(1) == data.labels).sum()) / 40


def test_precisions_train_alike_and_auto_names_one() -> None:
    flats = {}
    for name in PRECISIONS:
        model = small()
        local_sgd(model, split(), lr=0.05, precision=name, rng=rng())
        flats[name] = snapshot(model).flat
    torch.testing.assert_close(flats["channels_last"], flats["float32"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(flats["bfloat16"], flats["float32"], rtol=0.2, atol=0.05)
    assert choose(small(), torch.zeros(16, 3, 8, 8)) in PRECISIONS
    assert choose(build("mlp", image_size=8), torch.zeros(16, 3, 8, 8)) == "float32"


def test_gradients_are_laid_out_as_their_activations_while_channels_are_last() -> None:
    """Else max-pooling reads them across the grain; the values are the same, and no trace stays in the model."""
    layouts: list[bool] = []

    class Watched(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x.register_hook(lambda grad: layouts.append(grad.is_contiguous(memory_format=torch.channels_last)))
            return x * 1

    precision = PRECISIONS["channels_last"]
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), Watched(), nn.Flatten(), nn.Linear(36, 10))
    images = torch.randn(2, 3, 8, 8, generator=rng()).contiguous(memory_format=precision.layout)
    batch = images, torch.tensor([0, 1])
    precision.place(model)
    grads = []
    for setting in (nullcontext(), precision.training(model)):
        with setting:
            cross_entropy(model, batch).backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    assert layouts == [False, True]
    assert len(grads[0]) == 4
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(("channels", "skipped"), [(4, True), (15, True), (16, False)])
@pytest.mark.parametrize("stride", [(2, 2), (2, 3)])
def test_a_narrow_convolution_with_a_stride_gets_its_pixels_alone(
    channels: int, skipped: bool, stride: tuple[int, int]
) -> None:
    precision = PRECISIONS["channels_last"]
    conv = nn.Conv2d(channels, 8, 1, stride=stride)
    plain = copy.deepcopy(conv)
    images = torch.randn(4, channels, 12, 12, generator=rng())
    seen: list[tuple[int, ...]] = []
    conv.register_forward_hook(lambda module, inputs, output: seen.append((*inputs[0].shape[2:], *module.stride)))
    grads = []
    for model, x in ((plain, images.clone()), (conv, images.contiguous(memory_format=precision.layout))):
        x.requires_grad_()
        with precision.training(model) if model is conv else nullcontext():
            (model(x) ** 2).sum().backward()
        grads.append((model.weight.grad, model.bias.grad, x.grad))
    for mine, right in zip(*grads, strict=True):
        torch.testing.assert_close(mine, right)
    assert seen == [(6, 12 // stride[1], 1, 1) if skipped else (12, 12, *stride)]
    assert conv.stride == stride
    assert not conv._forward_pre_hooks


@pytest.mark.parametrize("named", [False, True])
def test_a_narrow_convolution_may_get_its_images_by_name(named: bool) -> None:
    precision, conv = PRECISIONS["channels_last"], nn.Conv2d(4, 8, 1, stride=2)
    images = torch.randn(4, 4, 12, 12, generator=rng())
    right = conv(images)
    with precision.training(conv):
        got = conv(input=images) if named else conv(images)
    torch.testing.assert_close(got, right)


@pytest.mark.parametrize("shape", [(8,), (8, 36, 4)], ids=["numbers", "classes of pixels"])
def test_the_probe_takes_models_whose_outputs_are_no_classes(shape: tuple[int, ...]) -> None:
    class Reshaped(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x).flatten(2).transpose(1, 2)
            return out if len(shape) > 1 else out.mean((1, 2))

    model, images = Reshaped(1, 4, 3), torch.randn(8, 1, 8, 8, generator=rng())
    assert model(images).shape == shape
    assert choose(model, images) in PRECISIONS
    assert times_float32("bfloat16", model, images) > 0


def test_proximal_adds_its_term_and_its_gradient() -> None:
    model, batch = small(), (torch.randn(4, 3, 8, 8, generator=rng()), torch.tensor([0, 1, 2, 3]))
    anchor = {n: p.detach() + 0.1 for n, p in model.named_parameters()}
    model.eval()
    size = sum(p.numel() for p in model.parameters())
    gap = Proximal(0.5, anchor)(model, batch) - cross_entropy(model, batch)
    assert float(gap.detach()) == pytest.approx(0.25 * 0.01 * size, rel=1e-3)


def test_label_smoothing_of_nothing_is_cross_entropy() -> None:
    model, batch = small().eval(), (torch.randn(4, 3, 8, 8, generator=rng()), torch.tensor([0, 1, 2, 3]))
    assert torch.equal(CrossEntropy()(model, batch), cross_entropy(model, batch))
    assert not torch.equal(CrossEntropy(0.1)(model, batch), cross_entropy(model, batch))


def test_distillation_laws() -> None:
    student = torch.randn(6, 10, generator=rng(), requires_grad=True)
    teacher, labels = torch.randn(6, 10, generator=rng(1), requires_grad=True), torch.arange(6)
    assert torch.equal(Distillation(alpha=0.0)(student, teacher, labels), functional.cross_entropy(student, labels))
    Distillation(temperature=3.0, alpha=1.0)(student, teacher, labels).backward()
    expected = 3.0 * (functional.softmax(student / 3, 1) - functional.softmax(teacher / 3, 1)) / 6
    torch.testing.assert_close(student.grad, expected.detach(), rtol=1e-5, atol=1e-6)
    assert teacher.grad is None
    student.grad = None
    Distillation(alpha=1.0)(student, student.detach(), labels).backward()
    assert float(student.grad.abs().max()) < 1e-7


def test_apply_mask_does_not_mutate() -> None:
    params = {"w": torch.ones(3), "b": torch.ones(1)}
    got = apply_mask(params, {"w": torch.tensor([True, False, True])})
    assert got["w"].tolist() == [1, 0, 1]
    assert params["w"].tolist() == [1, 1, 1]
    assert got["b"] is params["b"]


def test_a_mask_of_other_names_is_refused_by_name() -> None:
    """Those of a model that `torch.compile` or `DataParallel` wrapped have a prefix: nothing would be kept at zero."""
    model = small()
    mask = {name: torch.ones_like(model.get_parameter(name), dtype=torch.bool) for name in prunable_names(model)}
    with pytest.raises(UserError, match=r"the mask names '0.weight', which DataParallel does not have; take ctx.model"):
        local_sgd(nn.DataParallel(model), split(), mask=mask)
