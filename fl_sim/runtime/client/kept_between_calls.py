"""What a user's client keeps between its calls where no payload and no checkpoint looks: module globals and attributes.

The next client of the same process finds it. Another engine has other processes, and a resumed run begins with none of it, so
that results differ. What is not in `ctx.state` cannot be put back for an arbitrary client; that it changes can be seen:

    watch = Watch.of(client)
    watch.called()      # after each call; a warning once, where something changed from one call to the next

The first call may set up what later ones only read. A look takes some hundred microseconds, so only the first calls of a
process are looked at.
"""

from __future__ import annotations

import functools
import itertools
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from types import FunctionType, MethodType, ModuleType

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from fl_sim.core.errors import error_line

OWN = ("fl_sim", "clients", "strategies")
"""Packages whose clients keep nothing between calls."""
LIBRARIES = ("torch", "torchvision")
"""Packages whose layers keep nothing in globals between calls."""
CALLS = 4
"""Calls of a process that are looked at."""
DEPTH, MOST = 4, 200
"""How deep, and how many entries of a container, a look goes."""
ATOMS = (bool, int, float, complex, str, bytes, type(None))

UNREADABLE = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, NotImplementedError, RecursionError)
"""What reading an object of the user's may raise: its own properties, hashes and iterators run."""

CLIENT, RULE, CODEC = "client", "rule of the server", "codec"
LOST: Mapping[str, str] = {
    CLIENT: "what is kept outside of ctx.state reaches the next client of the same process, other engines and resumed runs do "
    "not have it",
    RULE: "what it keeps in a module or on itself, a resumed run does not have",
    CODEC: "what is kept outside of `state` reaches the next client of the same process, other engines and resumed runs do not "
    "have it",
}
"""What is called -> what becomes of what it keeps."""

Look = Mapping[str, object]
"""Where something is kept -> what stands for its value."""


@dataclass
class Watch:
    """Watches a client over the first calls of a process.

    Attributes:
        client: the client.
        homes: names of the modules in which the user's model is written; their globals are looked at too.
        calls: calls so far.
        role: what is called, a key of `LOST`.
    """

    client: object
    homes: frozenset[str] = frozenset()
    calls: int = 0
    role: str = CLIENT
    _last: Look = field(default_factory=dict)

    @classmethod
    def of(cls, client: object, model: nn.Module | None = None, role: str = CLIENT) -> Watch | None:
        """Watch a client and the modules in which its model is written; None where all is this package's or PyTorch's."""
        kinds = () if model is None else map(type, model.modules())
        homes = frozenset(h for h in map(_home, kinds) if _is_users(h) and h.partition(".")[0] not in LIBRARIES)
        return cls(client, homes, role=role) if homes or any(_is_users(name) for name in _modules(client)) else None

    @property
    def done(self) -> bool:
        """Whether further calls are not looked at."""
        return self.calls >= CALLS

    def called(self) -> str:
        """Look after a call; what changed since the last call, in one line, and empty where nothing did."""
        try:
            now = {**dict(_look(self.client)), **{k: v for home in self.homes for k, v in _globals(home)}}
        except UNREADABLE as error:  # an object of the user's that does not let itself be looked at
            self.calls = CALLS
            return (
                f"what it keeps between calls cannot be looked at ({error_line(error)}): whether something reaches the next "
                "client of the same process is not known"
            )
        changed = [place for place, value in now.items() if self.calls and self._last.get(place) != value]
        self._last, self.calls = now, self.calls + 1
        if not changed:
            return ""
        self.calls = CALLS
        return f"{changed[0]} is another one after each call of a {self.role}: {LOST[self.role]}"


def _is_users(module: str) -> bool:
    return module.partition(".")[0] not in OWN and module in sys.modules


def _modules(client: object) -> set[str]:
    """Names of the modules that the client's own code lies in."""
    return {name for part in _parts(client) if (name := _home(part))}


def homes(client: object) -> set[str]:
    """Names of the user's modules that the code of a client or rule lies in."""
    return set(filter(_is_users, _modules(client)))


def _home(part: object) -> str:
    name = getattr(part, "__module__", None)
    return name if isinstance(name, str) else ""


def _parts(client: object, depth: int = DEPTH) -> Iterator[object]:
    """The client, and the functions and objects of which it is composed."""
    if isinstance(client, (*ATOMS, ModuleType, Tensor)) or depth == 0:
        return
    if isinstance(client, functools.partial):
        for part in (client.func, *client.args, *client.keywords.values()):
            yield from _parts(part, depth - 1)
        return
    if isinstance(client, MethodType):
        yield from _parts(client.__self__, depth - 1)
        return
    yield client
    if isinstance(client, FunctionType):
        inner = [getattr(client, "__wrapped__", None), *(_content(cell) for cell in client.__closure__ or ())]
    else:
        inner = list(_attributes(client).values())
    for part in inner:
        if callable(part):
            yield from _parts(part, depth - 1)


def _attributes(thing: object) -> dict[str, object]:
    slots = {name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())}
    return {**{n: getattr(thing, n) for n in slots if hasattr(thing, n)}, **getattr(thing, "__dict__", {})}


def _content(cell: object) -> object:
    try:
        return cell.cell_contents  # type: ignore[attr-defined]
    except ValueError:  # still empty
        return None


def _look(client: object) -> Iterator[tuple[str, object]]:
    seen: set[str] = set()
    for part in _parts(client):
        home = _home(part)
        if not _is_users(home):
            continue
        name = getattr(part, "__qualname__", type(part).__name__)
        if isinstance(part, FunctionType):
            enclosed = zip(part.__code__.co_freevars, part.__closure__ or (), strict=False)
            cells = {f"{cell} of the enclosing function": _content(value) for cell, value in enclosed}
            yield from _each(f"{home}.{name}", {**vars(part), **cells, "its defaults": part.__defaults__})
        else:
            yield from _each(f"{home}.{type(part).__name__}", {**_class_values(type(part)), **_attributes(part)})
        if home not in seen:
            seen.add(home)
            yield from _globals(home)


def _globals(home: str) -> Iterator[tuple[str, object]]:
    return _each(home, vars(sys.modules[home]))


def _class_values(kind: type) -> dict[str, object]:
    return {name: value for each in kind.__mro__ if _is_users(each.__module__) for name, value in vars(each).items()}


def _each(where: str, values: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    for name, value in values.items():
        if not (name.startswith("__") and name.endswith("__")) and not isinstance(value, (ModuleType, FunctionType)):
            yield f"{where}.{name}", _stands_for(value, DEPTH)


def _stands_for(value: object, depth: int) -> object:
    """Something that compares equal while the value stays the same."""
    if isinstance(value, (*ATOMS, itertools.count, range)):
        return repr(value)
    if depth == 0 or isinstance(value, (ModuleType, FunctionType)):
        return id(value)
    own: type = type(value)
    if (stands := _stand_in(own)) is not None:
        return stands(value)
    if isinstance(value, nn.Module):
        return tuple(_stands_for(tensor, 1) for tensor in value.state_dict().values())
    if isinstance(value, Mapping):
        pairs = itertools.islice(value.items(), MOST)
        return len(value), tuple((repr(key)[:80], _stands_for(each, depth - 1)) for key, each in pairs)
    if isinstance(value, Sequence):
        return len(value), tuple(_stands_for(each, depth - 1) for each in (*value[:MOST], *value[-MOST:]))
    if isinstance(value, type):
        return tuple(_each("", _class_values(value))) if depth > 1 and _is_users(value.__module__) else id(value)
    inner = _attributes(value).items() if _is_users(_home(value)) else ()
    return id(value), tuple((name, _stands_for(each, depth - 1)) for name, each in inner)


def _tensor(value: Tensor) -> object:
    return _digest(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()) if value.numel() else b""


def _array(value: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> object:
    return (
        len(value.ravel()) if value.dtype.hasobject else _digest(np.ascontiguousarray(value).reshape(-1).view(np.uint8))
    )


STAND_INS: Sequence[tuple[type, Callable[..., object]]] = (
    (Tensor, _tensor),
    (np.ndarray, _array),
    (torch.Generator, lambda value: _digest(value.get_state().numpy())),
    (random.Random, lambda value: hash(value.getstate())),
    (np.random.Generator, lambda value: repr(value.bit_generator.state)),
    (Set, lambda value: (len(value), hash(frozenset(map(repr, itertools.islice(value, MOST)))))),
)


@functools.lru_cache(maxsize=1024)
def _stand_in(kind: type) -> Callable[..., object] | None:
    """What makes a stand-in for values of a type; a look asks a thousand times for the same few types."""
    return next((stands for known, stands in STAND_INS if issubclass(kind, known)), None)


def _digest(data: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> bytes:
    return xxhash.xxh3_64_digest(data.data)
