"""Overrides on the command line, `key=value`, where TOML alone would read a value otherwise."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from functools import cache
from typing import Union, get_args, get_origin

from pydantic import BaseModel

from fl_sim.core.types import UserError


@cache
def _annotations(table: object) -> Mapping[str, object]:
    """Key -> annotation of a table of the config, a pydantic model or a dataclass; empty for anything else."""
    if isinstance(table, type) and issubclass(table, BaseModel):
        return {name: field.annotation for name, field in table.model_fields.items()}
    return inspect.get_annotations(table, eval_str=True) if isinstance(table, type) and is_dataclass(table) else {}


def _choices(annotation: object) -> tuple[object, ...]:
    """The types that an annotation allows, None left out: `Gating | None` allows `Gating`."""
    inner = get_args(annotation)[0] if hasattr(annotation, "__metadata__") else annotation
    is_union = get_origin(inner) is Union or type(inner).__name__ == "UnionType"
    return tuple(choice for choice in get_args(inner) if choice is not type(None)) if is_union else (inner,)


def quoted(override: str, root: type[BaseModel]) -> str:
    """The override with its value in quotes where the key holds text: `name=123` and `out=nan` are the texts they look like."""
    key, equals, value = override.partition("=")
    tables: tuple[object, ...] = (root,)
    for part in key.strip().split("."):
        tables = tuple(choice for table in tables for choice in _choices(_annotations(table).get(part)))
    is_text = bool(equals) and tables == (str,)
    return f"{key}={json.dumps(value)}" if is_text and value.strip()[:1] not in ("'", '"') else override


EITHER = {"epochs": "steps", "steps": "epochs"}
"""Ends of two keys of one table of which one counts: `training.epochs`, `training.steps`; `client.head_epochs` ..."""


def replace_other(tree: Mapping[str, object], overrides: Sequence[str]) -> None:
    """Take the file's `epochs` out where an override sets `steps`, and the reverse; both as overrides stay, to be refused."""
    given = {text.partition("=")[0].strip() for text in overrides}
    for key in given:
        table, _, name = key.rpartition(".")
        end = name.rpartition("_")[2]
        other = name.removesuffix(end) + EITHER.get(end, end)
        section = tree.get(table)
        if other != name and f"{table}.{other}" not in given and isinstance(section, dict):
            section.pop(other, None)


def require_tables(tree: Mapping[str, object], root: type[BaseModel], where: str) -> None:
    """Complain of a value where the config has a table, such as `model=resnet8`.

    Raises:
        UserError: names a key of the table.
    """
    for key, annotation in _annotations(root).items():
        tables = [choice for choice in _choices(annotation) if _annotations(choice)]
        value = tree.get(key)
        if not tables or value is None or isinstance(value, (Mapping, BaseModel)) or is_dataclass(value):
            continue
        if "target" in _annotations(tables[0]):
            if not isinstance(value, str):
                raise UserError(f"{where}: {key} = {value!r}: is an import path, module:name, or a table with a target")
            continue
        inside = list(_annotations(tables[0]))
        example = f"{key}.{inside[0]}={value}" if isinstance(value, str) else f"{key}.{inside[0]}=..."
        raise UserError(f"{where}: {key} = {value!r}: is a table with keys {', '.join(inside)}; write {example}")
