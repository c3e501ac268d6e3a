"""A server optimizer of one's own that keeps two vectors (FedAdam, for instance) trains, and says why it is not resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from federation import run_tiny, tiny

from fl_sim.core.types import Params, UserError
from fl_sim.simulation import resume
from strategies.base import Method
from strategies.server_step import ServerState


def _adam(state: ServerState, aggregated: Params) -> tuple[Params, Params]:
    """FedAdam without bias correction (Reddi et al., 2021, algorithm 2)."""
    params: Params = {}
    memory: Params = {}
    for name, old in state.params.items():
        step, zero = aggregated[name] - old, torch.zeros_like(old)
        first = 0.9 * state.memory.get(f"m.{name}", zero) + 0.1 * step
        second = 0.99 * state.memory.get(f"v.{name}", zero) + 0.01 * step**2
        params[name] = old + 0.01 * first / (second.sqrt() + 1e-3)
        memory |= {f"m.{name}": first, f"v.{name}": second}
    return params, memory


def fedadam() -> Method:
    """The method that a config names."""
    return Method(optimise=_adam)


def test_a_run_whose_optimizer_keeps_two_vectors_says_why_it_is_not_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    options = (f"strategy={Path(__file__).stem}:fedadam", "model.name=linear", "training.steps=2")
    assert run_tiny(tmp_path, *options).rounds[-1]["round"] == 2
    with pytest.raises(UserError, match=r"keeps more than one vector of the model's layout, which cannot be resumed"):
        resume(tiny(tmp_path, *options, "rounds=3"))
