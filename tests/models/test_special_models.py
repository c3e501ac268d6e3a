"""Models whose weights are not simply "one float32 parameter with a name of its own" run alike everywhere, or are refused.

The models are in `support/special.py`; those in `RUNS` run, those in `REFUSED` do not, with a line that names the entry.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import special
import torch
from federation import run_tiny, same, tiny

from fl_sim.core.types import UserError
from fl_sim.simulation.federation import Federation
from fl_sim.simulation.loop import RunStopped

SMALL = ("data.clients=4", "cohort.size=3", "training.steps=2", "training.batch_size=16")
MASKED = (*SMALL, "strategy.target=strategies.presets:global_magnitude", "strategy.density=0.3")


def named(name: str) -> str:
    """The config's line for a model of `special`."""
    return f"model.name=special:build_{name}"


@pytest.mark.parametrize("name", special.RUNS)
def test_runs_alike_dense_and_masked_inline_on_workers_and_as_a_cohort(tmp_path: Path, name: str) -> None:
    """The first round is dense, the second one under a mask."""
    inline = run_tiny(tmp_path / "inline", named(name), *MASKED)
    workers = run_tiny(tmp_path / "workers", named(name), *MASKED, "engine=workers", "workers.count=2")
    same(inline, workers)
    cohort = run_tiny(tmp_path / "cohort", named(name), *MASKED, "engine=cohort")
    for entry, value in inline.params.items():
        torch.testing.assert_close(cohort.params[entry], value, atol=1e-3, rtol=1e-3)
    assert not any(inline.summary["failures"].values())
    assert all(torch.isfinite(value).all() for value in inline.params.values())


@pytest.mark.parametrize("name", special.REFUSED)
def test_is_refused_before_the_first_round_by_the_entry(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError) as caught:
        Federation.build(tiny(tmp_path, named(name), *SMALL))
    message = str(caught.value)
    assert special.REFUSED[name][1] in message
    assert "model." in message
    assert "\n" not in message
    assert torch.get_default_dtype() == torch.float32


def test_an_average_of_weights_in_a_buffer_travels(tmp_path: Path) -> None:
    """The trial sees it though the average of weights that rest is the weights."""
    report = run_tiny(tmp_path, named("averaged"), *SMALL)
    built = special.Averaged()
    assert "mean" in report.params
    assert report.summary["uplink_bytes"] > run_tiny(tmp_path / "bare", named("unused"), *SMALL).summary["uplink_bytes"]
    assert built.mean.shape == report.params["mean"].shape
    assert not torch.equal(report.params["mean"], report.params["head.weight"])


class Annealed(special.Net):
    """A factor in a buffer that its passes leave alone until 5 of them were made."""

    def __init__(self, *, persistent: bool) -> None:
        super().__init__()
        self.register_buffer("factor", torch.ones(()), persistent=persistent)
        self.passes = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += self.training
        if self.passes > 5:
            self.factor.mul_(0.9)  # type: ignore[operator]
        return super().forward(x) * self.factor


def annealed(*, num_classes: int, in_channels: int, image_size: int, width: float) -> torch.nn.Module:
    return Annealed(persistent=True)


def annealed_alone(*, num_classes: int, in_channels: int, image_size: int, width: float) -> torch.nn.Module:
    return Annealed(persistent=False)


def test_a_buffer_that_changes_after_the_trial_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunStopped, match="training changed the buffer 'factor', which it left alone in a trial"):
        run_tiny(tmp_path, f"model.name={__name__}:annealed", "training.steps=8")
    run_tiny(tmp_path / "alone", f"model.name={__name__}:annealed_alone", "training.steps=8")
    run_tiny(tmp_path / "few", f"model.name={__name__}:annealed", "training.steps=4")
