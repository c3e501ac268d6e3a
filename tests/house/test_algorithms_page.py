"""docs/algorithms.md: its method of one's own runs as printed, its names exist, and its tables have the rows of the script."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path

import pytest

from fl_sim import Experiment, run
from fl_sim.core.lookup import imported

PAGE = Path("docs/algorithms.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)


def test_the_method_of_one_s_own_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = (block for language, block in BLOCKS if language == "python")
    config = [block for language, block in BLOCKS if language == "toml"][1]
    (tmp_path / "my_method.py").write_text(code)
    (tmp_path / "config.toml").write_text(config)
    monkeypatch.syspath_prepend(str(tmp_path))
    report = run(Experiment.load(tmp_path / "config.toml", [f'out="{tmp_path}"', "model.name=linear"]), quiet=True)
    sections = report.ledger.total(by=("direction", "section"))
    assert {("down", "extra/direction"), ("up", "extra/loss")} <= sections.keys()
    assert len(report.rounds) == 3


def test_the_first_config_names_a_method_that_fits() -> None:
    import tomllib

    (first, *_) = (block for language, block in BLOCKS if language == "toml")
    experiment = Experiment.from_tree(tomllib.loads(first))
    assert (experiment.client.target, experiment.strategy.target) == (
        "clients.presets:scaffold",
        "strategies.presets:scaffold",
    )


def test_every_preset_of_the_table_exists() -> None:
    rows = re.findall(r"^\| [^|]+ \| `(\w+)` \| ([^|]+) \|", PAGE, re.MULTILINE)
    assert len(rows) == 10
    for client, strategies in rows:
        assert callable(imported("", f"clients.presets:{client}"))
        assert all(callable(imported("", f"strategies.presets:{name}")) for name in re.findall(r"`(\w+)`", strategies))


@pytest.mark.parametrize(
    "file",
    ["clients/presets", "clients/corrections", "clients/contrast", "strategies/presets", "strategies/corrections"],
)
def test_a_preset_and_each_part_of_it_fit_a_screen(file: str) -> None:
    tree = ast.parse(Path(f"{file}.py").read_text(encoding="utf-8"))
    parts = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert parts
    assert not [node.name for node in parts if (node.end_lineno or 0) - node.lineno >= 60]


def test_the_tables_have_the_rows_that_the_script_measures() -> None:
    script = runpy.run_path("docs/figures/algorithms.py", run_name="algorithms")
    for task in script["TASKS"]:
        (block,) = re.findall(f"<!-- {task} -->\n(.*?)<!-- /{task} -->", PAGE, re.DOTALL)
        names = [line.split(" | ")[0].removeprefix("| ") for line in block.splitlines()[2:]]
        assert names == [script["of_task"](task, name) for name in script["METHODS"]]
