"""LEAF's JSON (Caldas et al., 2018): train/*.json and test/*.json with `users` and `user_data`, as for FEMNIST and Shakespeare."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np

from fl_sim.core.errors import in_one_line
from fl_sim.core.files import read_plain
from fl_sim.core.types import UserError
from fl_sim.data.arrays import Array
from fl_sim.data.cache import Arrays, Room, cached, content_key
from fl_sim.data.found import find_parts
from fl_sim.data.kinds import Targets
from fl_sim.data.listing import listed, part_missing, shown

ALLOWED = "train/*.json and test/*.json"
GREY = 0.01
"""How far a grey level times 255 may be from a whole number."""
Samples = Mapping[str, tuple[Sequence[object], Sequence[object]]]
"""User -> (inputs, targets)."""


def read_leaf(root: Path, targets: Targets) -> tuple[Arrays, list[str]]:
    """Read LEAF's files, or take them from the cache. Users are groups.

    Texts become tokens, the characters of all users in their order; a target of one character is a class for
    `Targets.CLASSES`, and for `Targets.TOKENS` the last of the characters that follow each. Rows of numbers from 0 to 1 whose
    length is a square, and that are grey levels, become images (N, 1, H, W); other numbers float32.

    Returns:
        inputs, targets and groups, each with `test_` before its name too where there are test files; and notes.

    Raises:
        UserError: a file that is not what it should be, or other targets than are asked for.
        OSError: a file that cannot be read.
    """
    found = find_parts(root, (".json",))
    if found is None:
        raise part_missing(root, f"file {ALLOWED}")

    def decode(_: Room) -> Arrays:
        parts = {start: _samples(root, files) for start, files in found.parts.items()}
        arrays, notes = _arrays(parts, targets)
        return {**arrays, "notes": np.array(notes)} if notes else arrays

    arrays = dict(cached(content_key(f"leaf/1 {targets.name}", root, found.files), decode))
    notes = [str(note) for note in arrays.pop("notes", ())]
    return arrays, found.notes(ALLOWED) + notes


def _samples(root: Path, files: Sequence[Path]) -> Samples:
    """The samples of all users in some files. Raises UserError."""
    merged: dict[str, tuple[Sequence[object], Sequence[object]]] = {}
    for path in files:
        where = f"data.source: {shown(path, root)}"
        try:
            tree: object = json.loads(read_plain(path))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not valid JSON: {in_one_line(error)}") from error
        users = tree.get("users") if isinstance(tree, dict) else None
        data = tree.get("user_data") if isinstance(tree, dict) else None
        if not isinstance(users, list) or not isinstance(data, dict):
            raise UserError(f"{where}: no `users` and `user_data`; needed: LEAF's JSON")
        for user in users:
            given = data.get(user) if isinstance(user, str) else None
            x, y = (given.get("x"), given.get("y")) if isinstance(given, dict) else (None, None)
            if not isinstance(x, list) or not isinstance(y, list) or len(x) != len(y):
                raise UserError(f"{where}: user {user!r}: needed in user_data: lists x and y of one length")
            if user in merged:
                raise UserError(f"{where}: user {user!r} is there twice")
            merged[user] = (x, y)
        if beyond := sorted(data.keys() - set(users)):
            raise UserError(f"{where}: user_data of {listed(beyond)}, who are not in `users`")
    if not any(len(x) for x, _ in merged.values()):
        raise UserError(f"data.source: {shown(files[0], root)}: no samples")
    return merged


def _arrays(parts: Mapping[str, Samples], targets: Targets) -> tuple[Arrays, list[str]]:
    inputs = {start: [x for xs, _ in part.values() for x in xs] for start, part in parts.items()}
    answers = {start: [y for _, ys in part.values() for y in ys] for start, part in parts.items()}
    every = [x for xs in inputs.values() for x in xs]
    if all(isinstance(x, str) for x in every):
        arrays, notes = _texts(cast("dict[str, list[str]]", inputs), answers, targets)
    else:
        arrays, notes = _numbers(inputs, answers, targets)
    for start, part in parts.items():
        names = [user for user, (xs, _) in part.items() for _ in xs]
        arrays[f"{start}groups"] = np.array(names)
    return arrays, notes


def _texts(
    inputs: Mapping[str, list[str]], answers: Mapping[str, list[object]], targets: Targets
) -> tuple[dict[str, Array], list[str]]:
    lengths = {len(x) for xs in inputs.values() for x in xs}
    if len(lengths) > 1 or lengths == {0}:
        raise UserError(f"data.source: texts of {min(lengths)} to {max(lengths)} characters; needed: one length")
    if not all(isinstance(y, str) and len(y) == 1 for ys in answers.values() for y in ys):
        raise UserError(
            "data.source: targets of texts are no single characters; needed: the character that follows each"
        )
    if targets not in (Targets.TOKENS, Targets.CLASSES):
        raise UserError("data.source: texts; allowed: task = 'next_token' or 'classification'")
    follows = cast("Mapping[str, list[str]]", answers)
    alphabet = "".join(sorted({c for some in (inputs, follows) for xs in some.values() for x in xs for c in x}))
    number = {character: at for at, character in enumerate(alphabet)}
    arrays: dict[str, Array] = {}
    for start, xs in inputs.items():
        whole = np.array([[number[c] for c in x + y] for x, y in zip(xs, follows[start], strict=True)], dtype=np.int64)
        arrays[f"{start}inputs"] = whole[:, :-1].copy()
        arrays[f"{start}targets"] = (whole[:, 1:] if targets is Targets.TOKENS else whole[:, -1]).copy()
    arrays["vocabulary"] = np.array(len(alphabet))
    return arrays, [f"texts are {len(alphabet)} characters as tokens, in the order of their codes"]


def _numbers(
    inputs: Mapping[str, list[object]], answers: Mapping[str, list[object]], targets: Targets
) -> tuple[dict[str, Array], list[str]]:
    arrays: dict[str, Array] = {}
    for start in inputs:
        for name, some in (("inputs", inputs[start]), ("targets", answers[start])):
            try:
                made = np.array(some)
            except ValueError as error:
                raise UserError(f"data.source: {name} have different lengths: {in_one_line(error)}") from error
            if made.dtype.kind not in "if":
                raise UserError(f"data.source: {name} are {made.dtype}; needed: numbers, or texts of one length")
            arrays[start + name] = made
    for start in inputs:
        whole = arrays[f"{start}targets"]
        if targets is Targets.CLASSES and whole.dtype.kind != "i":
            raise UserError("data.source: targets are numbers; needed: classes, or task = 'regression'")
        if targets is Targets.NUMBERS:
            arrays[f"{start}targets"] = whole.astype(np.float32)
    rows = [arrays[f"{start}inputs"] for start in inputs]
    if all(_grey(some) for some in rows):
        side = math.isqrt(rows[0].shape[1])
        for start in inputs:
            level = np.rint(arrays[f"{start}inputs"].astype(np.float64) * 255).astype(np.uint8)
            arrays[f"{start}inputs"] = level.reshape(-1, 1, side, side)
        return arrays, [f"{side**2} numbers from 0 to 1 a sample are grey images of {side} x {side} pixels"]
    for start, numbers in zip(inputs, rows, strict=True):
        arrays[f"{start}inputs"] = numbers.astype(np.float64)
    return arrays, []


def _grey(rows: Array) -> bool:
    """Whether rows are grey levels from 0 to 1 of square images."""
    if rows.ndim != 2 or math.isqrt(rows.shape[1]) ** 2 != rows.shape[1] or rows.shape[1] < 16:
        return False
    level = rows.astype(np.float64) * 255
    return bool(level.min() >= 0 and level.max() <= 255 and np.abs(level - np.rint(level)).max() < GREY)
