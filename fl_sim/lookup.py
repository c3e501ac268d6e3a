"""Names that users write: an entry of a table, or `module:name` of their own."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import TypeVar, cast

from fl_sim.types import UserError

T = TypeVar("T")


def find(key: str, name: str, table: Mapping[str, T]) -> T:
    """The entry `name` of `table`, or the object behind an import path; `key` is the config key for the message.

    Raises:
        UserError: neither; names the nearest entry and all of them.
    """
    if name in table:
        return table[name]
    module, colon, attribute = name.partition(":")
    if colon:
        try:
            return cast(T, getattr(importlib.import_module(module), attribute))
        except (ImportError, AttributeError) as error:
            raise UserError(f"{key} = {name!r}: {error}") from error
    near = difflib.get_close_matches(name, table, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(f"{key} = {name!r}: unknown; {hint}allowed: {', '.join(table)}, or module:name")
