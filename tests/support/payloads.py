"""Schemas, masks and values for the codec tests; also what the golden files are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from fl_sim.codecs import VALUES, Schema, decode, encode
from fl_sim.core.types import Mask, Params


def resnet_shapes(depth: int = 32, base: int = 16) -> dict[str, torch.Size]:
    """Weights of a CIFAR ResNet (option B): ResNet-32 has 464,432 of them."""
    shapes = {"conv1.weight": (base, 3, 3, 3)}
    before = base
    for stage in range(3):
        width = base << stage
        for block in range((depth - 2) // 6):
            shapes[f"layer{stage}.{block}.conv1.weight"] = (width, before, 3, 3)
            shapes[f"layer{stage}.{block}.conv2.weight"] = (width, width, 3, 3)
            if before != width:
                shapes[f"layer{stage}.{block}.shortcut.weight"] = (width, before, 1, 1)
            before = width
    shapes["fc.weight"] = (10, before)
    return {name: torch.Size(shape) for name, shape in shapes.items()}


def params_of(shapes: Mapping[str, torch.Size], seed: int = 0) -> Params:
    """Normal float32 values."""
    rng = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}


def bernoulli(shapes: Mapping[str, torch.Size], density: float, *, seed: int = 0) -> Mask:
    """Independent coordinates, densities that differ from layer to layer."""
    rng = np.random.default_rng(seed)
    made = {}
    for name, shape in shapes.items():
        odds = density / (1 - density) * np.exp(0.8 * rng.standard_normal()) if density < 1 else np.inf
        made[name] = torch.from_numpy(rng.random(tuple(shape)) < (odds / (1 + odds) if density < 1 else 1.0))
    return made


def channels(shapes: Mapping[str, torch.Size], density: float, *, seed: int = 0) -> Mask:
    """Whole output channels."""
    rng = np.random.default_rng(seed)
    made = {}
    for name, shape in shapes.items():
        rows = torch.from_numpy(rng.random(shape[0]) < density)
        made[name] = rows.view(-1, *[1] * (len(shape) - 1)).expand(shape).clone()
    return made


def clustered(shapes: Mapping[str, torch.Size], density: float, *, seed: int = 0) -> Mask:
    """Ones that come in runs: a two-state chain with the given share of ones."""
    rng = np.random.default_rng(seed)
    made = {}
    for name, shape in shapes.items():
        size, leave = shape.numel(), 0.2
        enter = leave * density / (1 - density)
        state, bits = 0, np.zeros(size, dtype=bool)
        for i, draw in enumerate(rng.random(size)):
            state = int(draw >= leave) if state else int(draw < enter)
            bits[i] = state
        made[name] = torch.from_numpy(bits).view(shape)
    return made


def kernels(shapes: Mapping[str, torch.Size], density: float, *, seed: int = 0) -> Mask:
    """Ones in whole kernels of a convolution, of rows and channels that differ in how many they have."""
    rng = np.random.default_rng(seed)
    made = {}
    for name, shape in shapes.items():
        rows, channels = rng.exponential(size=(shape[0], 1)), rng.exponential(size=(1, shape[1]))
        live = torch.from_numpy(rng.random(tuple(shape[:2])) < density * rows * channels)
        inside = torch.from_numpy(rng.random(tuple(shape)) < 0.9)
        made[name] = inside & live.view(*shape[:2], *[1] * (len(shape) - 2))
    return made


def swapped(mask: Mask, share: float, *, seed: int = 0) -> Mask:
    """The same mask with a share of its ones moved elsewhere."""
    rng = np.random.default_rng(seed)
    made = {}
    for name, bits in mask.items():
        flat = bits.reshape(-1).clone()
        ones, zeros = flat.nonzero()[:, 0].numpy(), (~flat).nonzero()[:, 0].numpy()
        count = min(round(share * len(ones)), len(zeros))
        flat[torch.from_numpy(rng.choice(ones, count, replace=False))] = False
        flat[torch.from_numpy(rng.choice(zeros, count, replace=False))] = True
        made[name] = flat.view(bits.shape)
    return made


SMALL = {"a.weight": torch.Size((16, 9, 3, 3)), "b.weight": torch.Size((10, 65))}
OTHERS = {
    "bn.weight": torch.Size((16,)),
    "bn.running_mean": torch.Size((16,)),
    "bn.running_var": torch.Size((16,)),
    "curve": torch.Size((5,)),
}


@dataclass(frozen=True)
class Case:
    """One payload with everything needed to decode it."""

    params: Params
    mask: Mask | None
    held_mask: Mask | None
    values: str | tuple[str, ...]
    schema: Schema
    base: Params | None = None
    contexts: bool = False

    def encode(self) -> bytes:
        return encode(
            self.params,
            self.mask,
            schema=self.schema,
            held_mask=self.held_mask,
            values=self.values,
            seed=7,
            base=self.base,
            contexts=self.contexts,
        )

    def decode(self, data: bytes) -> tuple[Params, Mask | None]:
        return decode(data, schema=self.schema, held_mask=self.held_mask, base=self.base)


def case(mask: Mask | None, *, held_mask: Mask | None = None, values: str | tuple[str, ...] = "float32") -> Case:
    """A small payload with all five sections; the receiver holds a model that is close to it."""
    params = params_of({**SMALL, **OTHERS}, seed=3)
    return Case(
        params, mask, held_mask, values, Schema.of(params, SMALL, auxiliary=["curve"]), near(params, 0.01, seed=4)
    )


def near(params: Params, distance: float, *, seed: int = 0) -> Params:
    """Parameters of which a random change of this size makes `params`."""
    changes = params_of({name: value.shape for name, value in params.items()}, seed)
    return {name: value + distance * changes[name] for name, value in params.items()}


MODES: Mapping[str, Callable[[], Case]] = {
    "none": lambda: case(None),
    "held": lambda: case(bernoulli(SMALL, 0.4), held_mask=bernoulli(SMALL, 0.4)),
    "whole": lambda: case(bernoulli(SMALL, 0.4)),
    "rows": lambda: case(channels(SMALL, 0.5)),
    "split": lambda: case(swapped(bernoulli(SMALL, 0.1), 0.3), held_mask=bernoulli(SMALL, 0.1)),
    "xor": lambda: case(swapped(bernoulli(SMALL, 0.5), 0.02), held_mask=bernoulli(SMALL, 0.5)),
    "gaps": lambda: case(clustered(SMALL, 0.1)),
    "contexts": lambda: replace(case(kernels(SMALL, 0.1)), contexts=True),
}
CASES: Mapping[str, Callable[[], Case]] = {
    **MODES,
    **{f"values-{v}": lambda v=v: case(bernoulli(SMALL, 0.4), values=v) for v in VALUES if v != "float32"},
    "values-mixed": lambda: case(bernoulli(SMALL, 0.4), values=("int4", "float32")),
    "values-mixed-delta": lambda: case(bernoulli(SMALL, 0.4), values=("float32-delta", "sign")),
}
