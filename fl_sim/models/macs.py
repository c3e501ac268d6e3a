"""Multiply-accumulates of one sample: convolutions and linear layers; 1 MAC = 2 FLOPs; norms and activations ignored."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fl_sim.core.types import Mask


def count_macs(model: nn.Module, input_shape: tuple[int, ...], *, mask: Mask | None = None) -> int:
    """MACs of a forward pass over one sample of `input_shape` (C, H, W).

    With `mask`, only alive weights count: nnz * H_out * W_out for a convolution, nnz for a linear layer. The model is
    left untouched.
    """
    return sum(layer_macs(model, input_shape, mask=mask).values())


def layer_macs(model: nn.Module, input_shape: tuple[int, ...], *, mask: Mask | None = None) -> dict[str, int]:
    """Name of the weight -> MACs, in the order in which the layers run; as `count_macs`, which is the sum."""
    positions: dict[str, int] = {}
    sizes: dict[str, int] = {}
    probe = copy.deepcopy(model).cpu().eval()
    for name, module in probe.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            weight = f"{name}.weight".removeprefix(".")
            sizes[weight] = module.weight.numel()
            module.register_forward_hook(_recorder(weight, positions))
    with torch.inference_mode():
        probe(torch.zeros(1, *input_shape))
    alive = mask or {}
    return {name: uses * (int(alive[name].sum()) if name in alive else sizes[name]) for name, uses in positions.items()}


def _recorder(name: str, positions: dict[str, int]):  # type: ignore[no-untyped-def]
    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        spatial = output[0, 0].numel() if isinstance(module, nn.Conv2d) else output[0].numel() // output.shape[-1]
        positions[name] = positions.get(name, 0) + spatial

    return record
