"""Kinds of inputs and targets, told by dtype and shape: what `Data` holds, and which of it a learning task needs."""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor


class Inputs(Enum):
    """Kind of a split's inputs; the value says their dtype and shape."""

    IMAGES = "uint8 (N, channels, height, width)"
    NUMBERS = "float32 (N, ...), a table or a signal"
    TOKENS = "int64 (N, ...), token numbers"


class Targets(Enum):
    """Kind of a split's targets; the value says their dtype and shape."""

    CLASSES = "one class each, int64 (N,)"
    TOKENS = "a token at every position, int64 (N, T)"
    LABELS = "several labels each, bool (N, K)"
    NUMBERS = "numbers, float32 (N,) or (N, K)"


def input_kind(stored: Tensor) -> Inputs | None:
    """The kind of inputs that a tensor holds; None where it is none."""
    if stored.dtype == torch.uint8:
        return Inputs.IMAGES if stored.dim() == 4 else None
    if stored.dim() < 2:
        return None
    return {torch.float32: Inputs.NUMBERS, torch.int64: Inputs.TOKENS}.get(stored.dtype)


TARGETS = {
    (torch.int64, 1): Targets.CLASSES,
    (torch.int64, 2): Targets.TOKENS,
    (torch.bool, 2): Targets.LABELS,
    (torch.float32, 1): Targets.NUMBERS,
    (torch.float32, 2): Targets.NUMBERS,
}


def target_kind(targets: Tensor) -> Targets | None:
    """The kind of targets that a tensor holds; None where it is none."""
    return TARGETS.get((targets.dtype, targets.dim()))


def described(tensor: Tensor) -> str:
    """Dtype and shape, for messages."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
