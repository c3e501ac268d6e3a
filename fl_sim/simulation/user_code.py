"""Hashes of the code behind an import path: the module's file and the local files that it imports.

Installed packages, the standard library and fl-sim itself are left out: their versions stand for them. So are modules
that are imported by a name made at run time, and files that the code reads.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache, lru_cache
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

import xxhash

from fl_sim.core.errors import OURS, is_installed

OUR_FOLDERS = tuple(root + os.sep for root in OURS)


def code_of(target: str) -> Mapping[str, str]:
    """File -> hash of its code, for the module of `module:name` and every local file that it imports, near or far.

    A file is named by its module, `helpers/losses.py`, wherever it lies. Comments and layout do not count. A module
    without a file, such as a notebook, is hashed by the function itself and what it uses of the notebook.

    A module that is installed, or that there is not, has none.
    """
    name, _, attribute = target.partition(":")
    roots = _listed()
    if (path := _file_of(name, roots)) is None:
        found: object = getattr(sys.modules.get(name), attribute, None)
        if isinstance(found, FunctionType | type) and not getattr(sys.modules[name], "__file__", None):
            return {f"{name}:{attribute}": _digest("\n".join(_said(found, set())).encode())}
        if (path := _found(name)) is None:
            return {}
    found_code: dict[str, str] = {}
    waiting = {name: path}
    seen, closed = set[str](), set[str]()
    while waiting:
        module_name, file = waiting.popitem()
        is_package = file.name == "__init__.py"
        shown = module_name.replace(".", "/") + ("/__init__.py" if is_package else ".py")
        package = module_name if is_package else module_name.rpartition(".")[0]
        found_code[shown], imports = _read(file.read_bytes(), package)
        for imported in imports:
            if imported in seen:
                continue
            seen.add(imported)
            if imported.rpartition(".")[0] in closed:
                closed.add(imported)
                continue
            if (place := _place_of(imported, roots)) is None:
                continue
            real = os.path.realpath(place)
            ours, installed = _is_ours(real), is_installed(real)
            if place.name != "__init__.py" or (installed and not ours):
                closed.add(
                    imported
                )  # a module without parts, or an installed package: no file of the user's is below it
            known = imported.replace(".", "/")
            if not ours and not installed and not {f"{known}.py", f"{known}/__init__.py"} & {*found_code}:
                waiting[imported] = place
    return dict(sorted(found_code.items()))


@lru_cache(maxsize=256)
def _read(source: bytes, package: str) -> tuple[str, tuple[str, ...]]:
    """Hash of a module's code without comments and layout, and the names that the module may import, each once.

    Kept by the content: a round's start asks several times for the same few files.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return _digest(source), ()
    return _digest(ast.unparse(tree).encode()), tuple(dict.fromkeys(_imports(tree, package)))


@cache
def own_code() -> str:
    """Hash of all Python files of fl-sim itself, for a checkout that somebody edits under one version number."""
    digest = xxhash.xxh3_64()
    for root in OURS:
        for path in sorted(Path(root).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def _file_of(module: str, roots: Mapping[str, frozenset[str]]) -> Path | None:
    """The file of a module that is not installed; None where it is, and where there is no file."""
    place = _place_of(module, roots)
    return None if place is None or is_installed(os.path.realpath(place)) else place


def _listed() -> dict[str, frozenset[str]]:
    """What lies directly in each folder of the import path: most folders can then be passed over for most modules."""
    listed = {}
    for root in dict.fromkeys(sys.path):
        with suppress(OSError):  # an archive, or no such folder: no file of a module is below it
            folder = root or os.getcwd()
            if is_installed(os.path.join(folder, "")):
                listed[root] = _names_in(folder, os.stat(folder).st_mtime_ns)
            else:
                listed[root] = frozenset(os.listdir(folder))
    return listed


@lru_cache(maxsize=64)
def _names_in(folder: str, changed_ns: int) -> frozenset[str]:
    """What lies in a folder of packages, which is long and seldom changes; as Python's own import, told by its time."""
    return frozenset(os.listdir(folder))


def _place_of(module: str, roots: Mapping[str, frozenset[str]]) -> Path | None:
    """The file where Python looks for a module, installed or not; None for the program itself and where there is none."""
    if module == "__main__":
        return None
    relative = module.strip(".").replace(".", os.sep)
    top = relative.partition(os.sep)[0]
    for root, names in roots.items():
        if top not in names and f"{top}.py" not in names:
            continue
        stem = os.path.join(root or os.getcwd(), relative)
        for path in (f"{stem}{os.sep}__init__.py", f"{stem}.py"):
            if os.path.isfile(path):
                return Path(path)
    return None


def _found(module: str) -> Path | None:
    """The file of a module where only Python's import system knows it: the program itself, or an editable install."""
    loaded = sys.modules.get(module)
    origin = getattr(loaded, "__file__", None)
    if loaded is None:
        with suppress(ImportError, ValueError, AttributeError):
            origin = getattr(importlib.util.find_spec(module), "origin", None)
    if origin is None or not origin.endswith(".py") or is_installed(real := os.path.realpath(origin)):
        return None
    return Path(real)


def _is_ours(real: str) -> bool:
    return real.startswith(OUR_FOLDERS)


def _imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Dotted names of what a module may import, with every package on the way to it."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".") if node.level else []
            base = ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)] if base else [a.name for a in node.names]
    for name in names:
        parts = name.split(".")
        yield from (".".join(parts[:stop]) for stop in range(1, len(parts) + 1))


def _said(part: FunctionType | type, seen: set[str]) -> Iterator[str]:
    """Describe a function or class without a file, to be hashed: instructions, and what it uses of its module, by value."""
    if part.__qualname__ in seen:
        return
    seen.add(part.__qualname__)
    if isinstance(part, type):
        yield f"{part.__qualname__} {[base.__qualname__ for base in part.__bases__]}"
        for base in part.__bases__:
            yield from _used(base.__qualname__, base, part.__module__, seen)
        for name, value in vars(part).items():
            inner = getattr(value, "fget", None) or getattr(
                value, "__func__", value
            )  # properties; class and static methods
            yield from () if name in OF_ANY_CLASS else _used(name, inner, part.__module__, seen)
        return
    yield f"{part.__qualname__} {part.__defaults__!r} {part.__kwdefaults__!r}"
    for name, cell in zip(part.__code__.co_freevars, part.__closure__ or (), strict=True):
        with suppress(ValueError):  # a cell that nothing was put into yet
            yield from _used(name, cell.cell_contents, part.__module__, seen)
    for code in _codes(part.__code__):
        constants = [each for each in code.co_consts if not isinstance(each, CodeType)]
        yield f"{code.co_code.hex()} {[_plain(each) for each in constants]} {code.co_names!r} {code.co_varnames!r}"
        for name in code.co_names:
            if name in part.__globals__:
                yield from _used(name, part.__globals__[name], part.__module__, seen)


OF_ANY_CLASS = {
    "__module__",
    "__dict__",
    "__weakref__",
    "__doc__",
    "__qualname__",
    "__firstlineno__",
    "__static_attributes__",
}


def _used(name: str, value: object, module: str, seen: set[str]) -> Iterator[str]:
    """Describe what a function or class of `module` uses under a name."""
    if isinstance(value, FunctionType | type) and value.__module__ == module:
        yield from _said(value, seen)
    elif isinstance(value, ModuleType | FunctionType | type):
        home = value.__name__ if isinstance(value, ModuleType) else value.__module__
        local = (
            home not in seen
            and (place := _file_of(home, _listed())) is not None
            and not _is_ours(os.path.realpath(place))
        )
        seen.add(home)
        yield f"{name} of {home} {sorted(code_of(home).items()) if local else ''}"
    elif value is None or isinstance(value, bool | int | float | str | tuple | list | dict | set | frozenset):
        yield f"{name} = {_plain(value)}"


def _plain(value: object) -> str:
    """A value in words that do not depend on the process, as the order of a set does."""
    return f"{{{sorted(map(repr, value))}}}" if isinstance(value, set | frozenset) else repr(value)


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _digest(data: bytes) -> str:
    return xxhash.xxh3_128(data).hexdigest()
