"""What a run and `fl-sim prune` say where the model computes weights from other tensors, which nothing prunes or rounds."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import special
from computed_weights import WAYS, chain
from federation import run_tiny, tiny
from torch import nn
from torch.nn.utils import parametrizations, prune
from typer.testing import CliRunner

from fl_sim.cli.app import app
from fl_sim.communication.ledger import Ledger
from fl_sim.models import prunable_names
from fl_sim.models.computed import computed
from fl_sim.models.left_out import left_out, share_left_out
from fl_sim.models.parameters import entries
from fl_sim.simulation.federation import Federation
from fl_sim.simulation.server import build_server

SOME, ALL = (f"model.name=computed_weights:build_{name}" for name in ("normed", "all_normed"))
GATES = ("gating.keep=0.5", "gating.salience=weight")
ASKED = {
    "client = 'clients.presets:topk', which chooses weights": ("client=clients.presets:topk",),
    "client = 'clients.presets:adaptive_pruning', which chooses weights": (
        "client=clients.presets:adaptive_pruning",
        *GATES,
    ),
    "strategy = 'strategies.presets:global_magnitude'": ("strategy=strategies.presets:global_magnitude",),
    "wire.budget": ("wire.budget.megabytes=0.2", "wire.uplink.content=difference"),
    "wire.broadcast.density": ("wire.broadcast.density=0.1",),
    "wire.codec": ("wire.codec.uplink=eden", "wire.uplink.content=difference"),
    "wire.uplink.values = 'int8'": ("wire.uplink.values=int8", "wire.uplink.content=difference"),
    "wire.downlink.values = 'float16'": ("wire.downlink.values=float16",),
}
# Weights of the chain: 8 * 9 + 16 * 8 * 9 + 12 * 16 * 9 + 6 * 12 * 9 + 10 * 24, of which the second's are computed.
WEIGHTS, COMPUTED = 72 + 1152 + 1728 + 648 + 240, 1152


def told(caplog: pytest.LogCaptureFixture, out: Path, *overrides: str) -> list[str]:
    """What is said of weights before round 1."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, "fl_sim"):
        build_server(Federation.build(tiny(out, *overrides)), Ledger())
    return [line for line in caplog.messages if "weights take no part" in line]


@pytest.mark.parametrize("what", ASKED)
def test_how_many_weights_take_no_part_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str) -> None:
    (line,) = told(caplog, tmp_path, SOME, *ASKED[what])
    assert line.startswith(f"{what}: {COMPUTED:,} of {WEIGHTS:,} weights take no part, as the model computes them")
    assert line.endswith(": net.3.weight" if "adaptive" in what else ": 3.weight")
    assert told(caplog, tmp_path, "model.name=cnn_bn", *ASKED[what]) == []


def test_nothing_is_said_where_nothing_is_asked_of_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert told(caplog, tmp_path, SOME) == []
    assert told(caplog, tmp_path, SOME, "client=clients.presets:topk", "model.trainable=batchnorm+head") == []


def test_a_value_type_that_rounds_nothing_is_said_to_compress(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And that is what it does: other bytes, the same model."""
    for way in ("uplink", "downlink"):
        (line,) = told(caplog, tmp_path, ALL, f"wire.{way}.values=int8")
        assert line.startswith(
            f"wire.{way}.values = 'int8': rounds nothing here, and compresses what is sent without loss"
        )
        assert "none travels: 5,192 of 5,192 weights take no part" in line
    exact, given = run_tiny(tmp_path / "exact", ALL), run_tiny(tmp_path / "int8", ALL, "wire.uplink.values=int8")
    assert given.summary["params_sha256"] == exact.summary["params_sha256"]
    assert given.summary["uplink_bytes"] < exact.summary["uplink_bytes"]


@pytest.mark.parametrize("way", WAYS)
def test_sizes_and_names_of_computed_weights(way: str) -> None:
    model = chain(way, (0, 1, 2, 3))
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    found = left_out(model, entries(model), prunable_names(model))
    assert found == {"0.weight": 72, "3.weight": 1152, "6.weight": 1728, "9.weight": 648}
    assert all(bool((value == before[name]).all()) for name, value in model.state_dict().items())
    line = share_left_out(found, 240, "stay")
    assert line.startswith("3,600 of 3,840 weights take no part")
    assert line.endswith("which stay: 0.weight, 3.weight, 6.weight and 1 more")
    assert left_out(model, ["0.bias"], prunable_names(model)) == {}  # what does not travel is not said


def test_what_is_no_weight_or_takes_part_is_not_counted() -> None:
    model = special.Net(nn.LSTM(special.HIDDEN, special.HIDDEN))
    parametrizations.weight_norm(model.first, "weight")
    prune.random_unstructured(model.head, "bias", 0.5)
    nn.utils.weight_norm(model.middle, "weight_hh_l0")  # its directions are pruned as matrices
    assert left_out(model, entries(model), prunable_names(model)) == {"first.weight": 16 * 64}


class Watching:
    """A hook of the user's that has a name, as PyTorch's hooks have that compute a tensor, and computes none."""

    def __init__(self, name: object) -> None:
        self.name = name

    def __call__(self, layer: nn.Module, inputs: object) -> None:
        pass


@pytest.mark.parametrize("name", ["watching", "bias", 3])
def test_a_hook_with_a_name_computes_nothing(name: object) -> None:
    model = chain()
    for layer in model:
        layer.register_forward_pre_hook(Watching(name))
    assert left_out(model, entries(model), prunable_names(model)) == {}
    assert all(not computed(layer) for layer in model)


def test_the_command_that_prunes_says_it(tmp_path: Path) -> None:
    run = run_tiny(tmp_path, SOME)
    words = ["prune", str(run.folder), "--model", "computed_weights:build_normed"]
    done = CliRunner().invoke(app, [*words, "--density", "0.5"], env={"COLUMNS": "300"})
    assert done.exit_code == 0, done.output
    assert f"{COMPUTED:,} of {WEIGHTS:,} weights take no part" in done.output.replace("\n", " ")
    assert "stay as they are: 3.weight" in done.output.replace("\n", " ")
