"""A mark of what an object contains: another one after any change in place, as far as Python shows the object's state.

The state is what `copy` and `pickle` would take (`__reduce_ex__`), of all that is reached from the object. Functions count with
what they close over. Nothing is called of the object but that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from types import FunctionType, ModuleType, NoneType

import numpy as np
import torch
from torch import Tensor

from fl_sim.core.errors import USERS_OWN

VALUES = (NoneType, bool, int, float, complex, str)


@dataclass(frozen=True)
class Mark:
    """A mark of an object's content.

    Attributes:
        digest: of the content.
        seen: the objects that were reached, by identity.
        hidden: type names of the objects whose state Python does not show, such as locks and open files.
    """

    digest: bytes
    seen: dict[int, object]
    hidden: set[str]


def mark(value: object, apart: Collection[object] = ()) -> Mark:
    """Mark what an object contains; of the objects of `apart` the identity alone counts."""
    hashed, outside = hashlib.blake2b(), {id(each) for each in apart}
    numbers: dict[int, int] = {}
    found, todo = Mark(b"", {}, set()), [value]
    while todo:
        each = todo.pop()
        hashed.update(f"\0{type(each).__qualname__}\0".encode())
        if type(each) in VALUES:
            text = hex(each) if isinstance(each, int) else repr(each)
            hashed.update(text.encode(errors="surrogatepass"))
        elif isinstance(each, (type, ModuleType)) or id(each) in outside:
            hashed.update(str(id(each)).encode())
        elif id(each) in numbers:
            hashed.update(str(numbers[id(each)]).encode())
        else:
            # Kept alive, so that no other object has its identity while this one is at work.
            numbers[id(each)], found.seen[id(each)] = len(numbers), each
            try:
                parts = [*_parts(each)]
            except USERS_OWN:  # Python's refusal, or of the user's own code
                found.hidden.add(type(each).__name__)
                parts = [id(each)]
            hashed.update(str(len(parts)).encode())
            for part in parts:
                if isinstance(part, (bytes, memoryview)):
                    hashed.update(str(len(part)).encode())
                    hashed.update(part)
            todo += [part for part in reversed(parts) if not isinstance(part, (bytes, memoryview))]
    return Mark(hashed.digest(), found.seen, found.hidden)


def _parts(value: object) -> Iterator[object]:
    """What an object consists of: bytes, and further objects."""
    if isinstance(value, (bytes, bytearray)):
        yield bytes(value)
    elif type(value) is np.ndarray and not value.dtype.hasobject:
        flat = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        yield from (str(value.dtype), str(value.shape), flat.data)
    elif isinstance(value, Tensor) and value.layout is torch.strided:
        numbers = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        yield from (str(value.dtype), str(value.shape), numbers.data, vars(value))
    elif type(value) in (list, tuple, set, frozenset):
        yield from value  # type: ignore[misc]
    elif type(value) is dict:
        yield from (part for item in value.items() for part in item)
    elif isinstance(value, FunctionType):
        yield from (id(value.__code__), value.__defaults__, value.__kwdefaults__, vars(value))
        yield from (cell.cell_contents for cell in value.__closure__ or ())
    else:
        state = value.__reduce_ex__(4)
        # A text names something global; a tuple ends in iterators over items, which lists show.
        yield from (state,) if isinstance(state, str) else map(_whole, state)


def _whole(part: object) -> object:
    return list(part) if isinstance(part, Iterator) else part
