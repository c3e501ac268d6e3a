"""Text that ships with the package, as sequences of characters: one group a role of a play."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray

from fl_sim.core.types import UserError
from fl_sim.data.cache import Arrays

CONTEXT = 64
"""Characters that a model sees at once, where nobody says another number."""
FEWEST = 5
"""Sequences that a role needs, so that some of them are left to train on and one to test on."""
TEXTS: Mapping[str, str] = {
    "coriolanus": "Shakespeare's Coriolanus (about 1608) by character, 154 kB; roles are groups, the end of each part tests.",
}
"""Name -> what it is; the file has the same name. The source is named in texts/SOURCE.md."""
SPEECH = re.compile(r"^([A-Z][^\n:]*):\n(.*?)(?:\n\n|\n?\Z)", re.MULTILINE | re.DOTALL)


@cache
def roles(name: str) -> Mapping[str, str]:
    """Role -> its speeches, in the order of the play, each ending in a new line."""
    text = files("fl_sim.data").joinpath(f"texts/{name}.txt").read_text(encoding="utf-8")
    spoken: dict[str, list[str]] = {}
    for role, lines in SPEECH.findall(text):
        spoken.setdefault(role, []).append(lines + "\n")
    return {role: "".join(lines) for role, lines in spoken.items()}


def characters(name: str) -> str:
    """All characters of a text in order: the position of each is its token."""
    return "".join(sorted(set("".join(roles(name).values()))))


def read_text(name: str, context: int) -> tuple[Arrays, list[str]]:
    """Cut each role's speeches into sequences of `context` characters, none of which overlap; a fifth, the last, tests.

    Returns:
        inputs int64 (N, context), targets: the character that follows each, groups: the role, and the same of the test set.
        And a note on roles that are too short.

    Raises:
        UserError: no role is long enough.
    """
    alphabet = {character: number for number, character in enumerate(characters(name))}
    parts: dict[str, list[NDArray[np.int64]]] = {"": [], "test_": []}
    groups: dict[str, list[str]] = {"": [], "test_": []}
    short = []
    for role, spoken in roles(name).items():
        tokens = np.array([alphabet[character] for character in spoken], dtype=np.int64)
        count = (len(tokens) - 1) // context
        if count < FEWEST:
            short.append(role)
            continue
        windows = np.lib.stride_tricks.sliding_window_view(tokens, context + 1)[::context][:count]
        test = max(1, count // 5)
        for part, own in (("", windows[:-test]), ("test_", windows[-test:])):
            parts[part].append(own)
            groups[part] += [role] * len(own)
    if not parts[""]:
        raise UserError(
            f"data.context = {context}: no role of {name!r} has {FEWEST} sequences of it; needed: a smaller one"
        )
    arrays: Arrays = {}
    for part, cut in parts.items():
        sequences = np.concatenate(cut)
        arrays |= {f"{part}inputs": sequences[:, :-1].copy(), f"{part}targets": sequences[:, 1:].copy()}
        arrays[f"{part}groups"] = np.array(groups[part])
    note = f"{len(short)} of {len(roles(name))} roles have fewer than {FEWEST} sequences of {context} and are left out"
    return arrays, [note] if short else []
