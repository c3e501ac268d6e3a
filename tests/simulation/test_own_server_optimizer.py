"""A server optimizer of one's own that keeps what it likes (FedAdam with bias correction, for instance) trains and resumes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from federation import run_tiny, same, tiny

from fl_sim.core.types import Params, UserError
from fl_sim.simulation import resume
from strategies.base import Method
from strategies.server_step import ServerState


def _adam(state: ServerState, aggregated: Params) -> tuple[Params, Params]:
    """Adam with bias correction (Kingma and Ba, 2015, algorithm 1) on the mean change; it counts its steps."""
    count = state.memory.get("steps", torch.tensor(0)) + 1
    params: Params = {}
    memory: Params = {"steps": count, "any": torch.arange(3, dtype=torch.int16), "empty": torch.zeros(0, 2)}
    for name, old in state.params.items():
        step, zero = aggregated[name] - old, torch.zeros_like(old)
        first = 0.9 * state.memory.get(f"m.{name}", zero) + 0.1 * step
        second = 0.99 * state.memory.get(f"v.{name}", zero) + 0.01 * step**2
        scale = 0.01 * (1 - 0.99 ** int(count)) ** 0.5 / (1 - 0.9 ** int(count))
        params[name] = old + scale * first / (second.sqrt() + 1e-3)
        memory |= {f"m.{name}": first, f"v.{name}": second.double()}
    return params, memory


def adam() -> Method:
    """The method that a config names."""
    return Method(optimise=_adam)


def careless() -> Method:
    """Keeps a number that is no tensor."""
    return Method(optimise=lambda state, aggregated: (aggregated, {"count": 3}))  # type: ignore[dict-item]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


OPTIONS = ("model.name=linear", "training.steps=2", "data.clients=4", "cohort.size=2")


def test_tensors_of_any_layout_and_dtype_survive_a_resume_bit_for_bit(tmp_path: Path) -> None:
    method = f"strategy={Path(__file__).stem}:adam"
    whole = run_tiny(tmp_path / "whole", *OPTIONS, method, "rounds=4")
    run_tiny(tmp_path / "parts", *OPTIONS, method, "rounds=2")
    same(whole, resume(tiny(tmp_path / "parts", *OPTIONS, method, "rounds=4")))


def test_what_is_no_tensor_is_said_in_the_first_round(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the server optimizer keeps 'count' as int; needed: tensors by name"):
        run_tiny(tmp_path, *OPTIONS, f"strategy={Path(__file__).stem}:careless")
