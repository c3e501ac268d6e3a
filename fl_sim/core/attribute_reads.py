"""Which keys a function's code reads of an attribute, such as "mu" of `task.config["mu"]`, found without running it.

    reads(client, "config").keys        # {"mu"}

The code is followed into the functions and classes that it names, near and far, but not into Python's, NumPy's, PyTorch's
and fl-sim's own.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from types import CodeType, FunctionType, MethodType, ModuleType

AS_THEY_ARE = sys.stdlib_module_names | {"builtins", "fl_sim", "flwr", "numpy", "torch", "torchvision"}
"""Packages that are not looked into: none of them knows a user's keys."""
LOOKED_INTO = (
    CodeType,
    FunctionType,
    MethodType,
    partial,
    staticmethod,
    classmethod,
    property,
    type,
    list,
    tuple,
    dict,
)
MOST = 3000
"""Objects that are looked at; code that leads to more may read anything."""


@dataclass(frozen=True)
class Reads:
    """What code reads of an attribute.

    Attributes:
        keys: written out, as `x.config["mu"]`, `x.config.get("mu")` or `"mu" in x.config`.
        any: whether the attribute is also used in another way, so that every key may be read.
        words: all texts in the code.
    """

    keys: frozenset[str]
    any: bool
    words: frozenset[str]


def reads(function: object, attribute: str) -> Reads:
    """What the code of a callable, and all code that it names, reads of an attribute of this name."""
    keys, words, anything, seen = set[str](), set[str](), False, dict[int, object]()
    waiting = [function]
    while waiting and not anything:
        thing = waiting.pop()
        if id(thing) in seen or _is_known(thing) or (_is_known(type(thing)) and not isinstance(thing, LOOKED_INTO)):
            continue
        seen[id(thing)] = thing
        anything = len(seen) > MOST
        if isinstance(thing, CodeType):
            found, other, texts = _read(thing, attribute)
            keys, words, anything = keys | found, words | texts, anything or other
        waiting += _named(thing)
    has_code = any(isinstance(thing, CodeType) for thing in seen.values())
    return Reads(frozenset(keys), anything or not has_code, frozenset(words))


def _read(code: CodeType, attribute: str) -> tuple[set[str], bool, set[str]]:
    """(keys, whether the attribute is used in another way, texts) of one code object."""
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("PRECALL", "PUSH_NULL", "EXTENDED_ARG")]
    keys, anything = set[str](), False
    for at, step in enumerate(steps):
        if step.argval != attribute or step.opname not in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_CONST"):
            continue
        rest = steps[at + 1 : at + 3]
        if rest and rest[0].argval == "get":
            del rest[0]
        if step.opname != "LOAD_CONST" and rest and _is_text(rest[0]):
            keys.add(rest[0].argval)
        elif rest and rest[0].opname == "CONTAINS_OP" and at > 1 and _is_text(steps[at - 2]):
            keys.add(steps[at - 2].argval)
        else:  # also getattr(task, "config")
            anything = True
    # A module that a function imports when it runs may read anything.
    anything = anything or any(step.opname == "IMPORT_NAME" and not _is_known_name(step.argval) for step in steps)
    return keys, anything, {text for text in code.co_consts if isinstance(text, str)}


def _is_text(step: dis.Instruction) -> bool:
    return step.opname == "LOAD_CONST" and isinstance(step.argval, str)


def _named(thing: object) -> Iterator[object]:
    """What an object leads to: the code of a function, what that names, the functions of a class."""
    if isinstance(thing, CodeType):
        yield from (each for each in thing.co_consts if isinstance(each, CodeType))
    elif isinstance(thing, FunctionType):
        yield thing.__code__
        yield from (*(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values(), *vars(thing).values())
        yield from _around(thing)
    elif isinstance(thing, MethodType):
        yield from (thing.__func__, thing.__self__)
    elif isinstance(thing, partial):
        yield from (thing.func, *thing.args, *thing.keywords.values())
    elif isinstance(thing, (staticmethod, classmethod)):
        yield thing.__func__
    elif isinstance(thing, property):
        yield thing.fget
    elif isinstance(thing, type):
        yield from (each for kind in thing.__mro__ if not _is_known(kind) for each in vars(kind).values())
    elif isinstance(thing, (list, tuple, dict)):
        yield from islice(thing.values() if isinstance(thing, dict) else thing, MOST)
    elif not isinstance(thing, ModuleType):
        yield type(thing)
        yield from getattr(thing, "__dict__", {}).values()


def _around(function: FunctionType) -> Iterator[object]:
    """What a function's code names outside of it: in its closure, in its module, and in modules that it names."""
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # holds nothing yet
            yield cell.cell_contents
    names = set(_names(function.__code__))
    modules = [function.__globals__]
    for namespace in modules:
        for name in names & namespace.keys():
            value = namespace[name]
            if isinstance(value, ModuleType) and not _is_known_name(value.__name__) and vars(value) not in modules:
                modules.append(vars(value))
            yield value


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names(inner)


def _is_known(thing: object) -> bool:
    return isinstance(thing, (FunctionType, type)) and _is_known_name(str(thing.__module__ or "builtins"))


def _is_known_name(module: str) -> bool:
    return module.partition(".")[0] in AS_THEY_ARE
