"""docs/recipes.md: every config of it runs as it stands there, and is at most half as long as the first user's own."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from fl_sim import Experiment, Report, run

PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
CONFIGS = {tomllib.loads(text)["name"]: text for text in re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)}


def _control_variates(report: Report) -> bool:
    """As many bytes again, in both directions."""
    sizes = report.ledger.total(by=("direction", "section"))
    return all(0.99 < sizes[way, "extra/control"] / sizes[way, "values"] < 1.02 for way in ("up", "down"))


def _signs(report: Report) -> bool:
    """About a bit a weight, where float32 has 32."""
    sizes = report.ledger.total(by=("direction", "section"))
    return 25 < sizes["down", "values"] / sizes["up", "values"] < 35


RECIPES: Mapping[str, tuple[int, Callable[[Report], bool]]] = {
    "scaffold": (29, _control_variates),
    "fedadam": (12, lambda report: report.config["strategy"]["lr"] == 0.03),
    "signs": (9, _signs),
    "writers": (12, lambda report: [sum(row) for row in report.label_counts] == [29] * 3),
}
"""Name -> (most lines, whether a run is what its name says)."""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    rng = np.random.default_rng(0)
    drawn = [(int(rng.integers(1, 15)), float(rng.normal(4, 1)), "abc"[number % 3]) for number in range(120)]
    rows = [f"{age},{weight:.3f},{site},{'cat' if weight > 4 else 'dog'}" for age, weight, site in drawn]
    (tmp_path / "cats.csv").write_text("\n".join(["age,weight,site,kind", *rows]) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FL_SIM_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_short_and_does_what_it_says(name: str, here: Path) -> None:
    most, is_so = RECIPES[name]
    assert sum(bool(line.strip()) for line in CONFIGS[name].splitlines()) <= most
    (here / "recipe.toml").write_text(CONFIGS[name])
    report = run(Experiment.load("recipe.toml", ["rounds=1"]))
    assert is_so(report)


def test_every_recipe_is_run() -> None:
    assert set(CONFIGS) == set(RECIPES)
