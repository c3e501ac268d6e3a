"""Every file in configs/ loads, says in its first line what it is, and runs."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from fl_sim import Experiment, run

CONFIGS = sorted(Path("configs").glob("*.toml"))
CIFAR10 = Path("../shared/data/cifar10")
ONE_ROUND = ["rounds=1", "training.precision=float32"]
SMALL = ["training.steps=2", "training.batch_size=16"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_says_what_it_is(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("# ")
    Experiment.load(path)


def test_names_are_different() -> None:
    """A comparison names its rows by them."""
    names = [Experiment.load(path).name for path in CONFIGS]
    assert len(set(names)) == len(names)


@pytest.fixture(scope="module")
def some_cifar10(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first images of the real CIFAR-10: a whole test set costs a CPU half a minute a config."""
    if not CIFAR10.is_dir():
        pytest.skip(f"CIFAR-10 is not at {CIFAR10}")
    folder = tmp_path_factory.mktemp("cifar10")
    for part, count in (("train", 3000), ("test", 200)):
        table = pq.read_table(min(CIFAR10.glob(f"{part}-*.parquet"))).slice(0, count)
        pq.write_table(table, folder / f"{part}-0.parquet")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_runs(path: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    overrides = [*ONE_ROUND, f'out="{tmp_path}"']
    if Experiment.load(path).data.source != "digits":
        overrides += [*SMALL, f'data.source="{request.getfixturevalue("some_cifar10")}"']
    report = run(Experiment.load(path, overrides))
    assert report.summary["failures"] == {"raised": 0, "rejected": 0, "late": 0, "lost": 0}
    assert report.results.total_bytes > 0
