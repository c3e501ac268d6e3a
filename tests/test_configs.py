"""Every file in configs/ loads, says in its first line what it is, and runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from fl_sim import Experiment, run

CONFIGS = sorted(Path("configs").glob("*.toml"))
CIFAR10 = Path("../shared/data/cifar10")
ONE_ROUND = ["rounds=1", "training.precision=float32"]
SMALL = ["training.steps=2", "training.batch_size=16", "evaluate.batch_size=1000"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_says_what_it_is(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("# ")
    Experiment.load(path)


def test_names_are_different() -> None:
    """A comparison names its rows by them."""
    names = [Experiment.load(path).name for path in CONFIGS]
    assert len(set(names)) == len(names)


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_runs(path: Path, tmp_path: Path) -> None:
    plain = Experiment.load(path)
    overrides = [*ONE_ROUND, f'out="{tmp_path}"']
    if plain.data.source != "digits":
        if not CIFAR10.is_dir():
            pytest.skip(f"CIFAR-10 is not at {CIFAR10}")
        overrides += [*SMALL, f'data.source="{CIFAR10.resolve()}"']
    report = run(Experiment.load(path, overrides))
    assert report.summary["failures"] == {"raised": 0, "rejected": 0, "late": 0, "lost": 0}
    assert report.number("total_bytes") > 0
