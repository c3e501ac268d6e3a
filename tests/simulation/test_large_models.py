"""Large models: fewer copies and sums in a file, and the same bits. What counts as large is lowered here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from federation import FOUR, run_tiny, same, tiny

from fl_sim import Experiment, Report, run
from fl_sim.communication.ledger import Ledger
from fl_sim.core import large
from fl_sim.core.types import FlatParams, Task, Update
from fl_sim.simulation.engines import open_grid
from fl_sim.simulation.federation import Federation
from fl_sim.simulation.loop import RunStopped
from fl_sim.simulation.server import build_server
from fl_sim.training.client import ClientContext
from strategies.accumulators import Accumulator

SEEN: list[int] = []
"""Where the parameters lay that clients were given."""


@pytest.fixture
def all_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large, "LARGE_BYTES", 1)


def looks(task: Task, ctx: ClientContext) -> Update:
    assert isinstance(task.params, FlatParams)
    SEEN.append(task.params.flat.data_ptr())
    return Update({name: value + 1 for name, value in task.params.items()}, ctx.num_examples)


def spoils(task: Task, ctx: ClientContext) -> Update:
    """Writes into what it was given, past PyTorch's counters."""
    next(iter(task.params.values())).numpy()[...] += 1.0
    return Update(dict(task.params), ctx.num_examples)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("client=clients.presets:topk", "client.density=0.2"),
        ("client=clients.presets:topk", "client.density=0.2", "wire.error_feedback=true", "strategy.momentum=0.9"),
        ("wire.downlink.content=difference", "wire.uplink.values=int8", "wire.uplink.content=difference"),
        ("evaluate.clients=2", "strategy=strategies.presets:fedadam"),
    ],
    ids=["whole", "masks", "error feedback", "differences", "optimizer"],
)
def test_a_large_model_ends_in_the_same_bits(
    overrides: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run_tiny(tmp_path / "one", *overrides)
    monkeypatch.setattr(large, "LARGE_BYTES", 1)
    monkeypatch.setattr("strategies.accumulators.PIECE", 1000)
    same(expected, run_tiny(tmp_path / "large", *overrides))


def test_while_clients_of_a_large_model_train_server_broadcast_and_clients_have_one_copy(
    all_are_large: None, tmp_path: Path
) -> None:
    SEEN.clear()
    federation = Federation.build(tiny(tmp_path, *FOUR, f"client={__name__}:looks"))
    track = federation.first
    with open_grid(federation) as grid:
        server = build_server(federation, Ledger(), scratch=tmp_path)
        track.give_up_first_values()
        assert not track.initial.is_held
        assert not track.start.is_held
        server.round(grid, {}, lambda *_: SEEN.append(server.models[0].params.flat.data_ptr()))  # type: ignore[attr-defined]
    assert len(set(SEEN)) == 1
    assert len(SEEN) == 8
    assert not track.initial.is_held, "nobody asked for the first values"
    first = track.initial.flat.clone()
    track.initial.give_up()
    assert torch.equal(track.initial.flat, first), "they are made again from the seed"


def test_sums_of_a_large_model_are_in_no_memory(all_are_large: None, tmp_path: Path) -> None:
    numbers = Accumulator.zeros(200_000, tmp_path)
    assert not numbers.in_memory
    assert not list(tmp_path.iterdir())
    for place, part in numbers.pieces():
        part += torch.arange(place.start, place.stop).numpy()
    for _, part in numbers.pieces():
        part *= 2
    read = torch.cat([torch.from_numpy(part.copy()) for _, part in numbers.pieces(keep=False)])
    assert torch.equal(read, 2 * torch.arange(200_000, dtype=torch.float64))
    assert Accumulator.zeros(5, None).in_memory


def test_a_client_that_writes_into_the_one_copy_stops_the_run(all_are_large: None, tmp_path: Path) -> None:
    with pytest.raises(RunStopped, match=r"round 1: something changed task.params in place.*value.clone\(\)"):
        run_tiny(tmp_path, f"client={__name__}:spoils")


def test_a_large_model_goes_on_from_its_checkpoint(all_are_large: None, tmp_path: Path) -> None:
    run_tiny(tmp_path / "a", "rounds=1")
    whole = run_tiny(tmp_path / "b")
    resumed: Report = run(Experiment.from_tree(dict(_tree(tmp_path / "a"))), resume=True)
    assert resumed.summary["params_sha256"] == whole.summary["params_sha256"]


def _tree(out: Path) -> dict[str, object]:
    return tiny(out).model_dump(exclude_unset=True)
