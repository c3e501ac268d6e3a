"""The books of a sparse broadcast: what was published, the changes that led to it, and who holds which version.

See `fl_sim.communication.sparse_broadcast` for what travels and how a client reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fl_sim import codecs
from fl_sim.codecs import Schema
from fl_sim.communication.messages import Exchange
from fl_sim.communication.sparse_broadcast import (
    REST,
    WHOLE,
    EncodedModel,
    SparseBroadcast,
    Step,
    digest,
    join_framed,
)
from fl_sim.communication.task_header import BroadcastHeader
from fl_sim.core.seeding import Purpose, derive
from fl_sim.core.types import Mask, Params, UserError
from fl_sim.sparsity import global_topk, magnitude, topk_mask
from fl_sim.sparsity.masks import alive

MODEL, MASK, COUNTERS, STEP, NEW_MASK = "model", "mask", "counters", "change.", "new-mask."
UNKNOWN = -1
"""The version that a client holds after it failed, and the round before the first."""


@dataclass
class SparseBroadcastServer:
    """The published model and its history, as far back as the changes are smaller than the model.

    Attributes:
        rule: how much is published.
        exchange: what the federation exchanges.
        seed: of the run.
        model: the last published model, flat; before the first one the seeded model, which is version 0.
        version: its number.
        behind: rounds behind it.
        steps: version -> the change that led to it.
        holders: client -> version; whoever is not named was never told any, so it has what it makes itself: version 0.
        pruning_mask: the pruning mask of `model`.
    """

    rule: SparseBroadcast
    exchange: Exchange
    seed: int
    model: Tensor
    version: int = 0
    behind: int = UNKNOWN
    steps: dict[int, Step] = field(default_factory=dict)
    holders: dict[int, int] = field(default_factory=dict)
    pruning_mask: Mask | None = None
    _encoded: dict[tuple[int | None, bytes], EncodedModel] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._start = digest(self.model, self.exchange)

    @property
    def params(self) -> Params:
        """The published model."""
        return self.exchange.schema.view(self.model)

    @property
    def _part(self) -> Schema:
        return self.exchange.schema.prunable_part

    def publish(self, behind: int, params: Params, pruning_mask: Mask | None) -> None:
        """Publish the global model after so many rounds, once; under a new mask all that it leaves alive."""
        if behind == self.behind:
            return
        self.behind = behind
        schema, count = self.exchange.schema, self.exchange.schema.prunable_size
        flat, old = schema.flat(params), self._part.view(self.model[:count])
        masks = not _same(pruning_mask, self.pruning_mask, schema)
        if masks or not torch.equal(flat[:count], self.model[:count]):
            new = self._part.view(flat[:count])
            # Before the first round only given weights are not what every party makes: they are published whole.
            chosen = pruning_mask if masks or behind == 0 else self._largest(new, old)
            coding, seed = self.rule.coding, derive(self.seed, behind, Purpose.ENCODING)
            data = coding.encode(new, chosen, old, schema=self._part, held_mask=None, seed=seed)
            self.version += 1
            self.steps[self.version] = step = Step(data, masks)
            self.model, _ = step.apply(self.model, coding, self.exchange)
        self.model = torch.cat([self.model[:count], flat[count:]])
        self.pruning_mask = pruning_mask
        self._encoded.clear()
        self._forget_old()

    def _largest(self, new: Params, old: Params) -> Mask:
        moved = {name: new[name] - old[name] for name in self._part.names}
        largest = topk_mask(magnitude(moved), global_topk(magnitude(moved), self.rule.density))
        return {name: keep & (moved[name] != 0) for name, keep in largest.items()}

    def _forget_old(self) -> None:
        """Forget a change once it and those after it cost more than all prunable values."""
        total, kept = 0, {}
        for version, step in reversed(self.steps.items()):
            total += len(step.data)
            if total > self._part.nbytes:
                break
            kept[version] = step
        self.steps = dict(reversed(kept.items()))

    def encoded(self, client: int, held_mask: Mask | None) -> EncodedModel:
        """Encode the published model for a client; `held_mask` is the pruning mask that it holds."""
        base = self.holders.get(client, 0)
        steps = self._since(base)
        key = (
            base if steps is not None else None,
            b"" if held_mask is None or steps is not None else codecs.mask_hash(held_mask),
        )
        if key not in self._encoded:
            self._encoded[key] = self._whole(held_mask) if steps is None else self._changes(base, steps)
        return self._encoded[key]

    def _since(self, base: int) -> list[Step] | None:
        """The changes that a holder of `base` lacks; None where they are forgotten, or a whole model is smaller."""
        steps = [step for version, step in self.steps.items() if version > base]
        values = self.exchange.schema.prunable_size if self.pruning_mask is None else alive(self.pruning_mask)
        known = base != UNKNOWN and len(steps) == self.version - base
        return steps if known and sum(len(step.data) for step in steps) <= 4 * values else None

    def _whole(self, held_mask: Mask | None) -> EncodedModel:
        data = WHOLE.encode(
            self.params, self.pruning_mask, self.params, schema=self.exchange.schema, held_mask=held_mask, seed=0
        )
        return EncodedModel(data, self.pruning_mask, BroadcastHeader(self.version, None, WHOLE.content))

    def _changes(self, base: int, steps: Sequence[Step]) -> EncodedModel:
        schema = self.exchange.schema
        other = schema.other_part.view(self.model[schema.prunable_size :])
        rest = REST.encode(other, None, other, schema=schema.other_part, held_mask=None, seed=0)
        masks = [codecs.decode(step.data, schema=self._part)[1] for step in steps]
        travelled = torch.zeros(schema.prunable_size, dtype=torch.bool)
        for mask in masks:
            travelled |= True if mask is None else self._part.flat_mask(mask)
        start = self._start if base == 0 else b""
        brings_mask = bytes(step.masks for step in steps)
        header = BroadcastHeader(self.version, base, self.rule.coding.content, brings_mask, start)
        data = join_framed([*(step.data for step in steps), rest])
        return EncodedModel(data, schema.view_mask(travelled), header)

    def learned(self, client: int) -> None:
        """The client answered, so it holds the last published model."""
        self.holders[client] = self.version

    def forget(self, client: int) -> None:
        """The client failed: what it holds is unknown."""
        self.holders[client] = UNKNOWN

    def kept(self) -> Mapping[str, Tensor]:
        """Tensors that a checkpoint keeps beside `holders`."""
        steps = {
            (NEW_MASK if step.masks else STEP) + str(version): torch.frombuffer(bytearray(step.data), dtype=torch.uint8)
            for version, step in self.steps.items()
        }
        mask = {} if self.pruning_mask is None else {MASK: self.exchange.schema.flat_mask(self.pruning_mask)}
        return {MODEL: self.model, COUNTERS: torch.tensor([self.version, self.behind]), **steps, **mask}

    def restore(self, kept: Mapping[str, Tensor], holders: Mapping[int, int]) -> None:
        """Invert `kept`.

        Raises:
            UserError: it was kept by a version of this program that published otherwise.
        """
        if COUNTERS not in kept:
            raise UserError("this checkpoint of a sparse broadcast is of an earlier version: start the run again")
        self.version, self.behind = kept[COUNTERS].tolist()
        steps = {}
        for name, data in kept.items():
            prefix, dot, number = name.rpartition(".")
            if dot:
                steps[int(number)] = Step(data.numpy().tobytes(), prefix + dot == NEW_MASK)
        self.steps = dict(sorted(steps.items()))
        self.model = kept[MODEL]
        self.pruning_mask = self.exchange.schema.view_mask(kept[MASK]) if MASK in kept else None
        self.holders = dict(holders)


def _same(first: Mask | None, second: Mask | None, schema: Schema) -> bool:
    if first is None or second is None:
        return first is second
    return torch.equal(schema.flat_mask(first), schema.flat_mask(second))
