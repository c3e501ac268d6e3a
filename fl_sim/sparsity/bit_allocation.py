"""A value type for every layer, dense or sparse: the least output distortion within a budget of bytes.

    types = LayerAdaptive(40_000)(model, params, None, images, schema=schema)
    data = encode(params, None, schema=schema, values=types)            # at most 40,000 bytes

The program of rate-distortion pruning (arXiv 2308.10438) with another currency: a level is a value type instead of a
density, its rate is the number of bytes that the layer's values really take when encoded, and its distortion is how far
the logits move when this layer alone is sent in that type.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fl_sim import codecs
from fl_sim.codecs import VALUES, Schema, is_relative
from fl_sim.codecs.mixed_coding import tensor_seed
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
        rates = [[rate for rate, _ in levels] for levels in measured]
        whole = codecs.encode(params, mask, schema=schema, held_mask=mask, values=self._largest(rates), seed=seed)
        rest = len(whole) - sum(map(max, rates)) + SLACK
        least = sum(map(min, rates)) + rest
        if least > self.budget_bytes:
            smallest = f"the smallest payload of these types has {least}"
            raise UserError(f"strategy.kilobytes: budget = {self.budget_bytes} bytes: {smallest}")
        distortions = [[distortion for _, distortion in levels] for levels in measured]
        return tuple(self.types[level] for level in min_distortion(rates, distortions, self.budget_bytes - rest))

    def _largest(self, rates: Sequence[Sequence[int]]) -> list[str]:
        return [self.types[row.index(max(row))] for row in rates]

    def _levels(
        self, model: nn.Module, name: str, alive: Tensor | None, images: Tensor, seed: int
    ) -> list[tuple[int, float]]:
        """(bytes, distortion) of one tensor in each type."""
        found = []
        with restored(model.get_parameter(name)) as weight, resumed(model, name, images) as (reference, again):
            chosen = torch.ones(weight.shape, dtype=torch.bool) if alive is None else alive
            original = weight.cpu()
            values = original[chosen].numpy()
            for kind in self.types:
                data = bytes(VALUES[kind].encode(values, seed))
                decoded = VALUES[kind].decode(memoryview(data), len(values))
                weight.copy_(original.masked_scatter(chosen, torch.from_numpy(decoded.copy())))
                found.append((len(data), float(squared_error(again(), reference).mean())))
        return found
