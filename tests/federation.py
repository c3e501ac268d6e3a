"""Small federations for tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fl_sim import Experiment, Report, run

TINY: Mapping[str, object] = {
    "name": "tiny",
    "rounds": 2,
    "data": {"source": "digits", "clients": 6, "partition": "dirichlet", "alpha": 0.5},
    "model": {"name": "cnn_bn"},
    "cohort": {"size": 4},
    "training": {"lr": 0.1, "epochs": 1, "batch_size": 32},
}


def tiny(out: Path, *overrides: str) -> Experiment:
    """A two-round federation on digits; seconds."""
    return Experiment.from_tree(TINY, [f'out="{out}"', *overrides])


def run_tiny(out: Path, *overrides: str) -> Report:
    """Run it."""
    return run(tiny(out, *overrides))
