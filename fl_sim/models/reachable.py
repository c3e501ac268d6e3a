"""Everything that can change and that a model leads to: containers, tensors, arrays, generators, closures, classes.

A walk over Python objects, once in each process. What it does not look into is either immutable, or a library's own.
"""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, MutableSequence, MutableSet
from dataclasses import dataclass, field
from functools import partial
from types import CellType, FunctionType, MethodType, ModuleType
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fl_sim.core.types import UserError

STANDARD = sys.stdlib_module_names | {"builtins", "numpy"}
OPAQUE = ("torch._", "torch.fx", "torch.jit", "torch.export")
"""Parts of PyTorch whose objects are compilers' own."""
OURS = {"torch", "fl_sim"}
"""Whose classes keep nothing in class attributes."""


@dataclass(frozen=True)
class Random:
    """A generator's state, to be read and written.

    Attributes:
        read, write: the state.
        is_global: it is everybody's, so that its state says nothing of the model.
    """

    read: Callable[[], object]
    write: Callable[[object], object]
    is_global: bool


@dataclass
class Found:
    """What the walk came upon, in its order.

    Attributes:
        modules, tensors, arrays, random: each object once.
        containers: dicts, lists and sets that can change, the modules' own among them.
        classes: the user's classes, whose attributes can change.
        slots: (object, name) of attributes that are in no dict.
        cells: what functions share with the functions around them.
    """

    modules: list[nn.Module] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    arrays: list[NDArray[np.generic]] = field(default_factory=list)
    random: list[Random] = field(default_factory=list)
    containers: list[Collection[object]] = field(default_factory=list)
    classes: list[type] = field(default_factory=list)
    slots: list[tuple[object, str]] = field(default_factory=list)
    cells: list[CellType] = field(default_factory=list)

    def slot_values(self) -> list[object]:
        """The present values of `slots`."""
        return [getattr(owner, name) for owner, name in self.slots]


Led = Iterator[tuple[str, object]]
"""(path for messages, object) of what an object leads to."""


def reach(model: nn.Module) -> Found:
    """Walk from a model to everything that it leads to.

    Raises:
        UserError: something whose state cannot be put back.
    """
    found = Found()
    waiting: deque[tuple[str, object]] = deque([(type(model).__name__, model)])
    seen: dict[int, object] = {}  # with the objects themselves, so that no number is given twice
    while waiting:
        path, value = waiting.popleft()
        if id(value) not in seen:
            seen[id(value)] = value
            waiting.extend(_look(path, value, found))
    return found


def contents(cell: CellType) -> object:
    """What a closure's cell holds; `CellType` while it holds nothing."""
    try:
        return cell.cell_contents
    except ValueError:
        return CellType


def _look(path: str, value: object, found: Found) -> Led:
    """Remember one object, and tell what it leads to."""
    for kind, look in KINDS.items():
        if isinstance(value, kind):
            yield from look(path, value, found)
            return
    if isinstance(value, Iterator):
        raise refused(path, value, "what an iterator has given cannot be put back; keep a list and a position")
    yield from _look_at_instance(path, value, found)


def _look_at_tensor(path: str, value: Tensor, found: Found) -> Led:
    found.tensors.append(value)
    yield path, vars(value)


def _look_at_module(path: str, value: nn.Module, found: Found) -> Led:
    if isinstance(value, torch.jit.ScriptModule):
        yield from _look_at_script(path, value, found)
        return
    found.modules.append(value)
    yield path, vars(value)
    yield path, type(value)


def _look_at_script(path: str, value: torch.jit.ScriptModule, found: Found) -> Led:
    """Of a script, tensors and what it keeps as attributes of its own; its methods and constants cannot change."""
    kinds = vars(value).get("_concrete_type")  # a traced one has no attributes but its mode
    own = ["training"] if kinds is None else [name for name, (_, fixed) in kinds.get_attributes().items() if not fixed]
    found.slots += [(value, name) for name in own]
    yield from ((f"{path}.{name}", getattr(value, name)) for name in own)
    yield from ((path, tensor) for tensor in (*value.parameters(), *value.buffers()))
    yield from ((f"{path}.{name}", child) for name, child in value.named_children())


def _look_at_mapping(path: str, value: MutableMapping[object, object], found: Found) -> Led:
    found.containers.append(value)
    # Sub-modules, parameters and buffers lie in dicts of a module's own, whose names say nothing to its user.
    yield from ((path if key in MODULES_OWN else f"{path}.{key}", each) for key, each in value.items())
    yield from _further_attributes(path, value)


def _look_at_sequence(path: str, value: MutableSequence[object] | MutableSet[object], found: Found) -> Led:
    found.containers.append(value)
    yield from ((f"{path}[{i}]", each) for i, each in enumerate(value))
    yield from _further_attributes(path, value)


def _look_at_tuple(path: str, value: Collection[object], found: Found) -> Led:
    yield from ((f"{path}[{i}]", each) for i, each in enumerate(value))


def _look_at_function(path: str, value: FunctionType, found: Found) -> Led:
    if _package(value) not in STANDARD | OURS:
        cells = value.__closure__ or ()
        found.cells += cells
        yield path, value.__dict__
        yield path, value.__defaults__
        yield from ((path, contents(cell)) for cell in cells)


def _look_at_method(path: str, value: MethodType, found: Found) -> Led:
    yield path, value.__self__
    yield path, value.__func__


def _look_at_partial(path: str, value: partial[object], found: Found) -> Led:
    yield from ((path, each) for each in (value.func, value.args, value.keywords))


def _look_at_array(path: str, value: NDArray[np.generic], found: Found) -> Led:
    if value.flags.writeable:
        found.arrays.append(value)
    yield from ()


def _look_at_class(path: str, value: type, found: Found) -> Led:
    for kind in value.__mro__:
        if _package(kind) not in STANDARD | OURS and kind not in found.classes:
            found.classes.append(kind)
            yield from ((f"{path}.{n}", each) for n, each in vars(kind).items() if not n.startswith("__"))


def _look_at_instance(path: str, value: object, found: Found) -> Led:
    kind = type(value)
    package = _package(kind)
    if package in STANDARD or kind.__module__.startswith(OPAQUE):
        return
    yield path, kind
    slots = [n for base in kind.__mro__ for n in _slots(base) if hasattr(value, n)]
    found.slots += [(value, name) for name in slots]
    yield from ((f"{path}.{name}", getattr(value, name)) for name in slots)
    if hasattr(value, "__dict__"):
        yield path, vars(value)
    elif not slots and package not in OURS and not any("__slots__" in vars(base) for base in kind.__mro__[:-1]):
        raise refused(path, value, "its state is out of reach; keep it outside of the model")


def _further_attributes(path: str, value: object) -> Led:
    if _package(type(value)) not in STANDARD and hasattr(value, "__dict__"):
        yield path, vars(value)


def _slots(kind: type) -> list[str]:
    names = vars(kind).get("__slots__", ())
    return [n for n in ([names] if isinstance(names, str) else names) if n not in ("__dict__", "__weakref__")]


def _package(thing: object) -> str:
    return str(getattr(thing, "__module__", None) or "builtins").partition(".")[0]


def refused(path: str, value: object, why: str) -> UserError:
    """What a model holds and must not."""
    return UserError(f"the model cannot be put back between clients: {path} is of type {type(value).__name__}: {why}")


GLOBAL = (torch.default_generator, np.random.mtrand._rand, np.random.mtrand._rand._bit_generator, random._inst)
"""The generators behind `torch.manual_seed`, `numpy.random.seed` and `random.seed`."""


def _random(of: object, read: Callable[[], object], write: Callable[[object], object], found: Found) -> Led:
    found.random.append(Random(read, write, any(of is one for one in GLOBAL)))
    yield from ()


def _look_at_torch_generator(path: str, value: torch.Generator, found: Found) -> Led:
    return _random(value, value.get_state, cast("Callable[[object], object]", value.set_state), found)


def _look_at_bits(path: str, value: np.random.BitGenerator, found: Found) -> Led:
    return _random(value, lambda: value.state, lambda state: setattr(value, "state", state), found)


def _look_at_numpy_generator(path: str, value: np.random.Generator, found: Found) -> Led:
    yield path, value.bit_generator


def _look_at_random_state(path: str, value: np.random.RandomState, found: Found) -> Led:
    return _random(value, value.get_state, cast("Callable[[object], object]", value.set_state), found)


def _look_at_python_random(path: str, value: random.Random, found: Found) -> Led:
    return _random(value, value.getstate, cast("Callable[[object], object]", value.setstate), found)


def _nothing(path: str, value: object, found: Found) -> Led:
    yield from ()


MODULES_OWN = ("_modules", "_parameters", "_buffers")
KINDS: Mapping[type, Callable[..., Led]] = {
    **dict.fromkeys((type(None), bool, int, float, str, bytes, complex, ModuleType), _nothing),
    Tensor: _look_at_tensor,
    nn.Module: _look_at_module,
    MutableMapping: _look_at_mapping,
    MutableSequence: _look_at_sequence,
    MutableSet: _look_at_sequence,
    tuple: _look_at_tuple,
    frozenset: _look_at_tuple,
    FunctionType: _look_at_function,
    MethodType: _look_at_method,
    partial: _look_at_partial,
    np.ndarray: _look_at_array,
    torch.Generator: _look_at_torch_generator,
    np.random.BitGenerator: _look_at_bits,
    np.random.Generator: _look_at_numpy_generator,
    np.random.RandomState: _look_at_random_state,
    random.Random: _look_at_python_random,
    type: _look_at_class,
}
"""Kind of object -> what is remembered of it; the first that fits counts."""
