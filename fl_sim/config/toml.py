"""A config as a tree of plain values: read from a file and overrides, and its errors explained in one line."""

from __future__ import annotations

import inspect
import json
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from fl_sim.core.lookup import nearest
from fl_sim.core.types import UserError

Json = str | int | float | bool | None | list["Json"] | dict[str, "Json"]
MOST_BYTES = 1_000_000
"""Of a config file; written by hand, it has thousands."""


QUOTED = re.compile(r"""("(?:[^"\\]|\\.)*"|'[^']*')""")
"""A text in quotes, as TOML has it."""


TARGETS = ("client", "strategy", "wire.codec.uplink", "wire.codec.downlink")
"""Keys of parts with options, whose value may be the import path alone."""


def apply_override(tree: dict[str, Json], text: str) -> None:
    """Set `a.b=value` in a tree: a TOML value, or else a string.

    Raises:
        UserError: no key, or a value where a table is needed.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"override {_short(repr(text))}: write key=value, for instance training.lr=0.05")
    parsed = _value(value, f"override {_short(repr(text))}")
    *parents, leaf = key.strip().split(".")
    node = tree
    for depth, parent in enumerate(parents, 1):
        below = node.setdefault(parent, {})
        if isinstance(below, str) and ".".join(parents[:depth]) in TARGETS:
            below = node[parent] = {"target": below}
        if not isinstance(below, dict):
            raise UserError(f"override {_short(repr(text))}: {parent!r} is a value, not a table")
        node = below
    node[leaf] = plain(parsed, f"override {_short(text)}")


def _value(text: str, where: str) -> object:
    """What a text says in TOML, else the text. Raises UserError where TOML reads a part of it only, or a quote is open."""
    try:
        found = tomllib.loads(f"x = {text}")
    except (ValueError, RecursionError) as error:
        if text.strip()[:1] in ("'", '"'):
            raise UserError(f"{where}: the value begins with a quote and is no TOML text: {error}") from error
        return text
    if len(found) > 1:
        raise UserError(f"{where}: holds several lines; write each key=value on its own")
    if "#" in QUOTED.sub("", text):
        raise UserError(f"{where}: what stands behind # would be dropped, as a comment in TOML")
    return found["x"]


def text_of(path: Path) -> str:
    """A config file's text.

    Raises:
        OSError, ValueError: it cannot be read, is larger than any config, or is no text.
    """
    with path.open("rb") as stream:
        data = stream.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"more than {MOST_BYTES:,} bytes")
    return data.decode("utf-8-sig")  # some editors write a byte order mark, which TOML does not know


def plain(value: object, where: str) -> Json:
    """A copy of a config's value, which is saved as TOML and hashed as JSON, so that both must be able to say it.

    Raises:
        UserError: a date, an infinite number, one of more than 64 bits, text that is no Unicode, null in a list.
    """
    if isinstance(value, Mapping):
        return {_unicode(str(key), where): plain(below, f"{where}.{key}") for key, below in value.items()}
    if isinstance(value, (list, tuple)):
        items: Json = [plain(item, where) for item in value]
        if has_null(items):
            raise UserError(f"{_short(where)}: null in a list: TOML has no null")
        return items
    if isinstance(value, str):
        return _unicode(value, where)
    if value is None or isinstance(value, bool):
        return value
    if (isinstance(value, int) and abs(value) < 2**63) or (isinstance(value, float) and math.isfinite(value)):
        return value
    kind = "an integer of more than 64 bits" if isinstance(value, int) else str(value)
    raise UserError(f"{_short(where)} = {kind}: allowed: text, true, false, finite numbers, lists and tables of them")


def has_null(value: Json) -> bool:
    """Whether a value is null, or holds one anywhere."""
    if isinstance(value, dict):
        return any(map(has_null, value.values()))
    return any(map(has_null, value)) if isinstance(value, list) else value is None


def _unicode(text: str, where: str) -> str:
    """The text itself; half a surrogate pair, which JSON can hold, has no bytes in a TOML file."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{_short(where)}: {_short(repr(text))} is not Unicode text")
    return text


def _short(text: str) -> str:
    """For error messages: a screen line of it at most."""
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 120 else f"{text[:60]}...{text[-30:]}"


def explain(error: ErrorDetails, root: type[BaseModel]) -> str:
    """Format a validation error in one line: which key, what is wrong, what is allowed."""
    path = [str(part) for part in error["loc"] if not str(part).startswith("function-")]
    key = ".".join(path)
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown key {_short(repr(key))}{nearest(path[-1], _keys(root, path[:-1]))}"
    message = error["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(error["input"], dict) else f" = {_short(repr(error['input']))}"
    name = _short(key)
    if error["type"] == "tuple_type":
        return f"{name}{shown}: needed: a list{_as_list(name, error['input'])}"
    return f"{name}{shown}: {message[0].lower()}{message[1:]}" if key else message


def _as_list(key: str, given: object) -> str:
    """How a text that may be meant as a list is written as one: a shell takes the quotes of `key=["a","b"]` away."""
    if not isinstance(given, str):
        return ""
    words = [word.strip(" \"'") for word in given.strip("[] ").split(",")]
    return f"; write '{key}={json.dumps(words)}'"


def _keys(root: type[BaseModel], path: Sequence[str]) -> list[str]:
    """The keys allowed in the table at `path`."""
    kind: object = root
    for part in path:
        fields = getattr(kind, "model_fields", None) or getattr(kind, "__dataclass_fields__", {})
        if part not in fields:
            return []
        annotation = getattr(fields[part], "annotation", None)
        kind = annotation if annotation is not None else inspect.get_annotations(kind, eval_str=True).get(part)  # type: ignore[arg-type]
        # `Table | None`: a table that may be left out.
        kind = next((choice for choice in get_args(kind) if isinstance(choice, type)), kind)
    return list(getattr(kind, "model_fields", None) or getattr(kind, "__dataclass_fields__", {}))
