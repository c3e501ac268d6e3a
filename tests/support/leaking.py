# ruff: noqa: NPY002
"""Models and clients that leave something behind: on the model, on the process, in the task."""

from __future__ import annotations

import gc
import io
import logging
import os
import random
import sys
import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fl_sim import Task, Update, load, local_sgd, snapshot
from fl_sim.data import Data
from fl_sim.data import load as load_data
from fl_sim.training.client import ClientContext


class Small(nn.Module):
    """A linear model on 8x8 digits whose output `leak` bends by what earlier calls left."""

    def __init__(self) -> None:
        super().__init__()
        self.flatten, self.fc = nn.Flatten(), nn.Linear(64, 10)
        self.made()

    def made(self) -> None:
        """Add what a sibling needs."""

    def leak(self, x: Tensor) -> Tensor | float:
        """What is added to the logits."""
        return 0.0

    def forward(self, x: Tensor) -> Tensor:
        logits = self.fc(self.flatten(x)[:, :64])
        return logits + self.leak(x)


class Cumulative(nn.Module):
    """BatchNorm whose momentum depends on how many batches there were."""

    def __init__(self) -> None:
        super().__init__()
        self.flatten, self.norm, self.fc = nn.Flatten(), nn.BatchNorm1d(64, momentum=None), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.flatten(x)[:, :64]))


class Unsaved(Small):
    def made(self) -> None:
        self.register_buffer("mean", torch.zeros(10), persistent=False)

    def leak(self, x: Tensor) -> Tensor | float:
        self.mean.mul_(0.9).add_(0.01 * torch.arange(10.0))
        return self.mean.clone()


class Counting(Small):
    def made(self) -> None:
        self.seen = 0

    def leak(self, x: Tensor) -> Tensor | float:
        self.seen += 1
        return 0.01 * self.seen * torch.arange(10.0)


class Recurrent(nn.Module):
    """A GRU over rows of pixels that keeps its hidden state from batch to batch."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.fc = nn.GRU(8, 12, batch_first=True), nn.Linear(12, 10)
        self.h: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        start = None if self.h is None else self.h.expand(1, len(x), -1).contiguous()
        out, h = self.gru(x[:, 0], start)
        self.h = h.detach().mean(dim=1, keepdim=True)
        return self.fc(out[:, -1])


class Appending(Small):
    def made(self) -> None:
        self.history: list[float] = []

    def leak(self, x: Tensor) -> Tensor | float:
        self.history.append(float(x.detach().mean()))
        return 0.1 * sum(self.history) * torch.arange(10.0)


class Replacing(Small):
    """Replaces its own sub-module, and later one of another kind."""

    def made(self) -> None:
        self.act: nn.Module = nn.Identity()

    def leak(self, x: Tensor) -> Tensor | float:
        value = self.act(x.flatten(1)[:, :10])
        self.act = nn.ReLU() if isinstance(self.act, nn.Identity) else nn.Tanh()
        return value


class OnItsClass(Small):
    calls = 0

    def leak(self, x: Tensor) -> Tensor | float:
        type(self).calls += 1
        return 0.01 * type(self).calls * torch.arange(10.0)


class Helper:
    """An object of the user's that a model holds."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class Helped(Small):
    def made(self) -> None:
        self.helper = Helper()

    def leak(self, x: Tensor) -> Tensor | float:
        self.helper.count += 1
        return 0.01 * self.helper.count * torch.arange(10.0)


class Drawing(Small):
    """Draws from every global generator, and from one of its own."""

    def made(self) -> None:
        self.rng = np.random.default_rng(0)

    def leak(self, x: Tensor) -> Tensor | float:
        drawn = torch.rand(10) + float(np.random.rand()) + random.random() + float(self.rng.random())
        return 0.1 * drawn * torch.arange(10.0)


class Remembering(Small):
    """A closure and an array hold what it remembers."""

    def made(self) -> None:
        count, self.table = 0, np.zeros(10, dtype=np.float32)

        def step() -> int:
            nonlocal count
            count += 1
            return count

        self.step = step

    def leak(self, x: Tensor) -> Tensor | float:
        self.table += 0.01 * self.step()
        return torch.from_numpy(self.table.copy()) * torch.arange(10.0)


Builder = Callable[..., nn.Module]


def _builder(kind: type[nn.Module]) -> Builder:
    def build(num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
        return kind()

    return build


small = _builder(Small)
cumulative, unsaved, counting, recurrent = map(_builder, (Cumulative, Unsaved, Counting, Recurrent))
appending, replacing, on_its_class = map(_builder, (Appending, Replacing, OnItsClass))
helped, drawing, remembering = map(_builder, (Helped, Drawing, Remembering))
STATEFUL = (
    "cumulative",
    "unsaved",
    "counting",
    "recurrent",
    "appending",
    "replacing",
    "on_its_class",
    "helped",
    "drawing",
    "remembering",
)


class Iterating(Small):
    def made(self) -> None:
        self.numbers = iter(range(1000))


iterating = _builder(Iterating)


class NormNet(nn.Module):
    """Any normalisation layer over 64 pixels, behind a linear map."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.flatten, self.fc = norm, nn.Flatten(), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.flatten(self.norm(x)))


class OwnNorm(nn.Module):
    """Somebody's own normalisation, known by its buffers alone."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(1))
        self.register_buffer("running_var", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.running_mean.mul_(0.9).add_(0.1 * x.detach().mean())
        return x - self.running_mean


def instance_norm(num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    return NormNet(nn.InstanceNorm2d(1, affine=True, track_running_stats=True))


def sync_norm(num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    return NormNet(nn.SyncBatchNorm(1))


def own_norm(num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    return NormNet(OwnNorm())


def _train(task: Task, ctx: ClientContext) -> Update:
    model = load(ctx.model, task.params)
    metrics = local_sgd(model, ctx.data, lr=0.1, steps=3, batch_size=16, rng=ctx.rng)
    return Update(snapshot(model, task.params), ctx.num_examples, None, metrics)


def plain(task: Task, ctx: ClientContext) -> Update:
    return _train(task, ctx)


def half(task: Task, ctx: ClientContext) -> Update:
    update = _train(task, ctx)
    ctx.model.half()
    return update


def double(task: Task, ctx: ClientContext) -> Update:
    update = _train(task, ctx)
    ctx.model.double()
    return update


def hook(task: Task, ctx: ClientContext) -> Update:
    update = _train(task, ctx)
    list(ctx.model.modules())[-1].register_forward_hook(lambda m, x, out: out * 0.5)
    return update


def gradient_hooks(task: Task, ctx: ClientContext) -> Update:
    update = _train(task, ctx)
    parameter = next(ctx.model.parameters())
    parameter.register_hook(lambda grad: grad * 0.1)
    list(ctx.model.modules())[-1].register_full_backward_pre_hook(lambda m, grad: (grad[0] * 0.1,))
    return update


def modes_and_flags(task: Task, ctx: ClientContext) -> Update:
    update = _train(task, ctx)
    ctx.model.eval()
    for parameter in ctx.model.parameters():
        parameter.requires_grad_(False)
        parameter.grad = torch.ones_like(parameter)
    return update


def surgery(task: Task, ctx: ClientContext) -> Update:
    """Changes the structure, the class and an attribute."""
    update = _train(task, ctx)
    ctx.model.extra = nn.Linear(2, 2)
    ctx.model.forward = lambda x: torch.zeros(len(x), 10)  # type: ignore[method-assign]
    last = [m for m in ctx.model.modules() if isinstance(m, nn.Linear)][-1]
    parametrize.register_parametrization(last, "bias", nn.Identity())
    return update


def no_grad(task: Task, ctx: ClientContext) -> Update:
    update = _train(task, ctx)
    torch.set_grad_enabled(False)
    return update


def _inference_forever(kept: list[object] = []) -> None:  # noqa: B006
    kept.append(torch.inference_mode())
    kept[-1].__enter__()  # type: ignore[attr-defined]


def inference(task: Task, ctx: ClientContext) -> Update:
    update = _train(task, ctx)
    _inference_forever()
    return update


def float64(task: Task, ctx: ClientContext) -> Update:
    update = _train(task, ctx)
    torch.set_default_dtype(torch.float64)
    return update


def meta_device(task: Task, ctx: ClientContext) -> Update:
    update = _train(task, ctx)
    torch.set_default_device("meta")
    return update


def folder_and_environment(task: Task, ctx: ClientContext) -> Update:
    assert "FL_SIM_LEFT" not in os.environ
    assert os.getcwd() != "/"
    update = _train(task, ctx)
    os.chdir("/")
    os.environ["FL_SIM_LEFT"] = "1"
    warnings.simplefilter("error", UserWarning)  # no other: a collected file is no fault of the client
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    return update


def hooks_of_all_modules(task: Task, ctx: ClientContext) -> Update:
    update = _train(task, ctx)
    nn.modules.module.register_module_forward_hook(lambda module, inputs, output: 0 * output)
    nn.modules.module.register_module_full_backward_hook(lambda module, inputs, outputs: None)
    register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: optimizer.zero_grad())
    return update


def noise_of_global_generators(task: Task, ctx: ClientContext) -> Update:
    """Draws from generators that another client seeded, or nobody."""
    update = _train(task, ctx)
    noise = 1e-3 * (torch.randn(()) + float(np.random.randn()) + random.gauss(0, 1))
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    update.params["fc.weight"] += noise
    return update


def noise_without_the_model(task: Task, ctx: ClientContext) -> Update:
    noise = 1e-3 * float(np.random.randn())
    params = {name: value.clone() for name, value in task.params.items()}
    params["fc.weight"] += noise
    return Update(params, ctx.num_examples, None, {"loss": 0.0})


LEAVING = (
    "half",
    "double",
    "hook",
    "gradient_hooks",
    "modes_and_flags",
    "surgery",
    "no_grad",
    "inference",
    "float64",
    "meta_device",
    "folder_and_environment",
    "hooks_of_all_modules",
    "python_itself",
)


def python_itself(task: Task, ctx: ClientContext) -> Update:
    update = _train(task, ctx)
    gc.disable()
    sys.setrecursionlimit(2500)
    logging.disable(logging.CRITICAL)
    sys.stdout = io.StringIO()
    return update


def writes_into_task(task: Task, ctx: ClientContext) -> Update:
    update = _train(task, ctx)
    for name, value in update.params.items():
        task.params[name].sub_(value)
    return update


def writes_by_numpy(task: Task, ctx: ClientContext) -> Update:
    update = _train(task, ctx)
    for value in task.params.values():
        value.numpy()[...] = 0
    return update


def writes_by_data(task: Task, ctx: ClientContext) -> Update:
    update = _train(task, ctx)
    next(iter(task.params.values())).data.add_(1)
    return update


def assigns_to_task(task: Task, ctx: ClientContext) -> Update:
    update = _train(task, ctx)
    for name, value in update.params.items():
        task.params[name] = 0 * value
    return update


def empties_the_task(task: Task, ctx: ClientContext) -> Update:
    update = _train(task, ctx)
    task.params.clear()
    return update


def moves_an_entry(task: Task, ctx: ClientContext) -> Update:
    update = _train(task, ctx)
    for value in task.params.values():
        value.data = torch.zeros_like(value)
    return update


def writes_into_images(task: Task, ctx: ClientContext) -> Update:
    ctx.data.stored.zero_()
    return _train(task, ctx)


def one_fails(task: Task, ctx: ClientContext) -> Update:
    if ctx.num_examples % 2:
        raise RuntimeError("an odd number of samples")
    return _train(task, ctx)


def one_writes_into_task(task: Task, ctx: ClientContext) -> Update:
    update = _train(task, ctx)
    if ctx.num_examples % 2:
        for value in task.params.values():
            value.mul_(2)
    return update


WRITING = (
    "writes_into_task",
    "writes_by_numpy",
    "writes_by_data",
    "assigns_to_task",
    "empties_the_task",
    "moves_an_entry",
)


def numbered(*, validation: float = 0.1, proxy: float = 0.0) -> Data:
    return load_data("digits", validation=validation, proxy=proxy)
