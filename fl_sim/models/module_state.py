"""What a model holds beside its weights, as it was built, and the way back to it: no client sees what another one left.

    built = ModuleState(model, {"fc.weight"})     # once in each process
    built.put_back()                              # before each client; microseconds where nothing changed

Looked at: every module that can be reached, its class, mode, hooks, sub-modules and Python attributes; tensors with their
dtype, shape, device, gradient and hooks; the values of all tensors that no payload overwrites; generators.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableMapping, MutableSequence, MutableSet
from dataclasses import dataclass, field
from types import CellType
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from fl_sim.models.content import digest_of
from fl_sim.models.memory_overlap import addresses
from fl_sim.models.reachable import Found, contents, reach


@dataclass
class ModuleState:
    """A model as it was when this was made.

    Attributes:
        model: on its device.
        elsewhere: state-dict names whose values others put in place: what travels, and what clients keep for themselves.
            Parameters are always among them.

    Raises:
        UserError: the model holds something whose state cannot be put back, such as an iterator or a script.
    """

    model: nn.Module
    elsewhere: Collection[str] = ()
    _values: list[tuple[list[Tensor], list[Tensor]]] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        self._found = found = reach(self.model)
        self._empty = [each for each in found.containers if not each]
        self._live = [each for each in found.containers if each]
        self._saved = [_copy(each) for each in self._live]
        self._classes = [dict(vars(kind)) for kind in found.classes]
        self._types = [type(module) for module in found.modules]
        self._slots = found.slot_values()
        self._cells = [contents(cell) for cell in found.cells]
        self._features = list(map(_features, found.tensors))
        own = _untouched_by_payloads(self.model, found.tensors, self.elsewhere)
        own = [tensor for tensor in own if not _is_expanded(tensor)]
        self._own = [tensor for tensor in own if tensor.layout == torch.strided]
        self._own_values = [tensor.detach().clone() for tensor in self._own]
        self._sparse = [tensor for tensor in own if tensor.layout != torch.strided]
        self._sparse_values = [tensor.detach().clone() for tensor in self._sparse]
        self._arrays = [array.copy() for array in found.arrays]
        self._drawn = [random.read() for random in found.random]

    def is_as_built(self) -> bool:
        """Whether nothing but values of tensors differs from what the model was built with."""
        found = self._found
        try:
            return (
                not any(self._empty)
                and self._live == self._saved
                and list(map(_features, found.tensors)) == self._features
                and list(map(type, found.modules)) == self._types
                and (not found.classes or [dict(vars(kind)) for kind in found.classes] == self._classes)
                and (not found.slots or found.slot_values() == self._slots)
                and (not found.cells or list(map(contents, found.cells)) == self._cells)
            )
        except UNEQUAL:
            return False

    def digest(self) -> str:
        """Hash of the values as built that nobody puts in place: buffers, tensors and arrays that are plain attributes, and the
        states of generators. The order in which they are found plays no part."""
        drawn = [state for random, state in zip(self._found.random, self._drawn, strict=True) if not random.is_global]
        return digest_of(sorted(map(digest_of, (*self._own_values, *self._sparse_values, *self._arrays, *drawn))))

    def put_back(self) -> None:
        """Make the model what it was; values that others put in place are left to them."""
        if not self.is_as_built():
            self._restore(self._found)
        if self._own:
            with torch.no_grad():
                torch._foreach_copy_(self._own, self._own_values)
                for tensor, value in zip(self._sparse, self._sparse_values, strict=True):
                    tensor.copy_(value)
        for array, values in zip(self._found.arrays, self._arrays, strict=True):
            np.copyto(array, values)
        for random, state in zip(self._found.random, self._drawn, strict=True):
            random.write(state)

    def _restore(self, found: Found) -> None:
        for module, kind in zip(found.modules, self._types, strict=True):
            if type(module) is not kind:
                module.__class__ = kind
        for container in self._empty:
            if container:
                _fill(container, ())
        for container, saved in zip(self._live, self._saved, strict=True):
            if not _same(container, saved):
                _fill(container, saved)
        for kind, attributes in zip(found.classes, self._classes, strict=True):
            _restore_class(kind, attributes)
        for (owner, name), value in zip(found.slots, self._slots, strict=True):
            _write(owner, name, value)
        for cell, value in zip(found.cells, self._cells, strict=True):
            _restore_cell(cell, value)
        for tensor, features in zip(found.tensors, self._features, strict=True):
            if not _same(_features(tensor), features):
                _restore_features(tensor, features)


def _is_expanded(tensor: Tensor) -> bool:
    """Whether several values are one place in memory; PyTorch refuses to write to such a tensor, so nobody changes it."""
    return tensor.layout == torch.strided and any(
        stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    )


UNEQUAL = (RuntimeError, ValueError, TypeError, AttributeError)
"""What comparing two tensors or arrays raises: containers compare objects only where they are not the same one."""


def _same(one: object, other: object) -> bool:
    try:
        return bool(one == other)
    except UNEQUAL:
        return False


def _untouched_by_payloads(model: nn.Module, tensors: Collection[Tensor], elsewhere: Collection[str]) -> list[Tensor]:
    """The tensors whose values nobody puts in place. A view of a weight changes with the weight: it is not among them."""
    named = model.state_dict(keep_vars=True)
    placed = [*model.parameters(), *(named[name] for name in elsewhere if name in named)]
    memory = set().union(*map(addresses, placed))
    parameters = {id(tensor) for tensor in placed}
    return [t for t in tensors if id(t) not in parameters and (own := addresses(t)) and not own & memory]


Features = tuple[torch.dtype, torch.device, torch.Size, bool, Tensor | None, object, object]


def _features(tensor: Tensor) -> Features:
    """What can change of a tensor beside its values."""
    return (
        tensor.dtype,
        tensor.device,
        tensor.shape,
        tensor.requires_grad,
        tensor.grad if tensor.is_leaf else None,
        tensor._backward_hooks,
        tensor._post_accumulate_grad_hooks,
    )


def _restore_features(tensor: Tensor, features: Features) -> None:
    dtype, device, shape, requires_grad, grad, hooks, after = features
    if (tensor.dtype, tensor.device, tensor.shape) != features[:3]:
        fits = tensor.shape == shape
        tensor.data = tensor.data.to(device, dtype) if fits else torch.zeros(shape, dtype=dtype, device=device)
    if not tensor.is_leaf:
        tensor.detach_()
    tensor.requires_grad_(requires_grad)
    tensor.grad = grad
    tensor._backward_hooks = hooks  # type: ignore[assignment]
    tensor._post_accumulate_grad_hooks = after  # type: ignore[assignment]


def _copy(container: Collection[object]) -> object:
    """Its contents, in a container of a plain type that compares with it."""
    if isinstance(container, MutableMapping):
        return dict(container)
    if isinstance(container, MutableSet):
        return set(container)
    return type(container)(container)  # type: ignore[call-arg]  # a list, a deque


def _fill(container: object, saved: object) -> None:
    """Give a container its contents back."""
    if isinstance(container, MutableMapping):
        container.clear()
        container.update(cast("Mapping[object, object]", saved))
    elif isinstance(container, MutableSet):
        container.clear()
        for each in cast("Collection[object]", saved):
            container.add(each)
    elif isinstance(container, MutableSequence):
        container.clear()
        container.extend(cast("Collection[object]", saved))


def _write(owner: object, name: str, value: object) -> None:
    """Set an attribute; of an object that forbids it too, unless it is a script, which keeps its attributes elsewhere."""
    if isinstance(owner, nn.Module):
        setattr(owner, name, value)
    else:
        object.__setattr__(owner, name, value)


def _restore_class(kind: type, attributes: Mapping[str, object]) -> None:
    for name in [name for name in vars(kind) if name not in attributes]:
        delattr(kind, name)
    for name, value in attributes.items():
        if vars(kind).get(name) is not value:
            setattr(kind, name, value)


def _restore_cell(cell: CellType, value: object) -> None:
    if contents(cell) is not value:
        cell.cell_contents = value
