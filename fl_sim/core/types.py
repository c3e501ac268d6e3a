"""The values that every layer shares: parameters, masks, tasks, updates, and the shape of a client.

`Params` and `Mask` are plain dicts. Where all tensors are views of one buffer they are *flat*: `FlatParams` and
`FlatMask` are dicts that also remember that buffer, so that encoding and aggregation touch memory once instead of once
per tensor. Code that does not care treats them as dicts.

    >>> import torch
    >>> params = FlatParams.pack({"weight": torch.ones(2, 2), "bias": torch.zeros(2)})
    >>> params.flat.tolist(), params["weight"].shape
    ([1.0, 1.0, 1.0, 1.0, 0.0, 0.0], torch.Size([2, 2]))
"""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from fl_sim.core.errors import UserError as UserError

if TYPE_CHECKING:
    pass

Params = dict[str, Tensor]
"""State-dict names -> detached CPU tensors, of any shape; floating point unless a model says otherwise."""

Mask = dict[str, Tensor]
"""Prunable names only -> bool tensors of the parameter's shape; True = alive."""

Grads = dict[str, Tensor]
"""Gradients, or the server's pseudo-gradient `old - new`, under the parameters' names."""

Scores = dict[str, Tensor]
"""Prunable names -> non-negative importance, same shapes as the parameters."""

Scalar = bool | int | float | str | bytes
Metrics = dict[str, float]


class _Flat(dict[str, Tensor]):
    """A dict of tensors that are consecutive views of one 1-D buffer, in insertion order.

    The views are made when one is first asked for: a model has hundreds, and encoding and aggregation need none.
    Assigning to a name copies into the buffer; names cannot be added or removed (`dict(params)` makes a plain dict).
    """

    flat: Tensor
    names: tuple[str, ...]
    _shapes: tuple[torch.Size, ...] | None

    @classmethod
    def view(cls, flat: Tensor, names: tuple[str, ...], shapes: tuple[torch.Size, ...]) -> Self:
        """Cut `flat` (1-D) into consecutive views; the sizes must add up to its length."""
        made = cls()
        made.flat, made.names, made._shapes = flat, names, shapes
        return made

    @classmethod
    def pack(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Copy tensors of one dtype into one new buffer."""
        parts = [t.reshape(-1) for t in tensors.values()]
        flat = torch.cat(parts) if parts else torch.empty(0)
        return cls.view(flat, tuple(tensors), tuple(t.shape for t in tensors.values()))

    def _made(self) -> Self:
        if self._shapes is not None:
            shapes, self._shapes = self._shapes, None
            parts = self.flat.split([shape.numel() for shape in shapes])
            super().update(zip(self.names, map(Tensor.view, parts, shapes), strict=True))
        return self

    def __getitem__(self, name: str) -> Tensor:
        return dict.__getitem__(self._made(), name)

    def __setitem__(self, name: str, value: Tensor) -> None:
        if name not in self._made():
            raise KeyError(f"{name!r}: names cannot be added; make a plain dict of it first")
        own = dict.__getitem__(self, name)
        if own is not value:
            own.copy_(value)

    def __delitem__(self, name: str) -> None:
        raise KeyError(f"{name!r}: names cannot be removed; make a plain dict of it first")

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return dict.__contains__(self._made(), name)

    def __reduce__(self) -> tuple[object, ...]:
        shapes = tuple(value.shape for value in self.values())
        return type(self).view, (self.flat, self.names, shapes)

    def get(self, name: str, default: Tensor | None = None) -> Tensor | None:  # type: ignore[override]
        return dict.get(self._made(), name, default)

    def keys(self) -> KeysView[str]:  # type: ignore[override]
        return dict.keys(self._made())

    def values(self) -> ValuesView[Tensor]:  # type: ignore[override]
        return dict.values(self._made())

    def items(self) -> ItemsView[str, Tensor]:  # type: ignore[override]
        return dict.items(self._made())


class FlatParams(_Flat):
    """`Params` whose tensors are views of `flat`, a 1-D tensor of one dtype."""


class FlatMask(_Flat):
    """`Mask` whose tensors are views of `flat`, a 1-D bool tensor."""


@dataclass(frozen=True, slots=True)
class Task:
    """What the server asks of one client in one round.

    `params` are the global parameters (names the federation exchanges); `mask` the global mask or None when the model
    is dense; `config` the method's scalars, for instance `{"mu": 0.01}`.
    """

    round: int
    params: Params
    mask: Mask | None = None
    config: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Update:
    """What a client answers: its parameters after training and which prunable coordinates of them to send.

    `mask` None sends everything. A prunable coordinate outside `mask` does not travel, whatever `params` holds there.
    `num_examples` is the weight in the mean. `metrics` are scalars for the log; they are not aggregated by default.
    """

    params: Params
    num_examples: int
    mask: Mask | None = None
    metrics: Metrics = field(default_factory=dict)


MaskRule = Callable[[int, Mask | None, Params, Grads | None], Mask | None]
"""(round, mask, prunable parameters, pseudo-gradient or gradient) -> the next mask; used on both sides."""
