"""docs/data.md: every block of it runs as it stands there."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from images_in_parquet import IMAGES, LABELS, table_bytes

from fl_sim import Experiment, Report, UserError, run
from fl_sim.training import learning_task

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
CONFIGS = {re.search(r'name = "(.*)"', text)[1]: text for text in re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)}  # type: ignore[index]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the page's table and modules."""
    rng = np.random.default_rng(0)
    rows = ["age,weight,height,site,kind"]
    for number in range(120):
        age, weight = rng.integers(1, 15), rng.normal(4, 1)
        rows.append(f"{age},{weight:.3f},{2 * weight + age:.3f},{'abc'[number % 3]},{'cat' if weight > 4 else 'dog'}")
    (tmp_path / "cats.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "my_tasks.py").write_text(PYTHON[0])
    (tmp_path / "my_data.py").write_text(PYTHON[1] + PYTHON[2])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("FL_SIM_CACHE", str(tmp_path / "cache"))
    yield tmp_path
    for name in ("my_tasks", "my_data"):
        sys.modules.pop(name, None)


def ran(name: str, here: Path, *overrides: str) -> Report:
    (here / f"{name}.toml").write_text(CONFIGS[name])
    return run(Experiment.load(here / f"{name}.toml", overrides))


def lines(text: str) -> int:
    return sum(bool(line.strip()) for line in text.splitlines())


def test_an_mlp_on_a_table(here: Path) -> None:
    assert ran("cats", here, "rounds=8").results.score.final > 0.8  # type: ignore[operator]
    assert lines(CONFIGS["cats"]) <= 12


def test_a_frame(here: Path) -> None:
    data = importlib.import_module("my_data").cats()
    assert (data.shape, data.num_classes, data.groups) == ((2,), 2, ("a", "b", "c"))
    assert (len(data.train), len(data.validation), len(data.test)) == (87, 9, 24)


def test_femnist_as_it_is_on_hugging_face(here: Path) -> None:
    (here / "femnist" / "data").mkdir(parents=True)
    writers = pa.array([f"f{i % 5}" for i in range(40)])
    file = table_bytes(image=pa.array(IMAGES), writer_id=writers, character=pa.array(LABELS))
    (here / "femnist" / "data" / "train-00000-of-00001.parquet").write_bytes(file)
    report = ran("femnist", here, "rounds=1", "data.clients=5", "cohort.size=5")
    assert [sum(row) for row in report.label_counts] == [5] * 5  # eight of each writer: two test, one validates


def test_flowers_partitioners_are_an_extra(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the extra installed, each of the ten clients has two classes (flwr-datasets 0.6.1)."""
    monkeypatch.setitem(sys.modules, "flwr_datasets.partitioner", None)
    with pytest.raises(UserError, match=r"pip install 'fl-sim\[flwr-datasets\]'"):
        ran("pathological", here)


def test_one_client_a_site(here: Path) -> None:
    report = ran("sites", here, "rounds=10")
    assert report.results.score.name == "rmse"
    assert report.results.score.final < 0.5  # type: ignore[operator]
    assert report.label_counts == [[29], [29], [29]]  # 120 rows in three sites; of each 8 test and 3 validate


def test_a_transformer_on_sequences(here: Path) -> None:
    report = ran("counting", here)
    assert report.rounds[-1]["perplexity"] < 5 < 10  # 10 is what knows nothing
    assert lines(PYTHON[2]) + lines(CONFIGS["counting"]) <= 22


def test_fedper_keeps_its_heads(here: Path) -> None:
    report = ran("fedper", here)
    assert not [name for name in report.params if name.startswith("3.")]
    assert report.rounds[-1]["accuracy"] == report.rounds[-1]["clients_accuracy"]
    assert lines(CONFIGS["fedper"]) <= 13


def test_a_task_of_ones_own(here: Path) -> None:
    assert learning_task("my_tasks:absolute").metric.name == "loss"
    report = ran("sites", here, "task=my_tasks:absolute")
    assert report.results.score.name == "loss"
