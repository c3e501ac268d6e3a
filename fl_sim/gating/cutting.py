"""Structured pruning that saves time in training: channels that are off for a whole round are cut out of the model.

with submodel(model, mask) as sub:
    train(sub.model, mask=sub.mask)     # a smaller model; afterwards `model` holds what it learnt

Masked training multiplies channels by zero and computes them all the same. Here a client trains the sub-model of the
channels that are on, as in HeteroFL (Diao et al., ICLR 2021, section 3), but of any channels and not of the first ones. The
result is that of masked training up to the rounding of shorter sums. What is cut out stays as it was, its BatchNorm
statistics included, and no weight decay reaches it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fl_sim.core.types import Mask
from fl_sim.gating.cut_places import Place, places_of
from fl_sim.gating.gates import Gate
from fl_sim.gating.graph import top_channels
from fl_sim.models.computed import copied

SHAPES_KEPT = 8
"""Sub-models that a model remembers, one for each choice of how many channels stay."""
ROWS, COLUMNS = 0, 1


class _Through(nn.Module):
    """In place of a gate whose readers were cut as well: the normalised output as it is."""

    def forward(self, x: Tensor, z: Tensor, filters: Tensor) -> Tensor:
        """See `Gate.forward`."""
        return z


class _Widened(nn.Module):
    """In place of a gate that others read too: zeros at the channels that were cut out."""

    channels: Tensor

    def __init__(self, size: int, kept: int, device: torch.device) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("channels", torch.zeros(kept, dtype=torch.int64, device=device), persistent=False)

    def forward(self, x: Tensor, z: Tensor, filters: Tensor) -> Tensor:
        """z (B, k, H, W) -> (B, size, H, W); see `Gate.forward`."""
        layout = torch.channels_last if z.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        shape = (len(z), self.size, *z.shape[2:])
        wide = torch.empty(shape, dtype=z.dtype, device=z.device, memory_format=layout).zero_()
        return wide.index_copy(1, self.channels, z)


@dataclass
class SubModel:
    """A model with fewer channels, filled from a whole model and written back into it.

    Attributes:
        model: the smaller model; its entries have the names that they have in the whole one.
        axes: name of an entry -> the places that its rows and its columns belong to.
        mask: pruning mask of the smaller model; None without one.
        samples: number of samples that it was trained on, for the counters of the gates.
    """

    model: nn.Module
    axes: Mapping[str, tuple[Place | None, Place | None]]
    mask: Mask | None = None
    samples: int = 0
    _scores: Mapping[Place, Tensor] = field(default_factory=dict)
    _kept: Mapping[Place, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def take(
        self, whole: nn.Module, alive: Mapping[Place, Tensor], scores: Mapping[Place, Tensor], mask: Mask | None
    ) -> None:
        """Copy the alive channels of the whole model; `alive` holds a mask (C,), bool, for each place."""
        self._kept, self._scores, self.samples = {place: m.nonzero()[:, 0] for place, m in alive.items()}, scores, 0
        self.mask = None if mask is None else {name: self._cut(name, value) for name, value in mask.items()}
        small = _entries(self.model)
        for name, value in _entries(whole).items():
            small[name].copy_(self._cut(name, value))
        for place, channels in self._kept.items():
            if place.gate is not None and isinstance(wide := self.model.get_submodule(place.gate), _Widened):
                wide.channels.copy_(channels)

    @torch.no_grad()
    def put_back(self, whole: nn.Module) -> None:
        """Copy what was trained into the whole model; what was cut out stays as it is there."""
        small = _entries(self.model)
        for name, value in _entries(whole).items():
            rows, columns = (None if p is None else self._kept[p] for p in self.axes.get(name, (None, None)))
            if rows is not None and columns is not None:
                value[rows[:, None], columns] = small[name]
            elif rows is not None:
                value.index_copy_(ROWS, rows, small[name])
            elif columns is not None:
                value.index_copy_(COLUMNS, columns, small[name])
            else:
                value.copy_(small[name])
        for place, channels in self._kept.items():
            if place.gate is not None:
                gate = cast(Gate, whole.get_submodule(place.gate))
                gate.active[channels] += self.samples
                gate.salience_sum[channels] += self.samples * self._scores[place][channels]
                gate.seen += self.samples

    def _cut(self, name: str, value: Tensor) -> Tensor:
        for axis, place in enumerate(self.axes.get(name, ())):
            if place is not None:
                value = value.index_select(axis, self._kept[place])
        return value


_REMEMBERED: WeakKeyDictionary[nn.Module, tuple[list[Place], dict[tuple[int, ...], SubModel]]] = WeakKeyDictionary()
"""Places and sub-models of a model: tracing it takes longer than a client's steps. What they hold is written anew each time."""


@contextmanager
def submodel(model: nn.Module, mask: Mask | None = None) -> Iterator[SubModel | None]:
    """Context manager with the sub-model of the channels that are on; its parameters are put back into `model` at the end.

    On are, behind a gate of salience "weight", the channels with the largest filters now, as many as the gate keeps; in a
    model without gates those that the pruning mask leaves a filter or a reader.

    Args:
        model: holds the received parameters.
        mask: pruning mask by parameter name.

    Returns:
        The sub-model; None where every channel is on.

    Raises:
        UserError: a model of which no channel can be cut out.
    """
    places, made = _remembered(model)
    scores = _scores(model, places)
    alive = {p: m for p, m in _alive(model, places, scores, mask).items() if not m.all()}
    if not alive:
        yield None
        return
    key = tuple(int(alive[p].sum()) if p in alive else -1 for p in places)
    sub = made.get(key)
    if sub is None:
        if len(made) == SHAPES_KEPT:
            del made[next(iter(made))]
        sub = made[key] = _narrowed(model, {p: int(m.sum()) for p, m in alive.items()})
    sub.model.train(model.training)
    sub.take(model, alive, scores, mask)
    yield sub
    sub.put_back(model)


def _remembered(model: nn.Module) -> tuple[list[Place], dict[tuple[int, ...], SubModel]]:
    if model not in _REMEMBERED:
        _REMEMBERED[model] = places_of(model), {}
    return _REMEMBERED[model]


def _scores(model: nn.Module, places: Sequence[Place]) -> dict[Place, Tensor]:
    gated = [place for place in places if place.gate is not None]
    found = {}
    for place in gated:
        gate = cast(Gate, model.get_submodule(cast(str, place.gate)))
        filters = cast(nn.Conv2d, model.get_submodule(place.conv)).weight.detach()
        found[place] = cast(Tensor, gate.salience(filters[:1], filters[:1], filters))[0]
    return found


def _alive(
    model: nn.Module, places: Sequence[Place], scores: Mapping[Place, Tensor], mask: Mask | None
) -> dict[Place, Tensor]:
    """Place -> which channels are on (C,), bool; at least one is."""
    found: dict[Place, Tensor] = {}
    for place in places:
        if place.gate is not None:
            gate = cast(Gate, model.get_submodule(place.gate))
            found[place] = top_channels(scores[place][None], gate.kept)[0]
            continue
        filters, columns = f"{place.conv}.weight", f"{place.readers[0]}.weight"
        if mask is not None and filters in mask and columns in mask:
            on = mask[filters].flatten(1).any(dim=1) | mask[columns].transpose(0, 1).flatten(1).any(dim=1)
            on[0] |= not on.any()
            found[place] = on.to(next(model.parameters()).device)
    return found


def _narrowed(whole: nn.Module, kept: Mapping[Place, int]) -> SubModel:
    """The sub-model with so many channels at these places; what its tensors hold is not filled in yet."""
    small = copied(whole)
    rows: dict[str, Place] = {}
    columns: dict[str, Place] = {}
    for place, count in kept.items():
        conv, norm = (small.get_submodule(path) for path in (place.conv, place.norm))
        conv.out_channels = norm.num_features = count  # type: ignore[assignment]
        rows |= {f"{path}.{name}": place for path in (place.conv, place.norm) for name in _by_channel(path, small)}
        for reader in place.readers:
            small.get_submodule(reader).in_channels = count  # type: ignore[assignment]
            columns[f"{reader}.weight"] = place
        if place.gate is not None:
            gate = cast(Gate, small.get_submodule(place.gate))
            there = gate.active.device
            small.set_submodule(place.gate, _Through() if place.readers else _Widened(gate.channels, count, there))
    axes = {name: (rows.get(name), columns.get(name)) for name in rows.keys() | columns.keys()}
    for name, pair in axes.items():
        _shorten(small, name, [None if place is None else kept[place] for place in pair])
    return SubModel(small, axes)


def _by_channel(path: str, model: nn.Module) -> list[str]:
    """Names of a layer's own entries that have a row for each channel."""
    return [name for name, value in _entries(model.get_submodule(path)).items() if value.dim()]


def _shorten(model: nn.Module, name: str, sizes: Sequence[int | None]) -> None:
    """Cut the first rows and columns out of one entry, in place."""
    path, _, last = name.rpartition(".")
    owner = model.get_submodule(path)
    value = getattr(owner, last)
    short = value.detach()
    for axis, size in enumerate(sizes):
        if size is not None:
            short = short.narrow(axis, 0, size)
    short = short.clone(memory_format=torch.preserve_format)
    setattr(owner, last, nn.Parameter(short, value.requires_grad) if isinstance(value, nn.Parameter) else short)


def _entries(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, detached; those of gates are left out, whose channels are counted elsewhere."""
    gates = {id(m) for g in model.modules() if isinstance(g, (Gate, _Widened)) for m in g.modules()}
    return {
        f"{path}.{name}" if path else name: value.detach()
        for path, module in model.named_modules()
        if id(module) not in gates
        for name, value in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    }
