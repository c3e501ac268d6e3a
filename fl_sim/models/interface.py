"""What a model takes and answers, and the keyword arguments by which its builder is told."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fl_sim.core.errors import UserError

IMAGE = 3
"""Dimensions of an image: channels, height, width."""


@dataclass(frozen=True)
class Interface:
    """What a model takes, and what it has to answer.

    Attributes:
        input_shape: of one input, for instance (channels, height, width), (features,) or (tokens,).
        num_classes: outputs: classes, tokens of the vocabulary, labels, or numbers.
        vocabulary: tokens that inputs are made of, int64; None = inputs are float32.
        each_token: whether there is an answer at every position of a sequence, (B, T, num_classes), not (B, num_classes).
    """

    input_shape: tuple[int, ...]
    num_classes: int
    vocabulary: int | None = None
    each_token: bool = False

    @property
    def called(self) -> str:
        """What inputs are called in messages."""
        if self.vocabulary is not None:
            return "tokens"
        return "images" if len(self.input_shape) == IMAGE else "inputs"

    @property
    def square(self) -> Interface:
        """The interface for images of equal sides, as builders are told that take `image_size`."""
        channels, height, _ = self.input_shape
        return replace(self, input_shape=(channels, height, height))

    def example(self, samples: int) -> Tensor:
        """Zeros as a model gets them."""
        dtype = torch.float32 if self.vocabulary is None else torch.int64
        return torch.zeros(samples, *self.input_shape, dtype=dtype)

    def random(self, samples: int) -> Tensor:
        """Random inputs from the global generator: numbers from 0 to 1, or any tokens."""
        if self.vocabulary is None:
            return torch.rand(samples, *self.input_shape)
        return torch.randint(self.vocabulary, (samples, *self.input_shape))

    def answer(self, samples: int) -> tuple[int, ...]:
        """Shape of the outputs."""
        return (samples, *self.input_shape[:1], self.num_classes) if self.each_token else (samples, self.num_classes)


def arguments(name: str, builder: Callable[..., nn.Module], interface: Interface, width: float) -> Mapping[str, object]:
    """The keyword arguments of a builder, which may name any of `input_shape`, or `in_channels` and `image_size`, and `vocabulary`.

    Raises:
        UserError: it is for other inputs, or takes no width.
    """
    where, shape = f"model.name = {name!r}", interface.input_shape
    try:
        parameters = inspect.signature(builder).parameters
    except (ValueError, TypeError):  # built in: it says nothing of itself
        parameters = inspect.signature(lambda **options: options).parameters
    any_name = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if interface.vocabulary is not None and "vocabulary" not in parameters and not any_name:
        raise UserError(
            f"{where}: is for numbers, and inputs are tokens; allowed: lstm, transformer, or a builder with a parameter vocabulary"
        )
    if interface.vocabulary is None and "vocabulary" in parameters:
        raise UserError(f"{where}: is for tokens, and inputs are numbers of shape {shape}")
    asked: dict[str, object] = {"num_classes": interface.num_classes}
    if "input_shape" in parameters or interface.vocabulary is not None or (any_name and len(shape) != IMAGE):
        asked |= {"input_shape": shape} if "input_shape" in parameters or any_name else {}
        asked |= {} if interface.vocabulary is None else {"vocabulary": interface.vocabulary}
        asked |= {"each_token": interface.each_token} if "each_token" in parameters else {}
    elif len(shape) != IMAGE:
        raise UserError(
            f"{where}: is for images (channels, height, width), and inputs have shape {shape}; allowed: linear, mlp, or a "
            "builder with a parameter input_shape"
        )
    else:
        told = {"in_channels": shape[0], "image_size": shape[1]}
        asked |= {key: value for key, value in told.items() if any_name or key in parameters}
    if "width" in parameters or any_name:
        return {**asked, "width": width}
    if width != 1.0:
        raise UserError(f"model.width = {width:g}: {name!r} has one width")
    return asked


def changed(builder: Callable[..., nn.Module], change: Callable[[nn.Module], nn.Module]) -> Callable[..., nn.Module]:
    """A builder that takes the same arguments, of models that `change` has changed."""

    def build(**options: object) -> nn.Module:
        return change(builder(**options))

    build.__signature__ = inspect.signature(builder)  # type: ignore[attr-defined]
    return build
