"""A value type for every layer, dense or sparse: the least output distortion within a budget of bytes.

    types = LayerAdaptive(40_000)(model, params, None, images, schema=schema)
    data = encode(params, None, schema=schema, values=types)            # at most 40,000 bytes

The program of rate-distortion pruning (arXiv 2308.10438) with another currency: a level is a value type instead of a
density, its rate is the number of bytes that the layer's values really take when encoded, and its distortion is how far
the logits move when this layer alone is sent in that type.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fl_sim import codecs
from fl_sim.codecs import VALUES, Schema, is_relative
from fl_sim.codecs.mixed_coding import tensor_seed
from fl_sim.codecs.value_coder import Values
from fl_sim.core.types import Mask, Params, UserError
from fl_sim.models.modes import evaluating, restored
from fl_sim.models.parameters import load
from fl_sim.models.partial_forward import resumed
from fl_sim.sparsity import min_distortion
from fl_sim.sparsity.curves import squared_error

TYPES = tuple(name for name in VALUES if name != "float16" and not is_relative(name))
"""Offered unless others are named: all that need no held model, but for float16, beyond whose range a weight may lie."""
SLACK = 3
"""Bytes of padding by which a header may grow."""


Tried = Sequence[Sequence[tuple[int, float]]]
"""(bytes, distortion) of each tensor in each type."""


class TooSmall(UserError):
    """A budget below the smallest payload.

    Attributes:
        least: bytes of the smallest payload.
    """

    def __init__(self, budget: int, least: int) -> None:
        super().__init__(f"budget = {budget} bytes: the smallest payload of these types has {least}")
        self.least = least


Encode = Callable[[Sequence[str]], bytes]
"""A value type for each tensor -> the payload."""


def allotted(tried: Tried, types: Sequence[str], budget: int, encode: Encode) -> list[str]:
    """The type of each tensor with the least sum of distortions in a payload of at most so many bytes.

    Args:
        tried: bytes and distortion of each tensor in each of `types`.
        types: names of `fl_sim.codecs.VALUES`.
        budget: bytes of the payload.
        encode: makes the payload.

    Raises:
        TooSmall: no choice fits the budget.
    """
    rest = _rest(tried, types, encode)
    if (least := _least(tried) + rest) > budget:
        raise TooSmall(budget, least)
    rates = [[rate for rate, _ in levels] for levels in tried]
    distortions = [[distortion for _, distortion in levels] for levels in tried]
    return [types[level] for level in min_distortion(rates, distortions, budget - rest)]


def smallest(tried: Tried, types: Sequence[str], encode: Encode) -> int:
    """Bytes of the least budget of `allotted`."""
    return _least(tried) + _rest(tried, types, encode)


def _least(tried: Tried) -> int:
    return sum(min(rate for rate, _ in levels) for levels in tried)


def _rest(tried: Tried, types: Sequence[str], encode: Encode) -> int:
    """Bytes of a payload beside its values: header, mask and other tensors, and padding."""
    largest = [max((rate, number) for number, (rate, _) in enumerate(levels)) for levels in tried]
    return len(encode([types[number] for _, number in largest])) - sum(rate for rate, _ in largest) + SLACK


def rounding_errors(tensors: Sequence[Values], types: Sequence[str], seed: int) -> Tried:
    """What `allotted` takes, of the sent values of each tensor: the distortion is the squared error of the values."""
    found = []
    for position, values in enumerate(tensors):
        rounding, levels = tensor_seed(seed, position), []
        for kind in types:
            data = bytes(VALUES[kind].encode(values, rounding))
            lost = VALUES[kind].decode(memoryview(data), len(values)) - values
            levels.append((len(data), float(np.square(lost, dtype=np.float64).sum())))
        found.append(levels)
    return found


@dataclass(frozen=True)
class LayerAdaptive:
    """Chooses the value type of every prunable tensor.

    Attributes:
        budget_bytes: of a payload to a receiver that holds the mask; a mask that has to be sent comes on top.
        types: what is offered to each tensor, names of `fl_sim.codecs.VALUES`.
    """

    budget_bytes: int
    types: tuple[str, ...] = TYPES

    def __post_init__(self) -> None:
        if unknown := set(self.types) - VALUES.keys():
            raise UserError(f"types: unknown {', '.join(sorted(unknown))}; allowed: {', '.join(VALUES)}")
        if relative := sorted(name for name in self.types if is_relative(name)):
            raise UserError(
                f"types: {', '.join(relative)}: codes against a model that the receiver holds, which no budget knows"
            )
        if not self.types:
            raise UserError(f"types: none given; allowed: {', '.join(VALUES)}")

    def __call__(
        self, model: nn.Module, params: Params, mask: Mask | None, images: Tensor, *, schema: Schema, seed: int = 0
    ) -> tuple[str, ...]:
        """The type of each prunable tensor, in the order of `schema`.

        Args:
            model: takes `params` and keeps them.
            params: what is sent.
            mask: coordinates that are sent; None sends all. The others are 0 at the receiver.
            images: calibration images (N, ...) as the model takes them.
            schema: of the payload, float32.
            seed: of the payload: rounding is random, and what was measured is what is sent.

        Raises:
            UserError: no choice fits the budget.
        """
        load(model, params)
        with evaluating(model):
            measured = [
                self._levels(model, name, None if mask is None else mask[name], images, tensor_seed(seed, position))
                for position, name in enumerate(schema.prunable)
            ]

        def encode(types: Sequence[str]) -> bytes:
            return codecs.encode(params, mask, schema=schema, held_mask=mask, values=types, seed=seed)

        try:
            return tuple(allotted(measured, self.types, self.budget_bytes, encode))
        except TooSmall as error:
            raise UserError(f"strategy.kilobytes: {error}") from error

    def _levels(
        self, model: nn.Module, name: str, alive: Tensor | None, images: Tensor, seed: int
    ) -> list[tuple[int, float]]:
        """(bytes, distortion) of one tensor in each type."""
        found = []
        with restored(model.get_parameter(name)) as weight, resumed(model, name, images) as (reference, again):
            chosen = torch.ones(weight.shape, dtype=torch.bool) if alive is None else alive
            original = weight.cpu().float()  # as it is sent, whatever the model computes in
            values = original[chosen].numpy()
            for kind in self.types:
                data = bytes(VALUES[kind].encode(values, seed))
                decoded = VALUES[kind].decode(memoryview(data), len(values))
                weight.copy_(original.masked_scatter(chosen, torch.from_numpy(decoded.copy())))
                found.append((len(data), float(squared_error(again(), reference).mean())))
        return found
