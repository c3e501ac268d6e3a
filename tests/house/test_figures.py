"""The pictures in docs/figures are what their scripts draw, and the map shows the packages that there are."""

from __future__ import annotations

import ast
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from federation import run_tiny
from PIL import Image

FOLDER = Path("docs/figures")
NAMES = sorted({path.stem.rpartition("-")[0] for path in FOLDER.glob("*.svg")})


@pytest.mark.parametrize("name", NAMES)
def test_the_picture_is_what_its_script_draws(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER / f"{name}.py"), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for form in ("light", "dark"):
        drawn = (tmp_path / f"{name}-{form}.svg").read_text(encoding="utf-8")
        assert drawn == (FOLDER / f"{name}-{form}.svg").read_text(encoding="utf-8"), (
            f"run python docs/figures/{name}.py"
        )
        ElementTree.fromstring(drawn)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no Chromium on this machine")
def test_the_report_page_can_be_photographed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    report = run_tiny(tmp_path)
    importlib.import_module("photograph").photograph(report.folder, tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as picture:
        assert picture.size == (1000, 1330)
        assert picture.convert("L").getextrema()[0] < 100  # not blank


def test_the_map_shows_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    floors = importlib.import_module("packages").FLOORS
    tree = ast.parse(Path("tests/house/test_architecture.py").read_text(encoding="utf-8"))
    (layers,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LAYERS"
    )
    tested = [{name.removeprefix("fl_sim.") for name in layer} for layer in layers if layer != {"fl_sim"}]
    assert [set(floor) for floor in reversed(floors)] == tested
    drawn = re.findall(
        r'font-size="14"[^>]*>([a-z]+)</text>', (FOLDER / "packages-light.svg").read_text(encoding="utf-8")
    )
    assert sorted(drawn) == sorted(name for floor in floors for name in floor)
