"""Precision of training: memory layout and autocast. Parameters always stay float32.

`choose` probes a few training steps and takes the fastest. It is asked once per run, and the name it answers goes to
every worker, so that all compute the same numbers.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TypeGuard

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Precision:
    """Attributes: `channels_last` memory layout of convolutions; `autocast` dtype of the forward pass, or None."""

    channels_last: bool = False
    autocast: torch.dtype | None = None

    def place(self, model: nn.Module) -> None:
        """Give a model this memory layout, in place; free when it has it already."""
        layout = torch.channels_last
        if self.channels_last and any(
            p.dim() == 4 and not p.is_contiguous(memory_format=layout) for p in model.parameters()
        ):
            model.to(memory_format=layout)

    @contextmanager
    def training(self, model: nn.Module) -> Iterator[None]:
        """A model in this memory layout for the block, and its gradients too: behind `nn.Flatten` they come in the default
        one, and max-pooling takes three to six times as long for them.

        1 x 1 convolutions with a stride get the pixels that they use, and no others: see `NARROW`.
        """
        self.place(model)
        modules = list(model.modules()) if self.channels_last else []
        hooks = [m.register_forward_pre_hook(_gradient_laid_out_alike) for m in modules if isinstance(m, nn.Flatten)]
        strided = {m: m.stride for m in modules if _skips_pixels(m)}
        hooks += [
            m.register_forward_pre_hook(partial(_skipped_before, stride), with_kwargs=True)
            for m, stride in strided.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for module, stride in strided.items():
                module.stride = stride

    @property
    def layout(self) -> torch.memory_format:
        """The memory layout of images; see `Split.batches`."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def context(self, device: torch.device) -> AbstractContextManager[object]:
        """The autocast context of a forward pass."""
        return nullcontext() if self.autocast is None else torch.autocast(device.type, dtype=self.autocast)


def _gradient_laid_out_alike(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    for value in inputs:
        if value.requires_grad and value.dim() == 4 and not value.is_contiguous():
            value.register_hook(partial(torch.Tensor.contiguous, memory_format=torch.channels_last))


NARROW = 16
"""Input channels below which the weight gradient of a 1 x 1 convolution with a stride is not left to PyTorch in channels-last.

There oneDNN (3.x, issue 6035 of its repository; PyTorch 2.14 on processors with AVX2) writes beyond its workspace for less than
8 channels: the program dies, or the gradient is wrong. 16 is the same block of AVX-512, where it was not looked at.
"""


def _skips_pixels(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and module.stride != (1, 1)
        and module.padding in ((0, 0), "valid")
        and module.groups == 1
    )


def _skipped_before(
    stride: tuple[int, ...], module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]] | None:
    """Take every `stride`-th pixel before the convolution, which then has none: the same products and sums."""
    assert isinstance(module, nn.Conv2d)
    images = args[0] if args else named["input"]
    narrow = images.size(-3) < NARROW
    module.stride = (1, 1) if narrow else stride
    return ((images[..., :: stride[0], :: stride[1]],), {}) if narrow else None


PRECISIONS: Mapping[str, Precision] = {
    "float32": Precision(),
    "channels_last": Precision(channels_last=True),
    "bfloat16": Precision(channels_last=True, autocast=torch.bfloat16),
}


def choose(model: nn.Module, images: Tensor) -> str:
    """Name of the fastest precision for this model, batch of images and their device: one warm-up and three timed steps each.

    bfloat16 must win by 10 % to be chosen, because it costs accuracy in the last digits. Models without convolutions
    stay in float32.
    """
    if not _convolves(model):
        return "float32"
    seconds = _probed(model, images, PRECISIONS)
    seconds["bfloat16"] *= 1.1
    return min(seconds, key=lambda name: seconds[name])


def times_float32(name: str, model: nn.Module, images: Tensor) -> float:
    """Seconds of a training step in a precision over those in float32: far above 1 where the processor emulates it.

    1 for models without convolutions, which are not probed.
    """
    if not _convolves(model):
        return 1.0
    seconds = _probed(model, images, ("float32", name))
    return seconds[name] / seconds["float32"]


def _convolves(model: nn.Module) -> bool:
    return any(isinstance(module, nn.Conv2d) for module in model.modules())


def _probed(model: nn.Module, images: Tensor, names: Iterable[str]) -> dict[str, float]:
    # Dropout draws while probing; the caller's generator must not notice.
    with torch.random.fork_rng(devices=[]):
        return {name: training_seconds(copy.deepcopy(model), PRECISIONS[name], images) for name in names}


def training_seconds(model: nn.Module, precision: Precision, images: Tensor) -> float:
    """Measure the seconds of one forward and backward pass, the best of three after a warm-up; outputs may mean anything."""
    model.train()
    images = images.contiguous(memory_format=precision.layout)
    times = []
    with precision.training(model):
        for _ in range(4):
            start = time.perf_counter()
            with precision.context(images.device):
                loss = model(images).float().square().mean()
            loss.backward()
            if images.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return min(times[1:])
