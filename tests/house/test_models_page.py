"""docs/models.md: every config of it runs as it stands there, and its tables name what exists."""

from __future__ import annotations

import ast
import inspect
import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from fl_sim import Experiment, Report, run
from fl_sim.config.catalogue import functions
from fl_sim.models.interface import Interface, arguments
from fl_sim.training.further_metrics import FURTHER

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
CONFIGS = {re.search(r'name = "(.*)"', text)[1]: text for text in re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)}  # type: ignore[index]


def ran(name: str, out: Path) -> Report:
    return run(Experiment.from_tree(tomllib.loads(CONFIGS[name]), [f'out="{out}"']))


def test_the_builder_takes_what_a_builder_is_given() -> None:
    """The packages that it imports are not among the project's: the block is read, not run."""
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    tree, found = ast.parse(block), dict[str, Callable[..., nn.Module]]()
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    exec(compile(tree, "docs/models.md", "exec"), found)
    given = arguments("my_gpt2:build", found["build"], Interface((4,), 9, vocabulary=9, each_token=True), 1.0)
    assert given.keys() == inspect.signature(found["build"]).parameters.keys()


def test_lora_on_text(tmp_path: Path) -> None:
    report = ran("lora", tmp_path)
    adapters = [name for name in report.params if ".lora_" in name]
    assert len(adapters) == 2 * 2 * 2
    assert {name for name in report.params if name not in adapters} == {
        name for name in report.params if name.startswith("head.") or "norm" in name
    }
    assert report.results.trainable_params < 0.15 * report.results.params


def test_fedrep_measures_its_clients(tmp_path: Path) -> None:
    report = ran("fedrep", tmp_path)
    last = report.rounds[-1]
    assert last["accuracy"] == last["clients_accuracy"] > 0.8
    assert {"clients_auc", "clients_top5_min", "auc"} <= last.keys()
    assert report.results.clients is not None
    assert report.results.clients.worst == last["clients_accuracy_min"]


@pytest.mark.parametrize("preset", re.findall(r"clients\.presets:\w+", PAGE))
def test_presets_exist(preset: str) -> None:
    assert preset in functions("clients.presets")


def test_the_page_lists_every_further_metric() -> None:
    listed = PAGE.partition("## Further metrics")[2]
    assert re.findall(r"^\| `(\w+)` \|", listed, re.MULTILINE) == list(FURTHER)
