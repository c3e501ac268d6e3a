"""Values that a user's object keeps between rounds, as tensors of a checkpoint and back; nothing is unpickled.

    tensors = written({"step": 3, "history": [0.5, 0.25], "rng": numpy.random.default_rng(0)})
    values = read(tensors)

The values are a JSON text, `[kind, ...]` for all that JSON lacks; arrays are tensors beside it. What stands twice is one object
again after reading.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_sim.core.types import Params
from fl_sim.runtime.client.update_validation import KEPT

TEXT, PLACE = "values", "array.{:06}"
DEEPEST, LONGEST = 100, 8192
"""Levels of lists in lists, and bits of an integer, that are kept."""
JSONS = (NoneType, bool, int, float, str)
DTYPES = "biufcSUmM"
"""NumPy's kinds of dtypes that bytes say whole: numbers, texts, times."""
BITS: Mapping[str, type[Any]] = {
    kind.__name__: kind
    for kind in (np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937, np.random.Philox, np.random.SFC64)
}
SEEDS = ("entropy", "spawn_key", "n_children_spawned")
"""Options of a NumPy SeedSequence with its default pool: a checkpoint says nothing that takes memory."""


def owned(value: object) -> Mapping[int, object] | None:
    """The objects that can change of a value that can be kept, by identity; None for a value that cannot."""
    found: dict[int, object] = {}
    todo = [(0, value)]
    while todo:
        depth, each = todo.pop()
        if id(each) in found or _is_scalar(each):
            continue
        parts = () if _is_array(each) else _parts(each)
        if parts is None or depth > DEEPEST:
            return None
        if type(each) is not tuple:
            found[id(each)] = each
        todo += [(depth + 1, part) for part in parts[1:]]
    return found


def written(values: Mapping[str, object]) -> Params:
    """Values by name, all of which can be kept, as tensors."""
    writer = _Writer()
    text = json.dumps({name: writer.node(value) for name, value in values.items()})
    return {TEXT: torch.from_numpy(np.frombuffer(text.encode(), np.uint8).copy()), **writer.arrays}


def read(tensors: Params) -> dict[str, object]:
    """Invert `written`; the values are fresh copies.

    Raises:
        ValueError: these tensors are no kept values.
    """
    try:
        reader = _Reader(tensors)
        found = json.loads(tensors[TEXT].numpy().tobytes())
        return {name: reader.value(node) for name, node in found.items()}
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise ValueError("these tensors are no kept values") from error


def _is_scalar(value: object) -> bool:
    if type(value) is int:
        return value.bit_length() <= LONGEST
    if isinstance(value, np.generic):
        return type(value) is value.dtype.type and _is_whole(value.dtype)
    return type(value) in (*JSONS, bytes, complex)


def _is_array(value: object) -> bool:
    if type(value) is np.ndarray:
        return _is_whole(value.dtype)
    plain = type(value) is Tensor and value.layout is torch.strided and value.device.type == "cpu"
    return plain and cast(Tensor, value).dtype in KEPT and not cast(Tensor, value).requires_grad


def _is_whole(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in DTYPES and dtype.itemsize > 0


def _parts(value: object) -> Sequence[object] | None:
    """(kind, ...) of a value that consists of others; None for a value that cannot be kept."""
    if type(value) in (list, tuple, set):
        return (type(value).__name__, *cast("list[object]", value))
    if type(value) is dict:
        return ("dict", *(part for item in value.items() for part in item))
    if type(value) is np.random.Generator:
        bits, seeds = value.bit_generator, value.bit_generator.seed_seq
        if BITS.get(type(bits).__name__) is not type(bits) or type(seeds) is not np.random.SeedSequence:
            return None
        if seeds.pool_size != np.random.SeedSequence(0).pool_size:
            return None
        return ("Generator", type(bits).__name__, bits.state, {name: getattr(seeds, name) for name in SEEDS})
    if type(value) is np.random.RandomState:
        state = value.get_state(legacy=False)
        return ("RandomState", state) if state["bit_generator"] == "MT19937" else None
    if type(value) is random.Random:
        return ("Random", value.getstate())
    if type(value) is torch.Generator and value.device.type == "cpu":
        return ("torch.Generator", value.get_state())
    return None


@dataclass
class _Writer:
    arrays: dict[str, Tensor] = field(default_factory=dict)
    known: dict[int, tuple[int, object]] = field(default_factory=dict)
    """Identity -> (number, the object, which must live on so that no other has its identity)."""

    def node(self, value: object) -> object:
        if type(value) in JSONS:
            return value
        if type(value) is bytes:
            return ["bytes", value.hex()]
        if type(value) is complex:
            return ["complex", value.real, value.imag]
        if isinstance(value, np.generic):
            return ["scalar", value.dtype.str, value.tobytes().hex()]
        if id(value) in self.known:
            return ["again", self.known[id(value)][0]]
        number = len(self.known)
        if type(value) is not tuple:
            self.known[id(value)] = number, value
        if isinstance(value, Tensor):
            self.arrays[PLACE.format(number)] = value.clone(memory_format=torch.contiguous_format)
            return ["tensor", number]
        if isinstance(value, np.ndarray):
            flat = np.array(value, order="C").reshape(-1)
            self.arrays[PLACE.format(number)] = torch.from_numpy(flat.view(np.uint8))
            return ["array", number, value.dtype.str, value.shape]
        kind, *parts = _parts(value) or ()
        return [kind, *map(self.node, parts)]


@dataclass
class _Reader:
    tensors: Params
    known: list[object] = field(default_factory=list)

    def value(self, node: object) -> object:
        if not isinstance(node, list):
            return node
        kind, *parts = node
        if kind in SIMPLE:
            return SIMPLE[kind](*parts)
        if kind == "again":
            return self.known[parts[0]]
        if kind == "tuple":
            return tuple(map(self.value, parts))
        empty = {"list": list, "set": set, "dict": dict}.get(kind, object)()
        place = len(self.known)
        self.known.append(empty)
        if kind in ("tensor", "array"):
            tensor = self.tensors[PLACE.format(parts[0])]
            self.known[place] = tensor.clone() if kind == "tensor" else _array(tensor, *parts[1:])
        elif isinstance(empty, (list, set, dict)):
            _fill(empty, [self.value(part) for part in parts])
        else:
            self.known[place] = GENERATORS[kind](*map(self.value, parts))
        return self.known[place]


def _fill(empty: list[object] | set[object] | dict[object, object], values: list[object]) -> None:
    if isinstance(empty, dict):
        empty.update(zip(values[::2], values[1::2], strict=True))
    else:
        (empty.extend if isinstance(empty, list) else empty.update)(values)


def _array(tensor: Tensor, dtype: str, shape: Sequence[int]) -> NDArray[Any]:
    return tensor.numpy().copy().view(np.dtype(dtype)).reshape(shape)


def _scalar(dtype: str, data: str) -> object:
    return np.frombuffer(bytes.fromhex(data), np.dtype(dtype))[0]


def _generator(bits: str, state: Mapping[str, object], seeds: Mapping[str, Any]) -> np.random.Generator:
    made = BITS[bits](np.random.SeedSequence(**{name: seeds[name] for name in SEEDS}))
    made.state = dict(state)
    return np.random.Generator(made)


def _random_state(state: dict[str, Any]) -> np.random.RandomState:
    made = np.random.RandomState()
    made.set_state(state)
    return made


def _random(state: tuple[Any, ...]) -> random.Random:
    made = random.Random()
    made.setstate(state)
    return made


def _torch_generator(state: Tensor) -> torch.Generator:
    made = torch.Generator()
    made.set_state(state)
    return made


SIMPLE: Mapping[str, Callable[..., object]] = {"bytes": bytes.fromhex, "complex": complex, "scalar": _scalar}
GENERATORS: Mapping[str, Callable[..., object]] = {
    "Generator": _generator,
    "RandomState": _random_state,
    "Random": _random,
    "torch.Generator": _torch_generator,
}
