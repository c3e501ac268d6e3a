"""Two masks in one signature or value are named by their kinds, never `mask` beside another one."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

FILES = [path for root in ("fl_sim", "strategies", "clients") for path in sorted(Path(root).rglob("*.py"))]


def masks(node: ast.AST) -> list[str]:
    """Names of a function's parameters or a class's fields that are annotated as masks."""
    named: list[tuple[str, ast.expr | None]] = []
    if isinstance(node, (ast.FunctionDef, ast.Lambda)):
        given = node.args
        named = [(each.arg, each.annotation) for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    elif isinstance(node, ast.ClassDef):
        fields = [each for each in node.body if isinstance(each, ast.AnnAssign)]
        named = [(each.target.id, each.annotation) for each in fields if isinstance(each.target, ast.Name)]
    return [
        name for name, kind in named if kind is not None and ast.unparse(kind) in ("Mask", "Mask | None", "FlatMask")
    ]


def several(source: str) -> Iterator[list[str]]:
    for node in ast.walk(ast.parse(source)):
        found = masks(node)
        if len(found) > 1:
            yield found


def test_no_bare_mask_beside_another() -> None:
    found = [(str(path), names) for path in FILES for names in several(path.read_text(encoding="utf-8"))]
    assert len(found) >= 3
    assert [each for each in found if "mask" in each[1]] == []


def test_a_bare_mask_would_be_found() -> None:
    assert list(several("def f(mask: Mask, *, held_mask: Mask | None): ...")) == [["mask", "held_mask"]]
