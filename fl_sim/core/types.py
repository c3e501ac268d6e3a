"""The values that every layer shares: parameters, masks, tasks, updates, and the shape of a client.

`Params` and `Mask` are plain dicts. Where all tensors are views of one buffer they are *flat*: `FlatParams` and
`FlatMask` are dicts that also remember that buffer, so that encoding and aggregation touch memory once instead of once
per tensor. Code that does not care treats them as dicts.

    >>> import torch
    >>> params = FlatParams.pack({"weight": torch.ones(2, 2), "bias": torch.zeros(2)})
    >>> params.flat.tolist(), params["weight"].shape
    ([1.0, 1.0, 1.0, 1.0, 0.0, 0.0], torch.Size([2, 2]))
    >>> params.update(bias=torch.ones(2))
    >>> isinstance(params, FlatParams), params["bias"].tolist()
    (False, [1.0, 1.0])
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, Sequence, ValuesView
from copy import deepcopy
from dataclasses import dataclass, field
from functools import lru_cache, wraps
from itertools import accumulate
from typing import Self, SupportsIndex

import torch
from torch import Tensor

from fl_sim.core.errors import UserError as UserError

Params = dict[str, Tensor]
"""State-dict names -> detached CPU tensors, of any shape; floating point unless a model says otherwise."""

Mask = dict[str, Tensor]
"""Parameter names -> bool tensors of the parameter's shape. There are four kinds, each with its name:

- `pruning_mask`, the server's (`Task.mask`): True = the weight is kept, False = it is pruned. Prunable names only.
- `upload_mask`, a client's (`Update.mask`): True = the coordinate travels. Prunable names only.
- `held_mask`: the pruning mask that a client received last, as the server knows it; a payload need not repeat it.
- `retained_mask`, inside a client: False = the coordinate is reset to the received value. Any names.

A codec that serves both directions calls the mask in a payload `sent_mask`."""

Grads = dict[str, Tensor]
"""Gradients, or the server's pseudo-gradient `old - new`, under the parameters' names."""

Scores = dict[str, Tensor]
"""Prunable names -> non-negative importance, same shapes as the parameters."""

Scalar = bool | int | float | str | bytes
Metrics = dict[str, float]


class _Tensors(dict[str, Tensor]):
    """A dict of tensors that is saved as what it holds: `torch.load` gives an ordinary mapping, in weights-only mode too."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[object, ...]:
        return OrderedDict, (), None, None, iter(self.items())

    def __copy__(self) -> dict[str, Tensor]:
        return dict(self.items())

    def __deepcopy__(self, memo: dict[int, object]) -> dict[str, Tensor]:
        return {name: deepcopy(value, memo) for name, value in self.items()}


class _Flat(_Tensors):
    """A dict of tensors that are consecutive views of one 1-D buffer, in insertion order.

    The views are made when one is first asked for: a model has hundreds, and encoding and aggregation need none. Changing a
    view in place changes the buffer. Assigning, adding or removing an entry makes the object a plain dict, which is no
    `FlatParams` and has no buffer: the other holders of the buffer do not see what one of them assigned.
    """

    flat: Tensor
    names: tuple[str, ...]
    _shapes: tuple[torch.Size, ...]
    _lazy: bool

    def __new__(cls, *args: object, **entries: Tensor) -> Self:
        """Make a plain dict of `dict`'s arguments; `view` and `pack` make flat ones."""
        made = super().__new__(cls)
        made.__class__ = _Tensors  # type: ignore[assignment]
        made.update(*args, **entries)
        return made

    @classmethod
    def view(cls, flat: Tensor, names: tuple[str, ...], shapes: tuple[torch.Size, ...]) -> Self:
        """Cut `flat` (1-D) into consecutive views; the sizes must add up to its length."""
        made = dict.__new__(cls)
        made.flat, made.names, made._shapes, made._lazy = flat, names, shapes, True
        return made

    def over(self, flat: Tensor) -> Self:
        """The same names and shapes over another buffer of this length."""
        return self.view(flat, self.names, self._shapes)

    @classmethod
    def pack(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Copy tensors of one dtype into one new buffer; its views are made at once."""
        parts = list(tensors.values())
        flat = torch._utils._flatten_dense_tensors(parts) if len(parts) > 1 else _copied(parts)
        return cls.view(flat, tuple(tensors), tuple(t.shape for t in parts))._filled(parts)

    def _made(self) -> Self:
        return self._filled(_like(self._shapes)) if self._lazy else self

    def _filled(self, like: Sequence[Tensor]) -> Self:
        """Put the views into the dict itself, where C code looks for them."""
        self._lazy = False
        views = _cut(self.flat, like)
        dict.update(self, zip(self.names, views, strict=True))
        return self

    @property
    def sizes(self) -> tuple[int, ...]:
        """Elements of each entry."""
        return _sizes(self._shapes)

    @property
    def whole(self) -> bool:
        """Whether every entry is still a view of its part of the buffer; `entry.data = ...` moves one elsewhere."""
        if self._lazy:
            return True
        base, width = self.flat.data_ptr(), self.flat.element_size()
        sums, filled = _offsets(self._shapes)
        at = list(map(Tensor.data_ptr, dict.values(self)))  # their sum: every client asks, and no other layout has it
        if filled is None:
            return sum(at) == len(at) * base + sums * width
        return sum(at[i] for i in filled) == len(filled) * base + sums * width

    def __getitem__(self, name: str) -> Tensor:
        return dict.__getitem__(self._made(), name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return dict.__contains__(self._made(), name)

    def __setitem__(self, name: str, value: Tensor) -> None:
        if self._made().get(name) is not value:  # `p[name] += 1` assigns the entry itself
            self._loosened()[name] = value

    def __deepcopy__(self, memo: dict[int, object]) -> dict[str, Tensor]:
        if not self.whole:
            return super().__deepcopy__(memo)
        return type(self).view(deepcopy(self.flat, memo), self.names, self._shapes)

    def get(self, name: str, default: Tensor | None = None) -> Tensor | None:  # type: ignore[override]
        return dict.get(self._made(), name, default)

    def keys(self) -> KeysView[str]:  # type: ignore[override]
        return dict.keys(self._made())

    def values(self) -> ValuesView[Tensor]:  # type: ignore[override]
        return dict.values(self._made())

    def items(self) -> ItemsView[str, Tensor]:  # type: ignore[override]
        return dict.items(self._made())

    def _loosened(self) -> dict[str, Tensor]:
        """Drop the buffer: from here on the object is a plain dict."""
        self._made()
        vars(self).clear()
        self.__class__ = _Tensors  # type: ignore[assignment]
        return self


def _after(prepare: Callable[[_Flat], object], name: str) -> Callable[..., object]:
    """Make a method of `dict` that runs once the dict holds its entries."""
    inner = getattr(dict, name)

    @wraps(inner)
    def method(self: _Flat, *args: object, **entries: object) -> object:
        prepare(self)
        for other in args:
            if isinstance(other, _Flat):
                other._made()  # `dict` looks into it without asking
        return inner(self, *args, **entries)

    return method


for _name in ("__eq__", "__ne__", "__or__", "__ror__", "__repr__", "__reversed__", "__sizeof__", "copy"):
    setattr(_Flat, _name, _after(_Flat._made, _name))
for _name in ("__delitem__", "__ior__", "clear", "pop", "popitem", "setdefault", "update"):
    setattr(_Flat, _name, _after(_Flat._loosened, _name))


@lru_cache(maxsize=64)
def _like(shapes: tuple[torch.Size, ...]) -> list[Tensor]:
    """Tensors of these shapes that take no memory."""
    return [torch.empty(shape, device="meta") for shape in shapes]


@lru_cache(maxsize=64)
def _sizes(shapes: tuple[torch.Size, ...]) -> tuple[int, ...]:
    return tuple(shape.numel() for shape in shapes)


@lru_cache(maxsize=64)
def _offsets(shapes: tuple[torch.Size, ...]) -> tuple[int, list[int] | None]:
    """(sum of the positions at which tensors of these shapes begin, which of them have elements; None = all do)."""
    sizes = [shape.numel() for shape in shapes]
    begins = [0, *accumulate(sizes)]
    filled = [i for i, size in enumerate(sizes) if size]
    return sum(begins[i] for i in filled), None if len(filled) == len(sizes) else filled


def _copied(tensors: Sequence[Tensor]) -> Tensor:
    """At most one tensor, as a new 1-D one."""
    return tensors[0].flatten().clone() if tensors else torch.empty(0)


def _cut(flat: Tensor, like: Sequence[Tensor]) -> Sequence[Tensor]:
    """Consecutive views of a 1-D tensor in the shapes of other tensors."""
    sizes = [tensor.numel() for tensor in like]
    if all(sizes) and sum(sizes) == flat.numel():
        views: Sequence[Tensor] = torch._utils._unflatten_dense_tensors(flat, like)  # three times as fast as one by one
        return views
    return [part.view(tensor.shape) for part, tensor in zip(flat.split(sizes), like, strict=True)]


class FlatParams(_Flat):
    """`Params` whose tensors are views of `flat`, a 1-D tensor of one dtype."""


class FlatMask(_Flat):
    """`Mask` whose tensors are views of `flat`, a 1-D bool tensor."""


@dataclass(frozen=True, slots=True)
class Task:
    """Task: what the server sends one client in one round.

    Attributes:
        round: number of the round; the first is 1.
        params: global parameters, of the names that the federation exchanges.
        mask: the global pruning mask; None when the model is dense.
        config: the user's own scalars, for instance `{"mu": 0.01}`; the framework adds none.
        seed: the run's seed, the same for every client and round. What clients draw in common starts from it; a client's
            own random numbers come from `ctx.rng`.
        extra: name -> tensors that the method sends beside the parameters (`fl_sim.communication.extra`), for instance
            the control variate of SCAFFOLD; this client's own copies.
    """

    round: int
    params: Params
    mask: Mask | None = None
    config: Mapping[str, Scalar] = field(default_factory=dict)
    seed: int = 0
    extra: Mapping[str, Params] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Update:
    """Update: a client's parameters after training, and the prunable coordinates of them to send.

    Attributes:
        params: parameters after training, not their change.
        num_examples: weight in the mean, a positive integer.
        mask: the upload mask; None sends everything. A prunable coordinate outside it does not travel, whatever `params`
            holds there.
        metrics: scalars for the log, whose example-weighted mean is in the round's row as `train_NAME`.
        extra: name -> tensors that the client sends beside the parameters; it declares them (`fl_sim.communication.extra`).
    """

    params: Params
    num_examples: int
    mask: Mask | None = None
    metrics: Metrics = field(default_factory=dict)
    extra: Mapping[str, Params] = field(default_factory=dict)


MaskRule = Callable[[int, Mask | None, Params, Grads | None], Mask | None]
"""(round, pruning mask, prunable parameters, pseudo-gradient or gradient) -> the next pruning mask; used on both sides."""
