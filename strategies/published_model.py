"""Server of a sparse broadcast: the published model, the deltas that led to it, and the version that each client holds.

See `fl_sim.communication.sparse_broadcast` for what travels and how a client reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fl_sim import codecs
from fl_sim.codecs import Schema
from fl_sim.communication.exchange import Coding, Exchange, OwnCoding
from fl_sim.communication.sparse_broadcast import (
    REST,
    WHOLE,
    Delta,
    EncodedModel,
    SparseBroadcast,
    digest,
    join_framed,
    of_changes,
)
from fl_sim.communication.task_header import BroadcastHeader
from fl_sim.core.seeding import Purpose, derive
from fl_sim.core.types import Mask, Params, UserError
from fl_sim.sparsity import global_topk_mask, magnitude
from fl_sim.sparsity.masks import alive
from strategies.codec_state import CodecState

# The keys of a checkpoint's tensors.
MODEL, MASK, COUNTERS, DELTA, NEW_MASK = "model", "mask", "counters", "change.", "new-mask."
UNKNOWN = -1
"""The version that a client holds after it failed, and the round before the first."""


@dataclass
class SparseBroadcastServer:
    """The published model and its deltas, as far back as they are together smaller than the model.

    Attributes:
        rule: how much is published.
        exchange: what the federation exchanges.
        seed: of the run.
        model: the last published model, flat; before the first one the seeded model, which is version 0.
        version: number of the last published model.
        after_round: round after which the last model was published; 0 = before round 1, -1 = not yet.
        deltas: version -> the delta that led to it.
        client_versions: client -> version that it holds, -1 = unknown. Clients not listed hold version 0, the seeded model.
        pruning_mask: the pruning mask of `model`.
        codec_state: what a codec of the user's own keeps of the server, which each change goes on with.
    """

    rule: SparseBroadcast
    exchange: Exchange
    seed: int
    model: Tensor
    version: int = 0
    after_round: int = UNKNOWN
    deltas: dict[int, Delta] = field(default_factory=dict)
    client_versions: dict[int, int] = field(default_factory=dict)
    pruning_mask: Mask | None = None
    codec_state: CodecState = field(default_factory=CodecState)
    _encoded: dict[tuple[int | None, bytes], EncodedModel] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._start = digest(self.model, self.exchange)

    @property
    def params(self) -> Params:
        """The published model."""
        return self.exchange.schema.view(self.model)

    @property
    def _coding(self) -> Coding:
        return of_changes(self.exchange, self.rule.coding)

    @property
    def _part(self) -> Schema:
        return self.exchange.schema.prunable_part

    def publish(self, after_round: int, params: Params, pruning_mask: Mask | None) -> None:
        """Publish the global model after a round, once for each round; under a new mask all weights that the mask keeps."""
        if after_round == self.after_round:
            return
        self.after_round = after_round
        schema, count = self.exchange.schema, self.exchange.schema.prunable_size
        flat, old = schema.flat(params), self._part.view(self.model[:count])
        masks = not _same(pruning_mask, self.pruning_mask, schema)
        if masks or not torch.equal(flat[:count], self.model[:count]):
            new = self._part.view(flat[:count])
            # Before the first round only given weights are not what every party makes: they are published whole.
            chosen = pruning_mask if masks or after_round == 0 else self._largest(new, old)
            coding, seed = self._coding, derive(self.seed, after_round, Purpose.ENCODING)
            with self.codec_state.next() as state:
                data = coding.encode(new, chosen, old, schema=self._part, held_mask=None, seed=seed, state=state)
            self.version += 1
            self.deltas[self.version] = delta = Delta(data, masks)
            self.model, _ = delta.apply(self.model, coding, self.exchange)
        self.model = torch.cat([self.model[:count], flat[count:]])
        self.pruning_mask = pruning_mask
        self._encoded.clear()
        self._forget_old()

    def _largest(self, new: Params, old: Params) -> Mask | None:
        """The coordinates that are published; None = all, where what did not change costs next to nothing."""
        if self.rule.density == 1 and (codecs.is_relative(self.rule.values) or isinstance(self._coding, OwnCoding)):
            return None
        moved = {name: new[name] - old[name] for name in self._part.names}
        largest = global_topk_mask(magnitude(moved), self.rule.density)
        return {name: keep & (moved[name] != 0) for name, keep in largest.items()}

    def _forget_old(self) -> None:
        """Forget a change once it and those after it cost more than all prunable values."""
        total, kept = 0, {}
        for version, delta in reversed(self.deltas.items()):
            total += len(delta.data)
            if total > self._part.nbytes:
                break
            kept[version] = delta
        self.deltas = dict(reversed(kept.items()))

    def encoded(self, client: int, held_mask: Mask | None) -> EncodedModel:
        """Encode the published model for a client; `held_mask` is the pruning mask that it holds."""
        base = self.client_versions.get(client, 0)
        deltas = self._since(base)
        key = (
            base if deltas is not None else None,
            b"" if held_mask is None or deltas is not None else codecs.mask_hash(held_mask),
        )
        if key not in self._encoded:
            self._encoded[key] = self._whole(held_mask) if deltas is None else self._changes(base, deltas)
        return self._encoded[key]

    def _since(self, base: int) -> list[Delta] | None:
        """The changes that a holder of `base` lacks; None where they are forgotten, or a whole model is smaller."""
        deltas = [delta for version, delta in self.deltas.items() if version > base]
        values = self.exchange.schema.prunable_size if self.pruning_mask is None else alive(self.pruning_mask)
        known = base != UNKNOWN and len(deltas) == self.version - base
        return deltas if known and sum(len(delta.data) for delta in deltas) <= 4 * values else None

    def _whole(self, held_mask: Mask | None) -> EncodedModel:
        data = WHOLE.encode(
            self.params, self.pruning_mask, self.params, schema=self.exchange.schema, held_mask=held_mask, seed=0
        )
        return EncodedModel(data, self.pruning_mask, BroadcastHeader(self.version, None, WHOLE.content))

    def _changes(self, base: int, deltas: Sequence[Delta]) -> EncodedModel:
        schema = self.exchange.schema
        other = schema.other_part.view(self.model[schema.prunable_size :])
        rest = REST.encode(other, None, other, schema=schema.other_part, held_mask=None, seed=0)
        masks = [codecs.opened(delta.data, schema=self._part).mask() for delta in deltas]
        travelled = torch.zeros(schema.prunable_size, dtype=torch.bool)
        for mask in masks:
            travelled |= True if mask is None else self._part.flat_mask(mask)
        start = self._start if base == 0 else b""
        brings_mask = bytes(delta.masks for delta in deltas)
        header = BroadcastHeader(self.version, base, self._coding.content, brings_mask, start)
        data = join_framed([*(delta.data for delta in deltas), rest])
        return EncodedModel(data, schema.view_mask(travelled), header)

    def learned(self, client: int, version: int) -> None:
        """Note that a client answered a task that brought this version of the published model."""
        self.client_versions[client] = version

    def forget(self, client: int) -> None:
        """Note that a client failed, so that the version it holds is unknown."""
        self.client_versions[client] = UNKNOWN

    def kept(self) -> Mapping[str, Tensor]:
        """Tensors that a checkpoint keeps beside `client_versions`."""
        deltas = {
            (NEW_MASK if delta.masks else DELTA) + str(version): torch.frombuffer(
                bytearray(delta.data), dtype=torch.uint8
            )
            for version, delta in self.deltas.items()
        }
        mask = {} if self.pruning_mask is None else {MASK: self.exchange.schema.flat_mask(self.pruning_mask)}
        return {MODEL: self.model, COUNTERS: torch.tensor([self.version, self.after_round]), **deltas, **mask}

    def restore(self, kept: Mapping[str, Tensor], client_versions: Mapping[int, int]) -> None:
        """Invert `kept`.

        Raises:
            UserError: it was kept by a version of this program that published otherwise.
        """
        if COUNTERS not in kept:
            raise UserError("this checkpoint of a sparse broadcast is of an earlier version: start the run again")
        self.version, self.after_round = kept[COUNTERS].tolist()
        deltas = {}
        for name, data in kept.items():
            prefix, dot, number = name.rpartition(".")
            if dot:
                deltas[int(number)] = Delta(data.numpy().tobytes(), prefix + dot == NEW_MASK)
        self.deltas = dict(sorted(deltas.items()))
        self.model = kept[MODEL]
        self.pruning_mask = self.exchange.schema.view_mask(kept[MASK]) if MASK in kept else None
        self.client_versions = dict(client_versions)


def _same(first: Mask | None, second: Mask | None, schema: Schema) -> bool:
    if first is None or second is None:
        return first is second
    return torch.equal(schema.flat_mask(first), schema.flat_mask(second))
