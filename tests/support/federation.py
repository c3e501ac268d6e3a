"""Small federations for tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from fl_sim import Experiment, Report, run

TINY: Mapping[str, object] = {
    "name": "tiny",
    "rounds": 2,
    "data": {"source": "digits", "clients": 6, "partition": "dirichlet", "alpha": 0.5},
    "model": {"name": "cnn_bn"},
    "cohort": {"size": 3},
    "training": {"lr": 0.1, "steps": 2, "batch_size": 8},
}

# For a test whose right values are those of four clients a round.
FOUR = ("cohort.size=4",)


# For a test whose right values are those of the whole width.
WHOLE = ("model.width=1.0",)


def tiny(out: Path, *overrides: str) -> Experiment:
    """A two-round federation on digits; a tenth of a second.

    Its network has half of its width, unless a test says anything of its model.
    """
    narrow = [] if any(override.startswith("model.") for override in overrides) else ["model.width=0.5"]
    return Experiment.from_tree(TINY, [f'out="{out}"', *narrow, *overrides])


def run_tiny(out: Path, *overrides: str) -> Report:
    """Run it."""
    return run(tiny(out, *overrides))


def same(a: Report, b: Report) -> None:
    """Parameters of every model, ledger, and every number that is not wall-clock time."""
    files = [{path.name: path.read_bytes() for path in r.folder.glob("model*.safetensors")} for r in (a, b)]
    assert files[0] == files[1]
    assert a.summary["params_sha256"] == b.summary["params_sha256"]
    assert all(torch.equal(a.params[n], b.params[n]) for n in a.params)
    assert a.ledger.to_table().equals(b.ledger.to_table())
    untimed = [[{k: v for k, v in row.items() if k != "seconds"} for row in r.rounds] for r in (a, b)]
    assert untimed[0] == untimed[1]
    clock = {"wall_s", "client_fits_per_s", "engine"}
    assert {k: v for k, v in a.summary.items() if k not in clock} == {
        k: v for k, v in b.summary.items() if k not in clock
    }
