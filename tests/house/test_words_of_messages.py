"""Messages say values, not the names that stand for values."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGES = ("fl_sim", "strategies", "clients")
PLACE = re.compile(r"(?<!%)\{[A-Za-z_]\w*[^{}]*\}")
"""A value's place in an f-string. `%{x}` is a place of plotly."""


def without_prefix(source: str) -> Iterator[str]:
    """Places that stand in a literal without the prefix `f`: in a message, or in one literal beside f-strings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            written = ast.get_source_segment(source, node) or ""
            parts = [part.value for part in node.values if isinstance(part, ast.Constant)]
            # `{{name}}` is meant for a later format.
            yield from (f"{node.lineno}: {p}" for part in parts for p in _places(part) if f"{{{p}}}" not in written)
        elif isinstance(node, ast.Raise) or (isinstance(node, ast.Call) and ast.unparse(node.func).startswith("log.")):
            in_f = {id(part) for each in ast.walk(node) if isinstance(each, ast.JoinedStr) for part in each.values}
            plain = [each for each in ast.walk(node) if isinstance(each, ast.Constant) and id(each) not in in_f]
            yield from (f"{each.lineno}: {p}" for each in plain for p in _places(each.value))


def _places(text: object) -> list[str]:
    return PLACE.findall(text) if isinstance(text, str) else []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('f"{a} of " "{b}"', ["1: {b}"]),
        ('f"{a} of {{b}}" "%{y}"', []),
        ('raise UserError("x = {x}")', ["1: {x}"]),
        ('log.warning("%d of {n}", 1)', ["1: {n}"]),
        ('raise UserError(f"x = {x}" " and {y:.2f}")', ["1: {y:.2f}"]),
        ('"{a}".format(a=1)', []),
    ],
)
def test_a_missing_prefix_is_found(source: str, found: list[str]) -> None:
    assert list(without_prefix(source)) == found


def test_no_message_shows_a_name_in_braces() -> None:
    files = [path for package in PACKAGES for path in sorted(Path(package).rglob("*.py"))]
    assert len(files) > 100
    assert [f"{path}:{found}" for path in files for found in without_prefix(path.read_text(encoding="utf-8"))] == []
