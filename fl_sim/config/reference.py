"""Every key of the config, read from the classes that validate it: a reference page, and a commented config to start from.

`make docs` writes `docs/config.md`; `fl-sim init` writes a config.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args, get_origin

from pydantic import BaseModel

from fl_sim.config.catalogue import first_line, functions
from fl_sim.config.experiment import Experiment
from fl_sim.core.lookup import imported

SET: Mapping[str, str] = {
    "": "name seed rounds",
    "client": "target",
    "strategy": "target",
    "data": "source clients partition alpha",
    "model": "name",
    "cohort": "size",
    "training": "lr epochs batch_size",
    "evaluate": "every",
}
"""Keys that a new config sets; all others are there as comments."""
TYPES: Mapping[object, str] = {
    int: "integer",
    float: "number",
    str: "text",
    bool: "true or false",
    dict: "table",
    Mapping: "table",
    list: "list",
    tuple: "list",
    Sequence: "list",
}
WIDTH = 120
"""Columns of a comment in a new config."""
Row = tuple[str, str, str, str]
"""Key, type, default, meaning."""
METHODS = {"client": "clients.presets", "strategy": "strategies.presets"}
TABLES = {"strategy.distil": "strategies.distillation:server_distillation"}
"""Tables below a preset, and the function that takes their keys."""
GIVEN = frozenset({"training", "gating", "seed", "num_clients", "cohort_size", "kept"})
"""Parameters of presets that a run fills in."""


@dataclass(frozen=True)
class Key:
    """A key of the config: its type and default as TOML, and its meaning."""

    name: str
    type: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Table:
    """A table of the config; an `optional` one has an effect by being present."""

    path: str
    meaning: str
    keys: tuple[Key, ...]
    optional: bool = False


def tables() -> Iterator[Table]:
    """List all tables of the config, the top level first."""
    yield from _tables(Experiment, "", Experiment(), first_line(Experiment))


def _tables(kind: type, path: str, default: object, meaning: str) -> Iterator[Table]:
    """The table that `kind` validates, then those below it; `default` is its value where the config has no such table."""
    hints, described = typing.get_type_hints(kind), documented(kind)
    keys, below = [], []
    for name in _names(kind):
        value = getattr(kind() if default is None else default, name)
        inner = _without_none(hints[name])
        if isinstance(inner, type) and (issubclass(inner, BaseModel) or dataclasses.is_dataclass(inner)):
            below.append((inner, f"{path}.{name}".lstrip("."), value, described.get(name) or first_line(inner)))
        else:
            keys.append(Key(name, _type(hints[name]), _toml(value), described.get(name, "")))
    yield Table(path, meaning, tuple(keys), optional=default is None)
    for table in below:
        yield from _tables(*table)


def _names(kind: type) -> list[str]:
    return list(kind.model_fields if issubclass(kind, BaseModel) else inspect.signature(kind).parameters)


def _without_none(hint: object) -> object:
    """`T | None` -> T."""
    arms = [arm for arm in get_args(hint) if arm is not type(None)]
    union = get_origin(hint) in (types.UnionType, typing.Union)
    return arms[0] if union and len(arms) == 1 else hint


def documented(thing: object) -> dict[str, str]:
    """Name -> meaning, from field descriptions, or from the "Attributes:" or "Args:" part of a docstring.

    There are two ways because there are two kinds of options. The config's own tables are pydantic models, which validate
    and describe a field in one place. Everything else is a dataclass or a function of the library that users call from
    Python too: its docstring is what `help` shows, and it does not import pydantic.
    """
    if isinstance(thing, type) and issubclass(thing, BaseModel):
        return {name: f.description or "" for name, f in thing.model_fields.items()}
    _, _, listed = re.sub(
        r"\n\n.*?\n(Attributes|Args):\n", "\0", "\n\n\n" + (inspect.getdoc(thing) or ""), flags=re.S
    ).partition("\0")
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=    \S)", "\n" + listed.split("\n\n")[0])[1:]:
        names, colon, meaning = " ".join(entry.split()).partition(": ")
        found |= {name.strip(): meaning.rstrip(".") for name in names.split(",") if colon}
    return found


def _type(hint: object) -> str:
    arms, origin = get_args(hint), get_origin(hint)
    if origin is Literal:
        return " or ".join(json.dumps(value) for value in arms)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_type(arm) for arm in arms if arm is not type(None))
    if origin is typing.Annotated:
        return _type(arms[0])
    return TYPES.get(origin or hint, "value")


def _toml(value: object) -> str:
    """A default as TOML; empty for what TOML cannot write."""
    if value is None:
        return ""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items()) + " }" if value else "{}"
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)


def template() -> str:
    """A config with the most used keys set to their defaults and all others as comments."""
    lines = ["# An experiment of fl-sim. Keys behind a # show their defaults; docs/config.md of the project lists all."]
    for table in tables():
        chosen = SET.get(table.path, "").split()
        header = [f"{'#' if table.optional else ''}[{table.path}]"] if table.path else []
        lines += ["", f"# {_sentence(table.meaning)}", *header]
        for key in table.keys:
            lines += _comment(key)
            lines += [f"{'' if key.name in chosen else '#'}{key.name} = {key.default}".rstrip()]
    return "\n".join(lines) + "\n"


def _comment(key: Key) -> list[str]:
    """The meaning of a key as lines of comment; what an unset key means stands in most meanings already."""
    if not key.meaning:
        return []
    known = key.default or "unset =" in key.meaning.lower()
    text = key.meaning if known else f"{key.meaning}; unset by default"
    return textwrap.wrap(text, WIDTH, initial_indent="# ", subsequent_indent="#   ", break_on_hyphens=False)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


def page() -> str:
    """`docs/config.md`."""
    parts = [
        "# Every key of the config",
        "Generated by `make docs` from the classes that validate a config; a test keeps it up to date. On the command line a "
        "key is written with its table: `fl-sim run CONFIG data.alpha=0.1 training.lr=0.05`. Keys without a default are unset; "
        "TOML has no null, so leave such a key out.",
    ]
    for table in tables():
        title = f"`[{table.path}]`" if table.path else "Top level"
        note = " Absent by default." if table.optional else ""
        parts += [f"## {title}", _sentence(table.meaning) + note]
        parts += [_rows((f"`{k.name}`", k.type, k.default, k.meaning) for k in table.keys)]
        if table.path in METHODS:
            parts += ["The presets, each with its options:", _rows(_presets(METHODS[table.path]))]
        for path in (path for path in TABLES if path.startswith(f"{table.path}.")):
            function = cast("Callable[..., object]", imported("", TABLES[path]))
            parts += [
                f"## `[{path}]`",
                _sentence(first_line(function)) + " Absent by default.",
                _rows(_options(function)),
            ]
    return "\n\n".join(parts) + "\n"


def _presets(module: str) -> Iterator[Row]:
    """The presets of a module and the options that each takes in its table."""
    for path, function in functions(module).items():
        yield f"**`{path}`**", "", "", first_line(function)
        yield from _options(function)


def _options(function: Callable[..., object]) -> Iterator[Row]:
    """The keyword arguments of a preset that a config can give."""
    described = documented(function)
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        if name not in GIVEN:
            needed = parameter.default is parameter.empty
            meaning = described.get(name, "") + ("; needed" if needed else "")
            yield f"`{name}`", _type(parameter.annotation), "" if needed else _toml(parameter.default), meaning


def _rows(rows: Iterable[Row]) -> str:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, kind, default, meaning in rows:
        shown = f"`{default}`" if default else ""
        lines.append(f"| {name} | {kind} | {shown} | {meaning.replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(page(), end="")
