"""docs/models.md: every config of it runs as it stands there, and its tables name what exists."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from fl_sim import Experiment, Report, run
from fl_sim.config.catalogue import functions
from fl_sim.training.further_metrics import FURTHER

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
CONFIGS = {re.search(r'name = "(.*)"', text)[1]: text for text in re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)}  # type: ignore[index]


def ran(name: str, out: Path) -> Report:
    return run(Experiment.from_tree(tomllib.loads(CONFIGS[name]), [f'out="{out}"']))


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
